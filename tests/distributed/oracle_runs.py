"""The one-rank runs that the oracle tests share, and the rows they train on."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_beside
from tests.distributed.hf_oracle import pair_of, read_rows

ALPHA = 0.3
HOOK = "tests.distributed.oracle_recorder:record_for_oracle"
# Rows in the order of the file, so that a row number is a line. Adam's eps stands above the gradients' rounding
# noise: elsewhere Adam would turn that noise into steps of full size.
RUN = "--dataset_shuffle false --max_length 512 --logging_steps 1 --lr 1e-2 --adam_eps 1e-4 --micro_batch_size 1"
LORA = "--tuner_type lora --lora_rank 4 --lora_alpha 8 --lora_dropout 0"
LORA_SCALE = 8 / 4
RSLORA_SCALE = 8 / math.sqrt(4)
SAVE = "--save_safetensors true --merge_lora true --no_save_optim true --no_save_rng true"
PACKED_ROWS = 8
# Rows whose own empty answers are equal: they keep their trace pair and have no empty pair.
WITHOUT_EMPTY = (2, 5)
# A prompt and two empty answers: an empty pair alone.
WITHOUT_TRACE = (3,)


def moe(workshop) -> str:
    return f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking"


def dense(workshop) -> str:
    return f"--model {workshop.dense} --model_type qwen3 --template qwen3_thinking"


def other_dense(workshop) -> Path:
    """A reference that is not the policy's start, or every first loss of full tuning would be ln 2."""
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    return make_tiny_model(workshop.folder / "dense-other", kind="dense", vocab="trimmed", seed=1)


def cell(name: str, flags: str, **kwargs) -> Cell:
    return Cell(name, [*f"{RUN} {flags}".split(), *CPU_FLAGS], **{"hook": HOOK, **kwargs})


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def packing_rows(workshop) -> Path:
    rows = read_rows(workshop.train)[:PACKED_ROWS]
    for i in WITHOUT_EMPTY:
        rows[i] |= {"empty_response": "The same.", "empty_rejected_response": "The same."}
    for i in WITHOUT_TRACE:
        pair = pair_of(rows[i], "empty")
        answers = {"empty_response": pair.chosen, "empty_rejected_response": pair.rejected}
        rows[i] = {"messages": rows[i]["messages"][:1], **answers}
    return write_rows(workshop.folder / "packing.jsonl", rows)


def bare_answers(workshop) -> Path:
    """The empty pairs as plain DPO rows: each response is the empty block and the answer, all of it scored."""
    rows = []
    for row in read_rows(workshop.train):
        pair = pair_of(row, "empty")
        messages = [
            {"role": "user", "content": pair.question},
            {"role": "assistant", "content": pair.block + pair.chosen},
        ]
        rows.append({"messages": messages, "rejected_response": pair.block + pair.rejected})
    return write_rows(workshop.folder / "bare-answers.jsonl", rows)


def saved_data(workshop) -> str:
    """LoRA with an evaluation and a checkpoint at the end."""
    data = f"--dataset {workshop.train} --val_dataset {workshop.held_out} --bvpo_alpha {ALPHA} "
    return data + f"--global_batch_size 4 --train_iters 2 --save_steps 100 {LORA} {SAVE}"


def saved_flags(workshop) -> str:
    """Of the run `moe-experts`, which can be gone on from."""
    return f"{saved_data(workshop)} {moe(workshop)} --target_modules all-linear --no_save_optim false"


def run_saved(workshop, folder: Path) -> dict[str, CellResult]:
    """LoRA on both models, with an evaluation and a checkpoint at the end; and runs that begin with a checkpoint."""
    data, save = saved_data(workshop), {"save": True}
    router = "--use_rslora true --target_modules all-linear all-router"
    alone = [
        cell("moe", f"{data} {moe(workshop)} {router}", hook_args=save),
        cell("dense", f"{data} {dense(workshop)}", hook_args=save),
    ]
    cells = [cell("moe-experts", saved_flags(workshop), hook_args=save)]  # which the others begin with
    adapter = f"{folder}/moe-experts/last-checkpoint"
    both = f"--adapters {adapter} --ref_adapters {adapter} --bvpo_eval_on_start true --train_iters 1"
    hook = {"hook": "tests.distributed.recorders:record_first_step", "hook_args": {"lora_scale": 0}}
    cells.append(cell("again", f"{data} {moe(workshop)} {both}", **hook))
    cells.append(cell("onward", f"{data} {moe(workshop)} {both.replace(f'--ref_adapters {adapter}', '')}", **hook))
    for name, flags in (("fewer", "--adapters"), ("fewer-ref", "--ref_adapters")):
        given = f"{flags} {adapter} --target_modules linear_qkv linear_proj"
        cells.append(cell(name, f"{data} {moe(workshop)} {given}", may_fail=True))
    return run_beside(folder, alone, cells)


def run_packings(workshop, folder: Path) -> dict[str, CellResult]:
    """Full tuning, one step over the same pairs: in micro-batches of 1 and 2, and in packs of two sizes."""
    run = f"--dataset {packing_rows(workshop)} {dense(workshop)} --tuner_type full --ref_model {other_dense(workshop)} "
    run += f"--bvpo_alpha {ALPHA} --train_iters 1 --eval_iters 0"
    cells = [
        cell("one", f"{run} --global_batch_size 8"),
        cell("two", f"{run} --global_batch_size 8 --micro_batch_size 2"),
        cell("two-padded", f"{run} --global_batch_size 8 --micro_batch_size 2 --padding_free false"),
        cell("packs", f"{run} --global_batch_size 4 --packing true --packing_length 800"),
        cell("longer-packs", f"{run} --global_batch_size 3 --packing true --packing_length 1200"),
    ]
    return run_beside(folder, cells[::2], cells[1::2])


def run_beside_stock(workshop, folder: Path) -> dict[str, CellResult]:
    """Both fixed alphas, each beside ms-swift's own Megatron DPO on that stream's pairs."""
    lora = f"{moe(workshop)} {LORA}"
    full = f"{dense(workshop)} --tuner_type full --ref_model {other_dense(workshop)}"
    run = "--global_batch_size 4 --train_iters 3 --eval_iters 0 --lr 1e-3"
    stock = {"type": "dpo", "hook": "tests.distributed.recorders:record_first_step"}
    native = "--cross_entropy_loss_fusion false --beta 0.1 --loss_type sigmoid"
    cells = [
        cell("trace", f"{run} --dataset {workshop.train} --bvpo_alpha 1 {lora}"),
        cell("stock-trace", f"{run} --dataset {workshop.train} {lora} {native}", **stock),
        cell("empty", f"{run} --dataset {workshop.train} --bvpo_alpha 0 {full}"),
        cell("stock-empty", f"{run} --dataset {bare_answers(workshop)} {full} {native}", **stock),
    ]
    return run_beside(folder, cells[:2], cells[2:])
