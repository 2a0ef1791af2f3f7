"""Where LoRA's A begins: one draw for the whole layer, cut for each rank, whatever the layout calls the layer."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from megatron_bvpo.host.lora_start import draw_lora_a

RANK, WIDTH = 4, 32


def groups(tp_rank=0, tp_size=1, ep_rank=0):
    return SimpleNamespace(tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank)


def lora(inputs=WIDTH, **attributes) -> Linear:
    # From 0.19 on a layer must have its settings as a config, too.
    new = "config" in inspect.signature(Linear.__init__).parameters
    config = {"config": LoraConfig(r=RANK)} if new else {}
    layer = Linear(nn.Linear(inputs, 8, bias=False), "default", r=RANK, **config)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Factor(nn.Module):
    """The A of grouped experts: a weight for each."""

    def __init__(self, count: int):
        super().__init__()
        self.num_gemms = count
        for i in range(count):
            setattr(self, f"weight{i}", nn.Parameter(torch.zeros(RANK, WIDTH)))


def stage(first: int, layers: int, experts: int = 4, **row) -> nn.Module:
    """A pipeline stage: layers that count from 0 here and know their number in the model."""
    model = nn.Module()
    model.layers = nn.ModuleList()
    for i in range(layers):
        layer = nn.Module()
        layer.layer_number = first + i
        layer.proj = lora(**row)
        layer.qkv = lora()
        layer.experts = lora(is_parallel_a=False, is_expert=True, tp_size=1)
        layer.experts.lora_A["default"] = Factor(experts)
        layer.local_experts = nn.ModuleList(nn.ModuleDict({"fc": lora()}) for _ in range(experts))
        model.layers.append(layer)
    return model


def drawn(model: nn.Module, seed=7, **place) -> dict[str, torch.Tensor]:
    """A by its name on this rank; the default generator is another one on every call."""
    torch.seed()
    draw_lora_a(model, seed, groups(**place))
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return drawn(stage(1, 4))


def test_it_is_pefts_own_distribution(whole):
    values = torch.cat([a.flatten() for a in whole.values()])
    bound = WIDTH**-0.5
    assert values.abs().max() <= bound and values.abs().max() > 0.99 * bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02) and abs(values.mean()) < 0.03 * bound
    assert len({a.flatten()[0].item() for a in whole.values()}) == len(whole)


def test_the_default_generator_is_not_asked(whole):
    before = torch.get_rng_state()
    draw_lora_a(stage_ := stage(1, 4), 7, groups())
    made = torch.get_rng_state()
    draw_lora_a(stage_, 7, groups())
    assert torch.equal(torch.get_rng_state(), made) and not torch.equal(before, made)  # making the layers draws


def test_another_seed_is_another_start(whole):
    other = drawn(stage(1, 4), seed=8)
    assert all(not torch.equal(other[name], a) for name, a in whole.items())


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_of_a_row_parallel_layer_are_cut_from_the_whole(whole, tp):
    row = dict(inputs=WIDTH // tp, is_parallel_a=True, is_expert=False, tp_size=tp)
    ranks = [drawn(stage(1, 4, **row), tp_rank=rank, tp_size=tp) for rank in range(tp)]
    for name, a in whole.items():
        if ".proj." in name:
            assert torch.equal(torch.cat([rank[name] for rank in ranks], dim=1), a)
        else:
            assert all(torch.equal(rank[name], a) for rank in ranks)


def test_a_pipeline_stage_has_its_layers_of_the_whole(whole):
    second = drawn(stage(3, 2))
    for name, a in second.items():
        assert torch.equal(a, whole[name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")])


def test_an_expert_rank_has_its_experts_of_the_whole(whole):
    second = drawn(stage(1, 4, experts=2), ep_rank=1)
    for name, a in second.items():
        for i in (1, 0):
            name = name.replace(f"weight{i}", f"weight{i + 2}").replace(
                f"local_experts.{i}.", f"local_experts.{i + 2}."
            )
        assert torch.equal(a, whole[name]), name


def test_a_16_bit_model_has_the_same_numbers_rounded(whole):
    half = drawn(stage(1, 4).to(torch.bfloat16))
    assert all(torch.equal(a, whole[name].to(torch.bfloat16)) for name, a in half.items())
