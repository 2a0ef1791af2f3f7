"""A model grown by `bvpo expand`, in the layouts of real runs: it is the old one, and only its new layers are trained,
or they whole and adapters on the others.

The new layers add exact zeros, so that equal means equal to the last bit.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from megatron_bvpo.export.sources import find_source
from megatron_bvpo.export.tensor_files import ModelFiles, read_rows
from megatron_bvpo.rehearsal.tiny_models import make_tiny_model
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.distributed.hf_oracle import load_model, mean_logps
from tests.distributed.hf_oracle import read_rows as rows_of
from tests.distributed.test_parity import LAYOUTS
from tests.unit.grown_models import expand, logits

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")

HOOK = "tests.distributed.growth_recorder:record_growth"
ONLY = "--tuner_type full --bvpo_new_layers_only true"
# The new layers whole, and adapters on the others.
BESIDE = "--tuner_type lora --lora_rank 4 --lora_dropout 0 --bvpo_new_layers_only true --merge_lora true"
# All new layers on the second stage: the first has nothing to train.
UNEVEN = "--decoder_first_pipeline_num_layers 2 --decoder_last_pipeline_num_layers 4"
GROWN = {
    "tp2": ("moe", "tp2", ONLY),
    "pp2": ("moe", "pp2", ONLY),
    "idle-stage": ("moe", "pp2", f"{ONLY} {UNEVEN} --bvpo_alpha auto"),
    "ep2": ("moe", "ep2", f"{ONLY} --recompute_granularity full --recompute_method uniform --recompute_num_layers 1"),
    "dense": ("dense", "tp2", ONLY),
    "adapters": ("moe", "ep2", "--tuner_type lora --lora_rank 4 --lora_dropout 0"),
    "beside": ("moe", "ep2", f"{BESIDE} --target_modules all-linear all-router --bvpo_alpha auto"),
}
FULL = [name for name in GROWN if name not in ("adapters", "beside")]
NEW = (2, 4)


def cell(workshop, name: str, model, kind: str, layout: str, more: str, save: bool) -> Cell:
    run = (
        f"--model {model} --model_type {'qwen3_moe' if kind == 'moe' else 'qwen3'} --template qwen3_thinking "
        f"--dataset {workshop.train} --lr 1e-2 --lr_decay_style constant --micro_batch_size 1 --global_batch_size 8 "
        "--train_iters 2 --logging_steps 1 --max_length 512 --bvpo_alpha 0.5 --eval_iters -1 --merge_lora false"
    )
    argv = [*run.split(), *CPU_FLAGS, *LAYOUTS[layout][1].split(), *more.split()]
    return Cell(name, argv, hook=HOOK, hook_args={"save": save})


@pytest.fixture(scope="module")
def models(workshop, tmp_path_factory):
    """Kind → (old, grown)."""
    folder = tmp_path_factory.mktemp("grown")
    found = {kind: (getattr(workshop, kind), folder / kind) for kind in ("moe", "dense")}
    for old, grown in found.values():
        assert expand(old, grown) == 0
    return found


@pytest.fixture(scope="module")
def runs(workshop, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    cache = f"--bvpo_ref_cache {folder / 'cache'}"
    cells = [
        cell(workshop, f"old-{kind}-{layout}", models[kind][0], kind, layout, "--tuner_type full", False)
        for kind, layout in (("moe", "tp2"), ("moe", "pp2"), ("moe", "ep2"), ("dense", "tp2"))
    ]
    for name, (kind, layout, more) in GROWN.items():
        more += f" --val_dataset {workshop.held_out}" if name in ("idle-stage", "dense", "beside") else ""
        more += f" {cache}" if name == "ep2" else ""
        cells.append(cell(workshop, name, models[kind][1], kind, layout, more, name != "adapters"))
    cells.append(cell(workshop, "warm", models["moe"][1], "moe", "ep2", f"{GROWN['ep2'][2]} {cache}", False))
    planted = cell(workshop, "planted", models["moe"][1], "moe", "pp2", GROWN["idle-stage"][2], False)
    planted.hook, planted.hook_args = (
        "tests.distributed.canary_recorder:plant_in_reference",
        {"faults": ["adapters_on"]},
    )
    planted.canaries = True
    found = run_cells(2, [*cells, planted], folder)
    trained = found["ep2"].folder / "checkpoint-2"
    again = cell(workshop, "again", trained, "moe", "ep2", f"{ONLY} {cache}", False)
    return found | run_cells(2, [again], folder)


def old_of(runs, name: str):
    kind, layout, _ = GROWN[name]
    return runs[f"old-{kind}-{layout}"]


def same(found: torch.Tensor, expected: torch.Tensor, name: str) -> bool:
    """To the last bit; a probe packs other rows together than the old model's run, and those round otherwise."""
    probes = "--bvpo_alpha auto" in GROWN[name][2]
    return torch.allclose(found, expected, rtol=1e-6) if probes else torch.equal(found, expected)


