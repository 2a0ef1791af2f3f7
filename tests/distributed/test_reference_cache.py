"""The cache of reference log-probs in real runs: the same losses, fewer forwards, and no rank left alone."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_bvpo.data.reference_cache import ReferenceShards
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.distributed.test_parity import LAYOUTS

HOOK = "tests.distributed.recorders:record_cached"
LOSSES = ("loss", "loss/trace", "loss/empty", "rewards/margins", "empty/rewards/margins", "grad_norm")


LORA, FULL = "--tuner_type lora --lora_rank 4 --lora_dropout 0.1", "--tuner_type full"


def argv(workshop, layout: str, cache, more: str = "", *, model=None, rows=None, tuner=LORA) -> list[str]:
    run = (
        f"--model {model or workshop.moe} --model_type qwen3_moe --template qwen3_thinking "
        f"--dataset {rows or workshop.train} {tuner} --lr 1e-3 "
        "--lr_decay_style constant --adam_eps 1e-4 --micro_batch_size 1 --global_batch_size 8 --train_iters 4 "
        "--logging_steps 1 --max_length 512 --bvpo_alpha 0.5"
    )
    kept = ["--bvpo_ref_cache", str(cache)] if cache else []
    return [*run.split(), *kept, *CPU_FLAGS, *LAYOUTS[layout][1].split(), *more.split()]


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference_cache")
    cache = {name: folder / "caches" / name for name in ("kept", "full", "refs", "late", "vpp", "cp", "four")}
    model = shutil.copytree(workshop.moe, folder / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if "q_proj" in name)
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in workshop.train.read_text().splitlines()]
    rows[3]["messages"][0]["content"] += " Please."
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cell(name: str, layout: str, where, more: str = "", *, model=None, rows=None, tuner=LORA, **hook_args) -> Cell:
        command = argv(workshop, layout, where, more, model=model, rows=rows, tuner=tuner)
        return Cell(name, command, hook=HOOK, hook_args=hook_args)

    cells = [
        cell("none", "one-rank", None),
        cell("cold", "one-rank", cache["kept"]),
        cell("warm", "one-rank", cache["kept"]),
        cell("auto", "one-rank", cache["kept"], "--bvpo_alpha auto"),
        cell("other-weight", "one-rank", cache["kept"], model=model),
        cell("other-row", "one-rank", cache["kept"], rows=folder / "rows.jsonl"),
        cell("full-none", "one-rank", None, tuner=FULL),
        cell("full-cold", "one-rank", cache["full"], tuner=FULL),
        cell("full-warm", "one-rank", cache["full"], tuner=FULL),
        cell("refs", "one-rank", cache["refs"], f"--bvpo_refs_only true --val_dataset {workshop.held_out}"),
        cell("after-refs", "one-rank", cache["refs"], f"--val_dataset {workshop.held_out} --eval_steps 4"),
    ]
    cells.append(
        cell("late", "one-rank", cache["late"], "--save_steps 3 --merge_lora false", flush_steps=32, save=True)
    )
    found = run_cells(1, cells, folder)
    two = [
        cell("ep2-none", "ep2", None),
        cell("one-misses", "ep2", cache["kept"], forget_on_rank=1),
        cell("vpp-cold", "pp2-vpp2", cache["vpp"]),
        cell("vpp-half", "pp2-vpp2", cache["vpp"], forget_on_rank=0),
        cell("cp-cold", "cp2", cache["cp"]),
    ]
    found.update(run_cells(2, two, folder))
    found.update(run_cells(4, [cell("four-cold", "tp2-pp2-ep2", cache["four"])], folder))
    found.update(run_cells(1, [cell(f"read-{name}", "one-rank", cache[name]) for name in ("cp", "four")], folder))
    return found


def hits(result) -> list[float]:
    return result.steps("ref_cache/hits")


@pytest.mark.parametrize("name, base", [("cold", "none"), ("warm", "none"), ("full-warm", "full-none")])
def test_losses_are_bit_identical(runs, name, base):
    for key in LOSSES:
        assert len(runs[base].steps(key)) == 4
        assert runs[name].steps(key) == runs[base].steps(key), key


def test_the_second_epoch_and_the_second_run_read_it(runs):
    for tuner in ("", "full-"):
        assert hits(runs[f"{tuner}cold"]) == [0, 0, 1, 1]  # 16 rows are two steps
        assert hits(runs[f"{tuner}warm"]) == [1, 1, 1, 1]


def test_no_reference_forward_is_left(runs):
    """Counted where it happens, not where it is logged."""
    assert runs["none"].recorded["reference_forwards"] == 32  # a row a micro-batch, two epochs
    assert runs["cold"].recorded["reference_forwards"] == 16
    for name in ("warm", "full-warm", "after-refs", "read-four", "auto"):
        assert runs[name].recorded["reference_forwards"] == 0, name


def test_probe_steps_read_it_too(runs):
    assert hits(runs["auto"]) == [1, 1, 1, 1]


def test_another_weight_finds_nothing(runs):
    assert hits(runs["other-weight"])[:2] == [0, 0]


def test_another_row_misses_alone(runs):
    assert runs["other-row"].recorded["reference_forwards"] == 1


def test_refs_alone_fill_it(runs):
    assert runs["refs"].recorded["reference_forwards"] == 24  # 16 rows; 5 held-out ones fill a batch of 8
    assert not runs["refs"].steps("loss/trace")
    assert hits(runs["after-refs"]) == [1, 1, 1, 1]
    held_out = [line for line in runs["after-refs"].log if "eval_loss" in line]
    assert len(held_out) == 1
    for key in LOSSES:
        assert runs["after-refs"].steps(key) == runs["none"].steps(key), key


def test_a_miss_on_one_rank_is_a_miss_on_all(runs):
    """Rank 1 has forgotten one pair: with EP 2 both ranks run that micro-batch's reference, and none waits."""
    assert runs["one-misses"].recorded["reference_forwards"] == 1
    assert hits(runs["one-misses"]) == [0.75, 1, 1, 1]  # of four micro-batches a rank


def test_values_of_another_layout_agree(runs):
    """Written by one rank, read by two with experts apart."""
    for key in LOSSES:
        assert runs["one-misses"].steps(key) == pytest.approx(runs["ep2-none"].steps(key), rel=1e-5, abs=1e-5), key


def test_hits_and_misses_may_alternate_in_a_pipeline(runs):
    """Micro-batches with and without a reference forward are not of one shape."""
    assert hits(runs["vpp-cold"]) == [0, 0, 1, 1] and hits(runs["vpp-half"]) == [0.875, 1, 1, 1]
    for key in LOSSES:
        assert runs["vpp-half"].steps(key) == runs["vpp-cold"].steps(key), key


@pytest.mark.parametrize("name", ["cp", "four"])
def test_any_layout_writes_it(runs, name):
    """Written under CP 2 and under TP 2, PP 2, EP 2; read by one rank."""
    assert hits(runs[f"{name}-cold"]) == [0, 0, 1, 1] and hits(runs[f"read-{name}"]) == [1, 1, 1, 1]
    for key in LOSSES:
        assert runs[f"read-{name}"].steps(key) == pytest.approx(runs["none"].steps(key), rel=1e-5, abs=1e-5), key


def test_a_save_and_the_end_write_what_is_new(runs):
    """32 steps would be the next flush. At the save after step 3 both epochs' rows have been seen."""
    assert runs["late"].recorded["shards_at_save"][0] == 1
    table = ReferenceShards(next((runs["late"].folder.parent / "caches" / "late").glob("[0-9a-f]*")), {}).read()
    assert len(table) == 32
