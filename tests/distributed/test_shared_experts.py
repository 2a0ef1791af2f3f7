"""Shared experts whose transfers overlap with the routed experts', under tensor parallelism: one rank's numbers.

`--moe_shared_expert_overlap` takes the collectives out of the shared expert's layers, and the token dispatcher has them
around these: what an adapter adds there must be a part of a sum as the layer's own output is (Megatron-Bridge 5634 has
adapters that are counted TP times). A CPU has no side streams, so nothing is shown of their order on a GPU.

CI runs the adapters under TP2; `pytest --whole-matrix` adds full tuning, EP2, and adapters as a run begins with them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.cells import Cell, CellResult, run_beside, run_cells
from tests.distributed.recorders import record_first_step
from tests.distributed.test_parity import TOLERANCE, argv, errors

OVERLAP = "--moe_shared_expert_overlap true"
# name: (layout, tuner)
CELLS = {
    "tp2-lora": ("tp2", "lora"),
    "tp2-lora-start": ("tp2", "lora"),
    "tp2-ep2-lora": ("tp2-ep2", "lora"),
    "tp2-full": ("tp2", "full"),
    "tp2-ep2-full": ("tp2-ep2", "full"),
}
IN_CI = ("tp2-lora",)


def with_shared_experts(source: Path, target: Path) -> Path:
    """A Qwen2 mixture with the tokenizer and the sizes of `source`: every layer has a gated shared expert."""
    import transformers

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "rehearsal_model.json"))
    same = json.loads((source / "config.json").read_text())
    names = "vocab_size num_hidden_layers hidden_size num_attention_heads num_key_value_heads num_experts_per_tok "
    names += (
        "moe_intermediate_size intermediate_size max_position_embeddings rope_parameters eos_token_id pad_token_id "
    )
    names += "initializer_range norm_topk_prob router_aux_loss_coef"
    config = transformers.Qwen2MoeConfig(
        **{name: same[name] for name in names.split()},
        num_experts=same["num_local_experts"],
        shared_expert_intermediate_size=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen2MoeForCausalLM(config).to(torch.float32).save_pretrained(target)
    return target


def record_overlap(base, folder, **more):
    """As `record_first_step`; `overlapped` are the calls that gather the shared experts' input aside."""
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    class Recorder(record_first_step(base, folder, **more)):
        def setup_model_training(self):
            super().setup_model_training()
            self.recorded["overlapped"] = 0
            aside, trainer = SharedExpertMLP.pre_forward_comm, self

            def counted(module, *args, **kwargs):
                trainer.recorded["overlapped"] += 1
                return aside(module, *args, **kwargs)

            for model in self.unwrapped_models:
                for module in model.modules():
                    if isinstance(module, SharedExpertMLP):
                        module.pre_forward_comm = counted.__get__(module)

    return Recorder


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", CELLS if metafunc.config.getoption("--whole-matrix") else IN_CI)


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request) -> dict[str, CellResult]:
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("shared-experts")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = with_shared_experts(make_tiny_model(folder / "moe", **heads), folder / "shared")
    names = CELLS if request.config.getoption("--whole-matrix") else IN_CI

    def cell(name: str, layout: str, tuner: str, more: str = "") -> Cell:
        start = {"lora_scale": 0, "spread_seeds": True} if name.endswith("-start") else {}
        flags = argv(workshop, layout, tuner, "free", f"--model {model} --model_type qwen2_moe {more}")
        return Cell(name, flags, hook=f"{__name__}:record_overlap", hook_args=start)

    alone = {baseline_of(name): CELLS[name][1] for name in names}
    one = [cell(name, "one-rank", tuner) for name, tuner in alone.items()]
    results = run_beside(folder, one[::2], one[1::2])
    return results | run_cells(2, [cell(name, *CELLS[name], OVERLAP) for name in names], folder)


def baseline_of(name: str) -> str:
    return f"one-rank-{CELLS[name][1]}{'-start' if name.endswith('-start') else ''}"


def test_agrees_with_one_rank_without_the_overlap(runs, cell):
    ours, base = runs[cell], runs[baseline_of(cell)]
    assert ours.recorded["overlapped"] and not base.recorded["overlapped"]
    for key, error in errors(ours, base).items():
        assert error <= TOLERANCE, f"{cell}: {key} differs by {error:.2e} from one rank's"


def test_full_gradients_agree_with_one_rank(runs, cell):
    ours, base = (runs[name].recorded["gradients"][0] for name in (cell, baseline_of(cell)))
    assert ours.keys() == base.keys()
    shared = [name for name in base if ".shared_expert." in name]
    assert len(shared) == 4 * (6 if "lora" in cell else 3)
    assert all(base[name].any() for name in shared if "start" not in cell or "lora_B" in name)
    scale = max(g.norm().item() for g in base.values())
    for name, gradient in base.items():
        difference = (ours[name] - gradient).norm().item()
        assert difference <= TOLERANCE * max(gradient.norm().item(), 1e-2 * scale), name