@pytest.mark.parametrize("name", GROWN)
def test_the_grown_model_is_the_old_one_to_the_last_bit(runs, name):
    """In the first step, as the policy and as the reference; the old model's reference is the old model."""
    old, new = old_of(runs, name).recorded["reference"], runs[name].recorded
    assert old.keys() == new["reference"].keys() and len(old) == 32  # 16 rows, two streams
    first = 0
    for key, ((_, expected), *_) in old.items():
        assert all(same(found, expected, name) for _, found in new["reference"][key]), key
        (when, policy), *_ = new["policy"][key]
        if when == 0:
            first += 1
            assert torch.equal(policy, new["reference"][key][0][1]), key
        else:
            assert not same(policy, expected, name), key
    assert first == 16


@pytest.mark.parametrize("name", FULL)
def test_new_layers_alone_are_trained_and_no_second_model_is_loaded(runs, name):
    trained = runs[name].recorded["trained"]
    assert set().union(*trained) == set(NEW)
    if name == "idle-stage":
        assert trained == [set(), set(NEW)]
    assert runs[name].recorded["ref_models"] == 0


@pytest.mark.parametrize("name", FULL)
def test_two_steps_change_new_layers_only(runs, models, name):
    """In what is saved, which is whole."""
    before = ModelFiles(models[GROWN[name][0]][1], "MODEL").entries
    after = ModelFiles(runs[name].folder / "checkpoint-2", "MODEL").entries
    assert after.keys() == before.keys()
    moved = {key for key in before if not torch.equal(whole(after[key]), whole(before[key]))}
    new = {key for key in before if key.startswith(tuple(f"model.layers.{n}." for n in NEW))}
    assert moved <= new
    for n in NEW:
        # In the first step what leads back alone has gradients; in the second all that is in front of it, too.
        parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        still = {part for part in parts if not any(f"layers.{n}." in key and f".{part}." in key for key in moved)}
        assert not still


def whole(entry) -> torch.Tensor:
    return read_rows(entry, 0, entry.rows)


def whole_layer_and_adapters(moved, number: int) -> tuple[set[str], set[str]]:
    """Names of a layer's own parameters that have changed, and of its adapters'."""
    names = {name for layer, name in moved if layer == number}
    adapters = {name for name in names if ".lora_" in name}
    return names - adapters, adapters


def test_new_layers_whole_and_adapters_on_the_others(runs):
    """Two steps change all of a new layer, which has no adapter, and every factor of the others, and nothing else."""
    moved, trained = runs["beside"].recorded["moved"], runs["beside"].recorded["trained"]
    assert set().union(*trained) == set(range(6)) and runs["beside"].recorded["ref_models"] == 0
    assert {layer for layer, _ in moved} == set(range(6))  # nothing outside of layers
    modules = [f"self_attention.linear_{m}" for m in ("qkv", "proj")] + ["mlp.router"]
    modules += [f"mlp.experts.linear_{m}" for m in ("fc1", "fc2")]
    for number in range(6):
        own, adapters = whole_layer_and_adapters(moved, number)
        assert bool(own) is (number in NEW) and bool(adapters) is (number not in NEW)
        parts = [".weight"] if number in NEW else [".lora_A.default.weight", ".lora_B.default.weight"]
        for start in (f"{module}{part}" for module in modules for part in parts):
            assert any(name.startswith(start) for name in own | adapters), (number, start)


def test_no_adapter_is_saved_without_the_layers_it_goes_with(runs):
    """The merged model alone is for others; none of its layers is new any more, because the old ones have moved."""
    saved = runs["beside"].folder / "checkpoint-2"
    assert not [*saved.rglob("adapter_*")] and not [*saved.glob("*.safetensors")]
    # Megatron's files have both: a start from them (--no_load_optim) has no optimizer that would give the layers back.
    listed = (saved / "iter_0000002/.metadata").read_bytes()
    names = re.findall(rb"[^.]decoder\.layers\.(\d+)\.([\w.]+\.weight)", listed)
    assert {int(n) for n, name in names if b".lora_" not in name} == set(NEW)
    assert {int(n) for n, name in names if b".lora_" in name} == set(range(6)) - set(NEW)
    merged = saved.with_name("checkpoint-2-merged")
    assert "bvpo_new_layers" not in json.loads((merged / "config.json").read_text())
    assert not (merged / "expansion.json").exists()
    assert find_source(str(saved)) == find_source(str(merged))


@pytest.mark.parametrize("name", ["idle-stage", "dense", "beside"])
def test_the_saved_model_in_transformers(runs, workshop, models, name):
    """It gives the log-probs of the run's last evaluation."""
    saved = runs[name].folder / ("checkpoint-2-merged" if name == "beside" else "checkpoint-2")
    (line,) = [line for line in runs[name].log if "eval_loss" in line]
    found = mean_logps(load_model(saved), saved, rows_of(workshop.held_out))
    for key, value in found.items():
        assert line[f"eval_{key}"] == pytest.approx(value, rel=1e-5), key
    assert not torch.equal(logits(saved), logits(models[GROWN[name][0]][0]))


