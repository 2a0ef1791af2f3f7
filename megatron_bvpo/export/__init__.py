"""From a checkpoint to what an engine loads: adapters and whole models. Torch, and no host framework."""
