"""The seams inside a rank, to ms-swift, mcore-bridge and megatron-core: patches, saving, checkpoints, the head."""
