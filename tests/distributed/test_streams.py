"""Any set of streams: four in every layout, each one's own gradient, losses of a user's own, what a gate leaves out."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed import stream_runs as runs_of
from tests.distributed.cells import run_beside, run_by_ranks
from tests.distributed.hf_oracle import Oracle, Pair, dpo_loss, tokens
from tests.distributed.stream_runs import ALL, FULL, LORA, MU, SHARES, TOLERANCE, WEIGHTS, against, cell, close
from tests.distributed.test_parity import LAYOUTS

GRAM_TOLERANCE = 1e-4
STREAMS = ("trace", "empty", "short", "expert")
# Not accuracies: where policy and reference begin as one model, every pair is a tie.
COMPARED = tuple(f"{what}/{side}" for what in ("logps", "rewards") for side in ("chosen", "rejected"))
COMPARED += ("rewards/margins", "logps/response", "nll_loss")
# `auto`: full tuning with probes.
PARALLEL = {
    "tp2-pp2-ep2-lora": ("tp2-pp2-ep2", LORA),
    "tp2-pp2-ep2-auto": ("tp2-pp2-ep2", FULL),
    "cp2-lora": ("cp2", LORA),
    "pp2-vpp2-full": ("pp2-vpp2", FULL),
    "dp2-auto": ("dp2", FULL),
}
# With --whole-matrix.
MORE_PARALLEL = {
    "tp2-pp2-ep2-full": ("tp2-pp2-ep2", FULL),
    "cp2-auto": ("cp2", FULL),
    "pp2-vpp2-auto": ("pp2-vpp2", FULL),
    "dp2-lora": ("dp2", LORA),
}
OWN = "tests.distributed.own_losses"


def parallel(config) -> dict[str, tuple[str, str]]:
    return PARALLEL | (MORE_PARALLEL if config.getoption("--whole-matrix") else {})


def pytest_generate_tests(metafunc):
    if "cell_name" in metafunc.fixturenames:
        metafunc.parametrize("cell_name", parallel(metafunc.config))


def demonstration_first(workshop) -> list[dict]:
    rows = runs_of.stream_rows(workshop)
    return [rows.pop(runs_of.EXPERT_ALONE), *rows]


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("streams")
    four, one = runs_of.parity_flags(workshop), runs_of.single_flags(workshop)
    expert = f"{one} --bvpo_streams expert --global_batch_size {runs_of.count('expert')}"
    other = runs_of.other_reference(workshop)
    rows = [row for row in runs_of.stream_rows(workshop) if "short_response" in row or "expert_response" in row]
    for i, row in enumerate(rows):
        row["accept_rate"] = 0.0 if i % 3 == 0 and "expert_response" in row else 0.5
    gate = f"{one} {other} {ALL} {WEIGHTS} --bvpo_expert_loss dft --bvpo_gate hpt --global_batch_size {len(rows)}"
    single = [
        cell("lora", f"{four} {WEIGHTS} {LORA}"),
        cell("full", f"{four} {WEIGHTS} {FULL}"),
        cell("auto", f"{four} --bvpo_weights auto {FULL}"),
        cell("prior", f"{four} --bvpo_weights trace=.5 empty=.25 short=.25 {FULL}"),
        cell("cold", f"{four} {WEIGHTS} {LORA} --bvpo_ref_cache {folder / 'cache'} --train_iters 2"),
        cell("warm", f"{four} {WEIGHTS} {LORA} --bvpo_ref_cache {folder / 'cache'} --train_iters 2"),
        *(cell(f"expert-{loss}", f"{expert} --bvpo_expert_loss {loss}") for loss in ("sft", "dft", "sft_phi")),
        cell("expert-two", f"{expert} --bvpo_expert_loss dft --micro_batch_size 2"),
        cell("expert-packed", f"{expert} --bvpo_expert_loss dft --packing true --packing_length 2400 "
             "--global_batch_size 1"),
        cell("short", f"{one} {other} --bvpo_streams short --bvpo_short_beta 0.3 "
             f"--global_batch_size {runs_of.count('short')}"),
        cell("hinge", f"{one} {other} --loss_type hinge --bvpo_alpha 0.5 --global_batch_size 8"),
        cell("own-hinge", f"{one} {other} --loss_type {OWN}:hinge --bvpo_alpha 0.5 --global_batch_size 8"),
        cell("own-squared", f"{expert} --bvpo_expert_loss {OWN}:squared"),
        cell("gated", f"{gate} --dataset {runs_of.write(workshop, 'gated', rows)}"),
        cell("demonstration-first", f"{one} {ALL} {WEIGHTS} {MU} --train_dataloader_shuffle false "
             f"--global_batch_size 4 --dataset {runs_of.write(workshop, 'first', demonstration_first(workshop))}"),
        cell("cut", f"{gate} --dataset {runs_of.write(workshop, 'cut', [cut(row) for row in rows])}"),
    ]  # fmt: skip
    found = run_beside(folder, single[:9], single[9:])  # `cold` before `warm`
    by_ranks: dict[int, list] = {2: [], 4: []}
    for name, (layout, tuner) in parallel(request.config).items():
        ranks, flags = LAYOUTS[layout]
        weights = "--bvpo_weights auto" if name.endswith("auto") else WEIGHTS
        by_ranks[ranks].append(cell(name, f"{four} {weights} {tuner} {flags}"))
    return found | run_by_ranks(folder, by_ranks)


def cut(row: dict) -> dict:
    """A row without what the gate switches off."""
    if row["accept_rate"] > 0:
        return {name: value for name, value in row.items() if name != "expert_response"}
    return {"messages": row["messages"][:1], "expert_response": row["expert_response"], "accept_rate": 0.0}


def test_four_streams_agree_with_one_rank(runs, cell_name):
    ours, base = runs[cell_name], runs[cell_name.rpartition("-")[2]]
    assert len(ours.log) == len(base.log)
    for line, expected in zip(ours.log, base.log, strict=True):
        if "iteration" not in line or "loss" not in line:
            continue
        for key, value in expected.items():
            if key.startswith(("loss", "grad_norm", "weight/", "gram/")) or key.endswith(COMPARED):
                floor = 1.0 if "rewards/" in key or key.endswith(("low", "high", "stderr")) else 0.0
                bound = GRAM_TOLERANCE if key.startswith(("gram/", "weight/")) else TOLERANCE
                largest = max(abs(v) for k, v in expected.items() if k[:6] == key[:6]) if "gram/" in key else abs(value)
                assert abs(line[key] - value) <= bound * max(largest, floor), (key, line["iteration"])
    close(ours.recorded["gradients"][0], base.recorded["gradients"][0], TOLERANCE)


def test_what_is_logged_of_four_streams(runs):
    for line, share in zip(runs["full"].log, SHARES, strict=False):
        for name in STREAMS:
            prefix = "" if name == "trace" else f"{name}/"
            key = "nll_loss" if name == "expert" else "rewards/margins"
            assert f"loss/{name}" in line and f"{prefix}{key}" in line
        weights = {"trace": 0.5, "empty": 0.2, "short": 0.3}
        assert line["weight/expert"] == pytest.approx(share)
        for name, weight in weights.items():
            assert line[f"weight/{name}"] == pytest.approx((1 - share) * weight)
        parts = sum((1 - share) * w * line[f"loss/{n}"] for n, w in weights.items()) + share * line["loss/expert"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6) and "alpha" not in line
    assert runs["full"].log[2]["loss/trace"] < runs["full"].log[0]["loss/trace"]


def test_a_probe_of_three_estimators_and_demonstrations_is_a_one_pass_step(runs):
    close(runs["auto"].recorded["gradients"][0], runs["prior"].recorded["gradients"][0], TOLERANCE)
    line, one_pass = runs["auto"].log[0], runs["prior"].log[0]
    for name in ("loss", *(f"loss/{stream}" for stream in STREAMS), "grad_norm"):
        assert line[name] == pytest.approx(one_pass[name], rel=TOLERANCE), name
    assert sum(key.startswith("gram/C_") for key in line) == 6 and sum(key.startswith("gram/D_") for key in line) == 3
    last = runs["auto"].log[2]
    assert sum(last[f"weight/{stream}"] for stream in STREAMS) == pytest.approx(1)


def test_a_warm_cache_changes_nothing(runs):
    """Demonstrations have no reference, and no place in the cache."""
    for key in ("loss", "loss/short", "loss/expert", "rewards/margins", "short/rewards/margins", "grad_norm"):
        assert runs["warm"].steps(key) == runs["cold"].steps(key) == runs["lora"].steps(key)[:2], key
    assert runs["warm"].steps("ref_cache/hits") == [1, 1]


# ---- each stream by itself, against Hugging Face in float64


def test_shortened_pairs_against_hugging_face(runs, oracle, workshop):
    rows = [row for row in runs_of.stream_rows(workshop) if "short_response" in row]
    fields = ("short_response", "short_rejected_response")
    pairs = [Pair(row["messages"][0]["content"], *(row[name] for name in fields)) for row in rows]
    assert len(pairs) == runs_of.count("short")
    losses = [dpo_loss(oracle.pair_logps(pair), beta=0.3) for pair in pairs]
    against(runs["short"], oracle, torch.stack(losses).mean())


def token_logps(oracle: Oracle, row: dict) -> torch.Tensor:
    """[T] log-probs of a demonstration's tokens, float64."""
    pair = Pair(row["messages"][0]["content"], row["expert_response"], row["expert_response"])
    ids, given = tokens(oracle.tokenizer, pair)[0]
    inputs = {"input_ids": ids[None], "use_cache": False}
    output = torch.func.functional_call(oracle.model, oracle.policy, kwargs=inputs)
    logps = output.logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[1:, None])[given - 1 :, 0]


