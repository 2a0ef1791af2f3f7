"""Patches of megatron-core that last for a block only."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from megatron.core.optimizer import optimizer as megatrons  # noqa: E402

from megatron_bvpo.host.patches import groups_at_any_rate  # noqa: E402


def keys() -> set[tuple]:
    return {module.param_group_identifier_keys for module in (megatrons, distrib_optimizer)}


def part(*groups) -> SimpleNamespace:
    return SimpleNamespace(param_groups=[dict(zip(("wd_mult", "max_lr"), group, strict=True)) for group in groups])


def test_groups_are_found_at_any_rate_unless_rates_tell_them_apart():
    """megatron-core 0.19 would not find the group of another --lr; earlier ones do not look at rates."""
    before = keys()
    assert len(before) == 1 and {"wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"} <= {*next(iter(before))}
    plain = SimpleNamespace(chained_optimizers=[part((0, 1e-3), (1, 1e-3)), part((0, 1e-3)), part()])
    for optimizer in (plain, plain.chained_optimizers[0]):
        with groups_at_any_rate(optimizer):
            assert all({"max_lr", "min_lr"}.isdisjoint(found) and "wd_mult" in found for found in keys())
        assert keys() == before
    with groups_at_any_rate(SimpleNamespace(chained_optimizers=[part((1, 1e-3)), part((1, 1e-3), (1, 2e-3))])):
        assert keys() == before


def test_the_parts_of_a_dense_mlp_can_be_replaced(monkeypatch):
    """As megatron-core 0.19 describes it: mcore-bridge copies a layer's description and sets a part of its MLP."""
    from copy import deepcopy
    from functools import partial

    from mcore_bridge.model.gpts import qwen3_next

    from megatron_bvpo.host.patches import apply_patches

    def stock(**_):
        mlp = partial(lambda submodules: submodules.linear_fc1, submodules=SimpleNamespace(linear_fc1="stock"))
        return SimpleNamespace(submodules=SimpleNamespace(mlp=mlp))

    monkeypatch.setattr(qwen3_next, "get_gpt_layer_with_transformer_engine_spec", stock)
    apply_patches()
    described = qwen3_next.get_gpt_layer_with_transformer_engine_spec()
    copied = deepcopy(described)
    copied.submodules.mlp.submodules.linear_fc1 = "ours"
    assert copied.submodules.mlp() == "ours" and described.submodules.mlp() == "stock"
