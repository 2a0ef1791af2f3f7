"""The study's arithmetic (benchmarks/study): intervals, moments, b_t, and what it measures on the small reasoner."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.study import bias, evaluation, pairs
from benchmarks.study.cells import compared
from benchmarks.study.gradient_parts import moment_ratios, shift
from benchmarks.study.intervals import crossed, detectable, over_seeds
from benchmarks.study.plan import HELDOUT_SEED, QUICK, Size, main_runs, more_runs, rate_runs, second_rounds
from benchmarks.study.work import Bench
from megatron_bvpo.errors import UserError
from megatron_bvpo.rehearsal.reasoner import reasoner_folder
from megatron_bvpo.rehearsal.reasoner.problems import split_of
from megatron_bvpo.rehearsal.reasoner.sampling import load_reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import END, MODES, prompt_text

# Standard deviations of questions, seeds and what is left.
CHANCE = [(0.3, 0.0, 0.5), (0.3, 0.01, 0.5), (0.1, 0.05, 0.4), (0.0, 0.0, 0.5), (0.2, 0.02, 0.01)]


@pytest.mark.parametrize("of_questions, of_seeds, rest", CHANCE)
def test_the_interval_covers_the_truth(of_questions, of_seeds, rest):
    """Whatever chance is made of. 400 draws: 95 % ± 2.2, and too wide by a fifth where only the rest varies."""
    draw, covered, times = np.random.default_rng(1), 0, 400
    for _ in range(times):
        values = draw.normal(0, of_questions, (1, 200)) + draw.normal(0, of_seeds, (6, 1))
        found = crossed(values + draw.normal(0, rest, (6, 200)))
        covered += abs(found.mean) <= found.half
    assert 0.925 <= covered / times <= 0.99


def test_a_plain_interval_over_questions_would_be_too_short_where_seeds_rule():
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.1, (1, 200)) + draw.normal(0, 0.05, (6, 1)) + draw.normal(0, 0.4, (6, 200))
    plain = stats.t.ppf(0.975, 199) * values.mean(0).std(ddof=1) / np.sqrt(200)
    assert crossed(values).half > 1.5 * plain


def test_the_interval_is_students_where_one_thing_alone_varies():
    questions = np.random.default_rng(0).normal(0.1, 1, 300)
    found = crossed(np.tile(questions, (6, 1)))
    known = stats.ttest_1samp(questions, 0)
    assert found.mean == pytest.approx(questions.mean())
    assert found.p == pytest.approx(known.pvalue, rel=0.02)
    seeds = np.random.default_rng(1).normal(0.1, 1, 6)
    found = crossed(np.repeat(seeds[:, None], 300, 1))
    assert found.p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue, rel=0.02)
    assert over_seeds(seeds).p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue)


def test_nothing_apart_is_no_verdict():
    found = crossed(np.zeros((6, 100)))
    assert (found.mean, found.half, found.p) == (0, 0, 1)
    assert "the same answers" in compared([("here", "a", "b")], [found])


def test_a_verdict_needs_what_all_comparisons_together_leave():
    """p of .01 tells alone, and not among twenty."""
    values = np.zeros((6, 400))
    values[:, :9] = 1
    found = crossed(values)
    assert 0.0025 < found.p < 0.01
    assert "a is better" in compared([("here", "a", "b")], [found])
    others = [crossed(np.zeros((6, 400)))] * 19
    assert "is better" not in compared([("here", "a", "b")] * 20, [found, *others])


def test_what_could_be_told_is_told_that_often():
    """Six seeds that differ, 16 comparisons."""
    draw, comparisons, times = np.random.default_rng(2), 16, 600

    def drawn(shift: float):
        values = draw.normal(0, 0.1, (1, 300)) + draw.normal(shift, 0.012, (6, 1))
        return crossed(values + draw.normal(0, 0.3, (6, 300)))

    # Of the error as it is on average: six seeds know their own by chance too small or too large.
    promised = np.sqrt(np.mean([detectable(drawn(0), comparisons) ** 2 for _ in range(60)]))
    told = [abs(e.mean) > e.among(comparisons) for e in (drawn(promised) for _ in range(times))]
    assert 0.72 <= np.mean(told) <= 0.9


def test_a_small_difference_that_is_known_well_is_said_to_be_small():
    draw = np.random.default_rng(0)
    known = crossed(draw.normal(0.001, 0.1, (6, 1000)))
    assert "less than 2 points apart" in compared([("here", "a", "b")], [known])
    assert "cannot tell" in compared([("here", "a", "b")], [crossed(draw.normal(0.001, 0.8, (6, 1000)))])


def test_variances_from_a_probes_moments():
    """Of two correlated gradients with a known covariance."""
    v_t, v_e, c, apart = 4.0, 0.5, 0.3, 0.7
    w, x = v_t + v_e - 2 * c, v_t - c
    steps = [{"D": str(apart + w), "X": str(x), "W": str(w), "V_t": str(v_t), "alpha": "0.8"}, {"alpha": "0.8"}]
    found = moment_ratios(steps)
    assert found["empty"] == pytest.approx(v_e / v_t)
    assert found["half"] == pytest.approx((v_t + v_e + 2 * c) / 4 / v_t)
    assert found["chosen"] == pytest.approx((0.64 * v_t + 0.04 * v_e + 0.32 * c) / v_t)
    assert found["bias"] == pytest.approx(apart / v_t)


def test_b_t_is_found_without_bias():
    """Folds of few pairs: plain squares would be all noise (64 parameters of variance 1 against a distance of 1)."""
    draw = torch.Generator().manual_seed(0)
    size, folds = 64, 8
    b_t, b_e, aim = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    b_t[0], b_e[0], b_e[1], aim[2] = 1.0, 0.5, 1.0, 2.0
    found = []
    for _ in range(400):
        noise = [torch.randn(folds, size, generator=draw, dtype=torch.float64) for _ in range(3)]
        noise[1] = noise[1] * 0.75**0.5 + noise[0] / 2  # of the same questions
        found.append(bias.products({"t": aim + b_t + noise[0], "e": aim + b_e + noise[1], "f": aim + noise[2]}))
    truth = {"bt_bt": 1.0, "bt_be": 0.5, "be_be": 1.25, "g_f": 4.0, "v_t": 64.0, "v_f": 64.0, "c": 32.0}
    for name, true in truth.items():
        values = np.array([f[name] for f in found])
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - true) < 4 * error, name
        assert error < 0.1 * true + 0.1, name


@pytest.mark.parametrize("kappa", [1.0, 0.03])
@pytest.mark.parametrize("bt_bt, bt_be, be_be", [(0.0, 0.0, 1.0), (0.2, 0.3, 1.0), (0.5, -0.4, 0.6), (1.0, 0.9, 1.0)])
def test_how_far_alpha_moves_once_b_t_is_known(bt_bt, bt_be, be_be, kappa):
    """Against the criterion's lowest point on a grid, with b_t and with 0 in its place."""
    means = {"bt_bt": bt_bt, "bt_be": bt_be, "be_be": be_be, "v_t": 2.0, "v_e": 0.4, "c": 0.3, "pairs": 16.0}
    v_t, v_e, c = 2.0 * 16 / 8, 0.4 * 16 / 8, 0.3 * 16 / 8
    alphas = np.linspace(0, 1, 100_001)
    noise = kappa * (alphas**2 * v_t + (1 - alphas) ** 2 * v_e + 2 * alphas * (1 - alphas) * c)
    true = alphas**2 * bt_bt + 2 * alphas * (1 - alphas) * bt_be + (1 - alphas) ** 2 * be_be
    assumed = (1 - alphas) ** 2 * (bt_bt - 2 * bt_be + be_be)
    wanted = alphas[(true + noise).argmin()] - alphas[(assumed + noise).argmin()]
    assert shift(means, kappa) == pytest.approx(wanted, abs=3e-5)


