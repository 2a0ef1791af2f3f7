"""`bvpo plan`: what a run needs, computed from its YAML file and the model's config.json, before any GPU is asked for.

Pure arithmetic; nothing here imports torch, megatron or ms-swift, so a login node answers in a second.
tests/distributed/test_plan_memory.py compares the figures with the live tensors of real ranks.
"""
