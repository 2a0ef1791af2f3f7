"""alpha = 1 and alpha = 0 beside ms-swift's own Megatron DPO on that stream's pairs, one pair a micro-batch.

The stock side goes the stock way: ms-swift's template, Megatron's whole logits and cross entropy. It scores the
empty block's tokens, and BVPO does not; for a loss of the plain difference that must not matter.
"""

from __future__ import annotations

import pytest

from tests.distributed import oracle_runs
from tests.distributed.hf_oracle import EMPTY_BLOCK, load_model, pair_of, read_rows, response_logp, tokens

TOLERANCE = 1e-5
STEPS = 3


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    return oracle_runs.run_beside_stock(workshop, tmp_path_factory.mktemp("stock"))


def require_close(ours: list[float], stock: list[float], floor: float = 0.0) -> None:
    """The tolerance is relative; `floor` is what stands for it below 1."""
    assert len(ours) == len(stock) == STEPS
    assert ours == pytest.approx(stock, rel=TOLERANCE, abs=floor)


@pytest.mark.parametrize("stream", ["trace", "empty"])
def test_loss_margins_and_gradient_norm_at_every_step(runs, stream):
    ours, stock = runs[stream], runs[f"stock-{stream}"]
    prefix = "empty/" if stream == "empty" else ""
    require_close(ours.steps("loss"), stock.steps("loss"))
    require_close(ours.steps(f"loss/{stream}"), stock.steps("loss"))
    require_close(ours.steps("grad_norm"), stock.steps("grad_norm"))
    require_close(ours.steps(f"{prefix}rewards/margins"), stock.steps("rewards/margins"), TOLERANCE)
    require_close(ours.steps(f"{prefix}rewards/accuracies"), stock.steps("rewards/accuracies"))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_logps_and_rewards_of_the_trace_stream(runs, side):
    ours, stock = runs["trace"], runs["stock-trace"]
    require_close(ours.steps(f"logps/{side}"), stock.steps(f"logps/{side}"))
    require_close(ours.steps(f"rewards/{side}"), stock.steps(f"rewards/{side}"), TOLERANCE)


@pytest.mark.parametrize("stream", ["trace", "empty"])
def test_the_whole_gradient_of_the_first_step(runs, stream):
    (ours,), (stock,) = (runs[name].recorded["gradients"] for name in (stream, f"stock-{stream}"))
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_the_dead_stream_is_not_run(runs):
    for stream, other in (("trace", "empty"), ("empty", "trace")):
        assert {pair["stream"] for pair in runs[stream].recorded["pairs"]} == {stream}
        assert not runs[stream].steps(f"loss/{other}")


def test_stock_scores_the_block_and_bvpo_does_not(runs, workshop):
    """Both sides' log-probs differ by the block's, and both responses' by the same: so it cancels."""
    ours, stock = runs["empty"], runs["stock-empty"]
    step = [stock.steps(f"logps/{side}")[0] - ours.steps(f"empty/logps/{side}")[0] for side in ("chosen", "rejected")]

    model, rows = load_model(workshop.dense), read_rows(workshop.train)
    tokenizer_of = tokenizer(workshop.dense)
    blocks = []
    for pair in ours.recorded["pairs"]:
        (ids, given), _ = tokens(tokenizer_of, pair_of(rows[pair["row"]], "empty"))
        block = len(tokenizer_of(EMPTY_BLOCK)["input_ids"])
        blocks.append(response_logp(model, ids[:given], given - block).item())
    expected = sum(blocks) / len(blocks)
    assert expected < -10  # there is something to cancel
    assert step == pytest.approx([expected, expected], rel=TOLERANCE)


def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
