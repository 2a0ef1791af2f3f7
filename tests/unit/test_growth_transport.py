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


def uneven(layer: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """As trained layers are: rows of all sizes, and one neuron, one head and one expert that are ten times as large."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, tensor in layer.items():
        size = torch.exp(0.5 * torch.randn(len(tensor), generator=generator))
        found[name] = tensor * (size[:, None] if tensor.dim() == 2 else size)
    for name in ("q", "k", "v"):
        found[f"self_attn.{name}_proj.weight"][-sizes.head_dim :] *= 10
    for mlp, n in sizes.mlps():
        for name in ("gate", "up"):
            found[f"{mlp}.{name}_proj.weight"][n // 3] *= 10
            found[f"{mlp}.{name}_proj.weight"] *= 10 if ".experts.3" in mlp else 1
    return found


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


@pytest.mark.parametrize("made", [lambda layer, sizes: layer, uneven], ids=["even", "uneven"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("sizes", "part"),
    [(DENSE, "heads"), (DENSE, "neurons"), (MIXTURE, "heads"), (MIXTURE, "neurons"), (MIXTURE, "experts")],
)
def test_transport_undoes_disorder_and_an_average_does_not(tmp_path, sizes, part, noise, seed, made):
    """The lower layer is the upper one in disorder, so the new layer should be the upper one."""
    upper = made(random_layer(sizes), sizes)
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
    found = transport.plan(torch.rand(40, 40, generator=torch.Generator().manual_seed(0)))
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
    alike = torch.rand(9, 9, generator=generator)
    assert sorted(transport.permutation(alike).tolist()) == list(range(9))
    order = torch.randperm(9, generator=generator)
    alike = torch.zeros(9, 9)
    alike[order, torch.arange(9)] = 1
    assert transport.permutation(alike).equal(order)


def test_a_plan_tells_units_apart_where_all_are_far_from_each_other():
    """Rows of thousands of numbers: cosines differ by a few per cent, and the nearest must not drown in the rest."""
    alike = 0.01 * torch.rand(50, 50, generator=torch.Generator().manual_seed(0))
    assert transport.plan(alike).max(0).values.median() > 5 / 50


# name: (σ of the logarithm of the units' sizes, the loudest unit, noise, share of units that it spares)
UNITS = {
    "of one size": (0, 1, 0, 0),
    "of sizes like .3": (0.3, 1, 0, 0),
    "of sizes like .5": (0.5, 1, 0, 0),
    "one loud": (0, 10, 0, 0),
    "of sizes like .5, one loud": (0.5, 10, 0.3, 0),
    "all far, but for one pair": (0, 1, 3, 1 / 768),
    "half of them far": (0, 1, 3, 1 / 2),
}


@pytest.mark.parametrize("name", UNITS)
def test_no_unit_drowns_another(name):
    """Of so many neurons a plan in which one is loud, or like another, made all others their mean."""
    spread, loud, noise, spared = UNITS[name]
    n, d = 768, 512
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(spread * torch.randn(n, 1, generator=generator))
    size[n // 3] *= loud
    upper = size * torch.randn(n, d, generator=generator)
    order = torch.randperm(n, generator=generator)
    off = noise * size * torch.randn(n, d, generator=generator)
    off[: round(spared * n)] = 0
    lower = torch.empty_like(upper)
    lower[order] = upper + off
    found = transport.neuron_plan(iter([(lower, upper)]))
    right = found[order, torch.arange(n)]
    assert right.median() > 0.99 and right.min() > 0.9


def test_units_of_zeros_are_like_any_other():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rows[2:4] = 0
    found = transport.neuron_plan(iter([(rows.clone(), rows)]))
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(0), torch.ones(6))
