"""TE's fused MoE permutations. Megatron has plain-PyTorch ones, so these only say how to use them."""


def _refuse(name: str):
    def permutation(*args, **kwargs):
        raise NotImplementedError(
            f"{name} is a GPU kernel that the transformer_engine stand-in does not have. "
            "Set --moe_permute_fusion false."
        )

    permutation.__name__ = name
    return permutation


moe_permute = _refuse("moe_permute")
moe_permute_with_probs = _refuse("moe_permute_with_probs")
moe_sort_chunks_by_index = _refuse("moe_sort_chunks_by_index")
moe_sort_chunks_by_index_with_probs = _refuse("moe_sort_chunks_by_index_with_probs")
moe_unpermute = _refuse("moe_unpermute")
