"""Without the logits the last stage's peak falls by what they take.

In float32 the stock path holds them once: Megatron's cross-entropy turns the logits into exponentials, and those
into the gradient, in place. The kernel holds one tile, with temporaries, and [N, H] for the gradient.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

VOCAB, HIDDEN = 20_000, 64
TILE = 512 * 2048 * 4 * 3  # a CPU's tile in float32, and two temporaries of its size
IMPLS = ("torch", "te")


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("peak")
    model = make_tiny_model(folder / "model", kind="dense", vocab_size=VOCAB, num_layers=2, hidden_size=HIDDEN)
    shared = (
        f"--model {model} --model_type qwen3 --template qwen3_thinking --dataset {workshop.train} --tuner_type lora "
        "--lora_rank 4 --lora_dropout 0 --lr 1e-4 --micro_batch_size 4 --global_batch_size 4 --train_iters 1 "
        "--logging_steps 1 --max_length 512 --bvpo_alpha 0.5"
    )
    cells = [
        Cell(impl, [*shared.split(), *CPU_FLAGS, "--bvpo_logp_impl", impl], hook="tests.distributed.recorders:peak")
        for impl in IMPLS
    ]
    return run_cells(1, cells, folder)


def test_the_same_step(runs):
    for key in ("loss", "grad_norm"):
        assert runs["torch"].steps(key) == pytest.approx(runs["te"].steps(key), rel=1e-5)


def test_the_peak_falls_by_the_logits(runs):
    ours, stock = (runs[impl].recorded for impl in IMPLS)
    logits = ours["tokens"] * VOCAB * 4
    assert ours["tokens"] == stock["tokens"]
    kept = ours["tokens"] * HIDDEN * 4
    fall = stock["peak"] - ours["peak"]
    told = json.dumps({"logits": logits, "fall": fall, "fall in logits": fall / logits, "tile": TILE, "kept": kept})
    assert logits - TILE - kept <= fall <= logits, told


def test_nothing_of_the_size_of_the_logits_is_left(runs):
    ours = runs["torch"].recorded
    assert ours["largest"] < ours["tokens"] * VOCAB * 4 / 2
