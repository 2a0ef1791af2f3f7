"""TE's fused MoE router kernels. Megatron has plain-PyTorch ones, so these only say how to use them."""


def _refuse(name: str):
    def router(*args, **kwargs):
        raise NotImplementedError(
            f"{name} is a GPU kernel that the transformer_engine stand-in does not have. Set --moe_router_fusion false."
        )

    router.__name__ = name
    return router


fused_compute_score_for_moe_aux_loss = _refuse("fused_compute_score_for_moe_aux_loss")
fused_moe_aux_loss = _refuse("fused_moe_aux_loss")
fused_topk_with_score_function = _refuse("fused_topk_with_score_function")
