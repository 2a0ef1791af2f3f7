"""The seams to ms-swift, mcore-bridge and megatron-core: supported versions and the few patches."""
