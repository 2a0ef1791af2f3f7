"""Transport undoes disorder: what an average or a copy of the lower layer cannot."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_bvpo.export.tensor_files import read_entries
from megatron_bvpo.growth import transport
from megatron_bvpo.growth.layers import Layer, Sizes
from megatron_bvpo.growth.new_layer import AVERAGED, new_layer, zeroed
from tests.unit.grown_models import in_disorder

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")

COMMON = dict(hidden=48, heads=12, kv_heads=4, head_dim=8)
DENSE = Sizes(**COMMON, ffn=96, experts=0, shared=0, qkv_bias=True, o_bias=False, qk_norm=False)
MIXTURE = Sizes(**COMMON, ffn=24, experts=10, shared=32, qkv_bias=False, o_bias=False, qk_norm=True)


def random_layer(sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in sizes.shapes().items()}


def as_layer(tensors, path, number: int) -> Layer:
    save_file(tensors, path)
    return Layer(number, read_entries(path))


def grown(lower, upper, sizes: Sizes, folder) -> dict[str, torch.Tensor]:
    layers = (as_layer(t, folder / f"{i}.safetensors", i) for i, t in enumerate((lower, upper)))
    return dict(new_layer(*layers, sizes))


def error(found, wanted, kinds) -> float:
    """‖found − wanted‖ over ‖wanted‖, over the tensors of these kinds."""
    names = [name for name in wanted if any(kind in name for kind in kinds)]
    assert names
    off, size = (
        torch.cat([t.flatten() for t in ts]).norm()
        for ts in ([found[name] - wanted[name] for name in names], [wanted[name] for name in names])
    )
    return float(off / size)


PARTS = {
    "heads": ("q_proj", "k_proj", "v_proj"),
    "neurons": ("mlp.gate_proj", "mlp.up_proj", "shared_expert.gate_proj", "shared_expert.up_proj"),
    "experts": (".experts.", "mlp.gate.weight"),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("sizes", "part"),
    [(DENSE, "heads"), (DENSE, "neurons"), (MIXTURE, "heads"), (MIXTURE, "neurons"), (MIXTURE, "experts")],
)
def test_transport_undoes_disorder_and_an_average_does_not(tmp_path, sizes, part, noise, seed):
    """The lower layer is the upper one in disorder, so the new layer should be the upper one."""
    upper = random_layer(sizes)
    lower = in_disorder(upper, sizes, seed, noise)
    found = grown(lower, upper, sizes, tmp_path)
    wanted = {name: upper[name] for name in found}
    average = {name: (lower[name] + upper[name]) / 2 for name in found}
    ours = error(found, wanted, PARTS[part])
    assert ours < noise + 1e-3
    assert error(average, wanted, PARTS[part]) > 0.3
    assert error(lower, wanted, PARTS[part]) > 0.6


def test_the_disorder_leaves_what_a_layer_computes_as_it_was():
    """Or the test above would ask for something else than the order. Of the MLP of experts, with its router."""
    upper = random_layer(MIXTURE)
    lower = in_disorder(upper, MIXTURE, 0)
    x = torch.randn(7, MIXTURE.hidden, generator=torch.Generator().manual_seed(1))

    def mixture(layer):
        weights = (x @ layer["mlp.gate.weight"].T).softmax(-1)
        out = 0
        for e in range(MIXTURE.experts):
            gate, up, down = (layer[f"mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            out = out + weights[:, e, None] * ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return out

    torch.testing.assert_close(mixture(lower), mixture(upper), rtol=1e-4, atol=1e-5)
    assert not torch.equal(lower["mlp.gate.weight"], upper["mlp.gate.weight"])


@pytest.mark.parametrize("sizes", [DENSE, MIXTURE])
def test_every_tensor_is_made_once_and_norms_are_averaged(tmp_path, sizes):
    lower, upper = random_layer(sizes, 1), random_layer(sizes, 2)
    layers = (as_layer(t, tmp_path / f"{i}.safetensors", i) for i, t in enumerate((lower, upper)))
    made = [name for name, _ in new_layer(*layers, sizes)]
    assert sorted([*made, *zeroed(upper)]) == sorted(sizes.shapes())
    found = grown(lower, upper, sizes, tmp_path)
    for name in AVERAGED:
        if name in upper:
            torch.testing.assert_close(found[name], (lower[name] + upper[name]) / 2)


def test_of_two_layers_that_are_one_the_new_one_is_that(tmp_path):
    upper = random_layer(MIXTURE)
    for name, tensor in grown(upper, upper, MIXTURE, tmp_path).items():
        torch.testing.assert_close(tensor, upper[name], rtol=1e-3, atol=1e-4)


def test_a_plans_columns_sum_to_one():
    """Used as POT gives it, a plan of n units makes them n times smaller: a fault of the public code."""
    cost = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    found = transport.plan(cost.clone())
    torch.testing.assert_close(found.sum(0), torch.ones(40))
    torch.testing.assert_close(transport.transported(found, torch.ones(40, 3)), torch.ones(40, 3))
    assert (transport.plan(torch.zeros(4, 4)) == 0.25).all()  # nothing tells them apart


def test_heads_move_whole_and_with_their_group():
    """A row stays at its place within its head, where RoPE turns it with its partner."""
    heads, groups, dim = 12, 4, 8
    generator = torch.Generator().manual_seed(0)
    queries, kv = (torch.rand(n, n, generator=generator) for n in (heads, groups))
    of_queries, of_kv = transport.head_plan(queries, kv)
    place = torch.arange(dim).repeat(heads)[:, None].float().expand(-1, 5)
    torch.testing.assert_close(transport.transported(of_queries, place), place)
    # As much of a key-value head's queries goes with it as of itself.
    blocks = of_queries.view(groups, heads // groups, groups, heads // groups)
    torch.testing.assert_close(blocks.sum(1), of_kv[:, :, None].expand(-1, -1, heads // groups))


def test_experts_are_permuted_whole():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(9, 9, generator=generator)
    assert sorted(transport.permutation(cost.clone()).tolist()) == list(range(9))
    order = torch.randperm(9, generator=generator)
    cost = torch.ones(9, 9)
    cost[order, torch.arange(9)] = 0
    assert transport.permutation(cost).equal(order)


def test_a_plan_tells_units_apart_where_all_are_far_from_each_other():
    """Rows of thousands of numbers: distances differ by a few per cent, and the nearest must not drown in the rest."""
    cost = 100 + torch.rand(50, 50, generator=torch.Generator().manual_seed(0))
    found = transport.plan(cost)
    assert found.max(0).values.median() > 5 / 50
