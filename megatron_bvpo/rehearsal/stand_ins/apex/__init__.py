"""An apex without contents: ms-swift turns `--gradient_accumulation_fusion` off where there is none.

The kernels that Megatron asks for under that flag are in the module `fused_weight_gradient_mlp_cuda` beside it. What
else is in apex, Megatron takes from Transformer Engine.
"""
