"""Adapted layers have the settings of adapter_config.json, in whichever way the installed peft hands them over."""

from __future__ import annotations

from tests.distributed.ranks import run_ranks

SETTINGS = dict(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True)


def stand_ins():
    from megatron_bvpo.rehearsal import install

    install()


def layers(rank, world_size):
    """(dropout, scaling) of a layer that is given a whole config, as peft 0.19 does, before and with our patch; and of
    the layers that the installed peft adapts."""
    import swift.megatron.pipelines.train.rlhf  # noqa: F401  before mcore_bridge
    from mcore_bridge import LoraParallelLinear
    from megatron.core import parallel_state, tensor_parallel
    from peft import LoraConfig, get_peft_model

    from megatron_bvpo.host.patches import apply_patches
    from tests.unit.sized_ranks import build_model

    def by_hand():
        base = build_model({"dense": True}).decoder.layers[0].self_attention.linear_qkv
        return LoraParallelLinear(base, "default", r=4, lora_alpha=8, config=config, target_name="linear_qkv")

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    config = LoraConfig(target_modules=["linear_qkv", "linear_fc1"], **SETTINGS)
    found = [by_hand()]
    apply_patches()
    apply_patches()  # changes nothing
    found.append(by_hand())
    model = build_model({"dense": True})
    get_peft_model(model, config)
    found += [m for m in model.modules() if isinstance(m, LoraParallelLinear)]
    return [(getattr(m.lora_dropout["default"], "p", 0.0), m.scaling["default"]) for m in found]


def test_settings_reach_every_layer():
    (found,) = run_ranks(1, layers, before=stand_ins)
    unpatched, *patched = found
    assert patched == [(0.1, 8 / 2)] * 3
    assert unpatched == (0.0, 8 / 4), "mcore-bridge reads the config by itself: the patch can go"
