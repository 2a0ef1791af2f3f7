"""What the study's report says of tables whose truth is known (benchmarks/study)."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.study import second_round, side_arms
from benchmarks.study.plan import SECOND_ROUND
from benchmarks.study.results import Tables
from benchmarks.study.tables import write_csv
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

QUESTIONS, SEEDS = 300, range(1, 7)


def tables(folder, shares: dict[tuple[str, int], float], *, left_out: tuple = ()) -> Tables:
    """Six runs of each arm and batch with about this share of right answers, greedy ones too.

    Args:
        left_out: (arm, seed) that have not run yet.
    """
    draw = np.random.default_rng(0)
    runs, answers, steps = [], [], []
    for (arm, batch), share in shares.items():
        for seed in (seed for seed in SEEDS if (arm, seed) not in left_out):
            name = f"{arm}-batch{batch}-seed{seed}"
            runs.append({"name": name, "arm": arm, "batch": batch, "rate": 1e-3, "seed": seed, "steps": 1})
            steps.append({"name": name, "step": 1, "alpha": 0.5, "trace_margin": share})
            for mode in MODES:
                right = "".join(map(str, (draw.random(QUESTIONS) < share).astype(int)))
                answers.append({"name": name, "mode": mode, "repeats": 1, "right": right})
    of_pairs = [{"seed": seed, "rows": 10, "questions": 10, "trace_tokens": 1, "empty_tokens": 1} for seed in SEEDS]
    fresh = [{**of, "name": f"{SECOND_ROUND[1]}-batch64-seed{of['seed']}", "shared": 4} for of in of_pairs]
    named = {"runs": runs, "answers": answers, "greedy": answers, "steps": steps, "pairs": of_pairs, "fresh": fresh}
    for name, rows in named.items():
        write_csv(folder / f"{name}.csv", rows)
    return Tables(folder)


@pytest.mark.parametrize(
    "of_mse, of_fixed, told, untold",
    [
        (0.8, 0.5, "κ = 1 is better", "tell no κ"),
        (0.2, 0.5, "κ = .03 is better", "tell no κ"),
        (0.5, 0.9, "tell no κ", "is better"),  # another arm that differs says nothing of κ
    ],
)
def test_kappa_is_judged_by_the_arms_that_differ_in_it(tmp_path, of_mse, of_fixed, told, untold):
    arms = {"auto": 0.5, "trace": 0.5, "auto-every-step": 0.5, "mse-every-step": of_mse, "fixed-.75": of_fixed}
    (line,) = side_arms.kappa(tables(tmp_path, {(arm, 8): share for arm, share in arms.items()}), 8)
    assert told in line and untold not in line


def test_the_answer_and_the_table_agree(tmp_path):
    """A difference that its table's comparisons leave untold is untold in the answer."""
    arms = {"auto": 0.5, "trace": 0.5, "auto-every-step": 0.5, "mse-every-step": 0.8}
    known = tables(tmp_path, {(arm, 8): share for arm, share in arms.items()})
    cells, found = side_arms.comparisons(known, 8)
    assert len(cells) == len(found) == 2 * (2 * 2 + 1)
    text = "\n".join(side_arms.section(known, 8))
    assert "mse-every-step is better" in text and f"of these {len(cells)} comparisons" in text


def test_a_second_round_that_helps_is_told(tmp_path):
    stale, fresh = SECOND_ROUND
    known = tables(tmp_path, {("auto", 64): 0.5, (stale, 64): 0.3, (fresh, 64): 0.5})
    (line,) = second_round.answer(known, 64)
    assert line.count(f"{fresh} is better") == 4  # two modes, greedy and not
    text = "\n".join(second_round.section(known, 64))
    assert f"{stale} − auto" in text and "auto is better" in text
    assert "40 % of the fresh pairs' questions" in text


@pytest.mark.parametrize("left_out", [0, 1], ids=SECOND_ROUND)
def test_half_a_second_round_says_nothing(tmp_path, left_out):
    """One seed in common is no interval."""
    missing = tuple((SECOND_ROUND[left_out], seed) for seed in list(SEEDS)[1:])
    arms = {("auto", 64): 0.5, **{(arm, 64): 0.5 for arm in SECOND_ROUND}}
    known = tables(tmp_path, arms, left_out=missing)
    assert second_round.answer(known, 64) == second_round.section(known, 64) == []