def test_log_probs_are_those_that_sampling_had():
    """Batched and padded, by whole texts, against the sampler's own, token by token with its cache."""
    reasoner = load_reasoner(reasoner_folder())
    asked = [problem.question for problem in evaluation.questions(QUICK)[:12]]
    for mode in MODES:
        answers = [answer for (answer,) in sample(reasoner, asked, mode, seed=3)]
        texts = [
            (prompt_text(question, mode), answer.text.removesuffix(END) + END)
            for question, answer in zip(asked, answers, strict=True)
            if answer.ended
        ]
        wanted = [sum(answer.log_probs) for answer in answers if answer.ended]
        with torch.no_grad():
            found = evaluation.responses_log_probs(reasoner, texts)
        assert len(wanted) > 6
        assert found.tolist() == pytest.approx(wanted, abs=2e-3)


def test_no_question_is_used_twice():
    """Judged by, chosen by, trained on: three sets."""
    size = Size()
    judged = {problem.question for problem in evaluation.questions(size)}
    chosen = {problem.question for problem in evaluation.questions(size, choosing=True)}
    assert len(judged) == size.questions >= 1000 and len(chosen) == size.choosing
    assert not judged & chosen
    assert {split_of(question) for question in judged | chosen} == {"heldout"}  # pairs are of the other split


