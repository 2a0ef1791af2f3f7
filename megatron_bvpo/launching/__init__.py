"""Before torchrun: where a command goes, what its flags and file say, and whether the run can start at all.

Nothing here loads torch, megatron or ms-swift at import but `flags`, which needs transformers' parser.
"""