@pytest.mark.parametrize("name", ["idle-stage", "dense"])
def test_the_saved_model_says_which_of_its_layers_are_new(runs, name):
    saved = runs[name].folder / "checkpoint-2"
    assert json.loads((saved / "config.json").read_text())["bvpo_new_layers"] == list(NEW)
    assert json.loads((saved / "expansion.json").read_text())["bvpo_new_layers"] == list(NEW)


def test_the_cache_serves_the_reference(runs):
    """A second run reads all of it, and has the first one's losses to the last bit."""
    cold, warm = runs["ep2"], runs["warm"]
    assert cold.steps("ref_cache/hits") == [0, 0] and warm.steps("ref_cache/hits") == [1, 1]
    for key in ("loss", "rewards/margins", "empty/rewards/margins", "grad_norm"):
        assert warm.steps(key) == cold.steps(key), key


def test_trained_new_layers_are_no_part_of_the_reference(runs):
    """A run that begins with the trained model: its reference is the old model all the same, and its policy is not."""
    old, again = runs["old-moe-ep2"].recorded["reference"], runs["again"].recorded
    assert runs["again"].steps("ref_cache/hits") == [0, 0]  # other files, so another reference for all that is known
    for key, ((_, expected), *_) in old.items():
        assert all(torch.equal(found, expected) for _, found in again["reference"][key])
        assert not torch.equal(again["policy"][key][0][1], expected)


def test_new_layers_that_are_left_on_in_the_reference_are_told(runs):
    """By the canaries, which are silent in all runs above: while nothing is trained, no number shows it."""
    told = runs["planted"].recorded["told"]
    assert told[""] == []
    assert len(told["adapters_on"]) == 1 and "the reference moves with the policy's weights" in told["adapters_on"][0]


@pytest.fixture(scope="module")
def chunks(workshop, tmp_path_factory):
    """PP2 × VPP2 with tied embeddings: two of four chunks have nothing to train. A whole run, and its second half."""
    folder = tmp_path_factory.mktemp("chunks")
    sizes = dict(num_layers=6, tie_word_embeddings=True)
    old = make_tiny_model(folder / "tied", kind="dense", vocab="trimmed", seed=0, **sizes)
    assert expand(old, folder / "grown", "3,4") == 0
    more = f"{ONLY} --train_iters 4 --save_steps 2 --overlap_grad_reduce true --bvpo_ref_cache {folder / 'cache'}"
    back = f"{more} --finetune false --mcore_model {folder / 'whole' / 'checkpoint-2'}"
    beside = more.replace(ONLY, BESIDE)
    back_beside = f"{beside} --finetune false --mcore_adapter {folder / 'beside' / 'checkpoint-2'}"
    found = [
        cell(workshop, "old", old, "dense", "pp2", "--tuner_type full", False),
        cell(workshop, "whole", folder / "grown", "dense", "pp2-vpp2", more, True),
        cell(workshop, "resumed", folder / "grown", "dense", "pp2-vpp2", back, True),
        cell(workshop, "beside", folder / "grown", "dense", "pp2-vpp2", beside, True),
        cell(workshop, "beside-resumed", folder / "grown", "dense", "pp2-vpp2", back_beside, True),
    ]
    return run_cells(2, found, folder)


def test_virtual_stages_without_a_new_layer(chunks):
    """The reference is the old model, and the new layers alone are trained, each on a rank's second chunk."""
    old, whole = chunks["old"].recorded["reference"], chunks["whole"].recorded
    for key, ((_, expected), *_) in old.items():
        assert all(torch.equal(found, expected) for _, found in whole["reference"][key]), key
    assert whole["trained"] == [{4}, {6}] and whole["ref_models"] == 0
    assert chunks["beside"].recorded["trained"] == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    for number in range(8):
        own, adapters = whole_layer_and_adapters(chunks["beside"].recorded["moved"], number)
        assert bool(own) is (number in (4, 6)) and bool(adapters) is not bool(own)


@pytest.mark.parametrize(
    ("name", "again", "saved"),
    [("whole", "resumed", "checkpoint-4"), ("beside", "beside-resumed", "checkpoint-4-merged")],
)
def test_a_resumed_run_goes_on_as_the_whole_one(chunks, name, again, saved):
    """To the last bit, and with the same reference: the cache serves it."""
    unbroken, resumed = chunks[name], chunks[again]
    # With adapters beside the new layers the reference is the same one.
    assert unbroken.steps("ref_cache/hits") == ([0, 0, 1, 1] if name == "whole" else [1, 1, 1, 1])
    assert resumed.steps("ref_cache/hits") == [1, 1]
    for key in ("loss", "rewards/margins", "grad_norm"):
        assert resumed.steps(key) == unbroken.steps(key)[2:], key
    last, again = (ModelFiles(run.folder / saved, "MODEL").entries for run in (unbroken, resumed))
    assert last.keys() == again.keys() and all(torch.equal(whole(again[key]), whole(last[key])) for key in last)