LOSSES = {
    "sft": lambda logp: -logp,
    "dft": lambda logp: -logp.detach().exp() * logp,
    "sft_phi": lambda logp: -(logp.detach().exp() * (1 - logp.detach().exp())) * logp,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_demonstrations_against_hugging_face(runs, oracle, workshop, loss):
    rows = [row for row in runs_of.stream_rows(workshop) if "expert_response" in row]
    assert len(rows) == runs_of.count("expert")
    found = [LOSSES[loss](token_logps(oracle, row)) for row in rows]
    against(runs[f"expert-{loss}"], oracle, torch.cat(found).mean())
    # A mean of the rows' own means is another number: the packing would decide what a token counts.
    rows_means = torch.stack([values.mean() for values in found]).mean().item()
    assert abs(rows_means / torch.cat(found).mean().item() - 1) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["expert-two", "expert-packed"])
def test_token_losses_do_not_depend_on_the_packing(runs, name):
    ours, base = runs[name], runs["expert-dft"]
    assert ours.log[0]["loss"] == pytest.approx(base.log[0]["loss"], rel=TOLERANCE)
    close(ours.recorded["gradients"][0], base.recorded["gradients"][0], TOLERANCE)


# ---- a user's own loss, and the gate


def test_a_loss_of_a_users_own(runs):
    for key in ("loss", "loss/trace", "loss/empty", "grad_norm", "rewards/margins"):
        assert runs["own-hinge"].steps(key) == runs["hinge"].steps(key), key


def test_a_token_loss_of_a_users_own(runs, oracle, workshop):
    rows = [row for row in runs_of.stream_rows(workshop) if "expert_response" in row]
    against(runs["own-squared"], oracle, torch.cat([token_logps(oracle, row) ** 2 for row in rows]).mean())


def test_a_first_micro_batch_of_demonstrations_alone(runs):
    """The canaries compare nothing there, neither crash nor warn (cells.py takes a warning for a failure)."""
    (loss,) = runs["demonstration-first"].steps("loss/expert")
    assert loss > 0


def test_what_a_gate_switches_off_changes_nothing(runs):
    gated, cut_off = runs["gated"], runs["cut"]
    changing = ("elapsed_time", "remaining_time", "memory(GiB)", "train_speed(s/it)")
    lines = [[{k: v for k, v in line.items() if k not in changing} for line in run.log] for run in (gated, cut_off)]
    assert json.dumps(lines[0][0]) == json.dumps(lines[1][0])
    assert lines[0][0]["weight/expert"] == lines[0][0]["weight/trace"] / 0.5 == 1
    for name, gradient in gated.recorded["gradients"][0].items():
        assert torch.equal(gradient, cut_off.recorded["gradients"][0][name]), name