def test_the_pairs_that_drift_is_measured_on_are_no_runs(tmp_path):
    """Of the split that no run has pairs of."""
    size = dataclasses.replace(QUICK, prompts=30, heldout_prompts=30)
    bench = Bench(tmp_path, size)
    bench.prepare()
    for seed in (1, HELDOUT_SEED):
        bench.make_pairs(seed)
    splits = {
        seed: {split_of(question) for question, *_ in evaluation.pairs_of(bench.rows(seed), "empty")}
        for seed in (1, HELDOUT_SEED)
    }
    assert splits == {1: {"train"}, HELDOUT_SEED: {"heldout"}}


def test_two_starts_and_two_sizes_do_not_meet(tmp_path):
    lock = Bench(tmp_path, QUICK).prepare()
    with pytest.raises(UserError, match="another start is at work"):
        Bench(tmp_path, QUICK).prepare()
    lock.close()
    with pytest.raises(UserError, match="another size"):
        Bench(tmp_path, Size()).prepare()


def test_rows_have_both_pairs_and_are_made_once(tmp_path):
    made = pairs.make_pairs(tmp_path / "pairs", reasoner_folder(), 7, 80, 6)
    rows = [json.loads(line) for line in made.read_text("utf-8").splitlines()]
    assert len(rows) >= 4
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert split_of(question) == "train"
        assert answer.startswith("<think>") and row["rejected_response"].startswith("<think>")
        assert answer.rpartition("</think>")[2].strip() == row["answer"] == row["empty_response"]
        assert row["empty_rejected_response"] != row["empty_response"]
    before = made.stat().st_mtime_ns
    assert pairs.make_pairs(tmp_path / "pairs", reasoner_folder(), 7, 80, 6).stat().st_mtime_ns == before


def test_all_48_runs_differ_in_arm_batch_and_seed_alone():
    size = Size()
    runs = main_runs(size, {8: 1e-3, 64: 5e-4})
    assert len(runs) == len({run.name for run in runs}) == 48
    assert {run.steps for run in runs} == {size.steps}
    assert {(run.batch, run.rate) for run in runs} == {(8, 1e-3), (64, 5e-4)}
    names = {run.name for run in [*runs, *more_runs(size, {8: 1e-3}), *rate_runs(size)]}
    assert len(names) == 48 + 36 + 6
    again = second_rounds(size, {8: 1e-3, 64: 5e-4})
    assert len({run.name for run in again}) == 12
    assert {run.after for run in again} == {run.name for run in runs if run.arm == "auto" and run.batch == 64}
