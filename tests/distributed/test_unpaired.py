"""Single responses (KTO), and the losses of pairs by tokens: against Hugging Face in float64, and in every layout."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import stream_runs as runs_of
from tests.distributed.cells import run_by_ranks
from tests.distributed.hf_oracle import EMPTY_BLOCK, Oracle, Pair, pair_of, read_rows, response_logp, tokens
from tests.distributed.oracle_runs import moe
from tests.distributed.stream_runs import LORA, TOLERANCE, against, cell, close
from tests.distributed.test_parity import LAYOUTS

BETA, EMPTY_BETA, RIGHT, WRONG = 0.2, 0.5, 1.3, 0.7
STREAMS = ("trace", "empty")
KTO = f"--loss_type kto --bvpo_streams trace empty --bvpo_alpha 0.4 --beta {BETA} --bvpo_empty_beta {EMPTY_BETA} "
KTO += f"--desirable_weight {RIGHT} --undesirable_weight {WRONG} --train_dataloader_shuffle false"
PARALLEL, MORE_PARALLEL = ("dp2", "tp2-pp2-ep2"), ("cp2", "pp2-vpp2")  # the latter with --whole-matrix
PACKED = "--packing true --packing_length 6000 --global_batch_size 1"
# Rows whose stripped answer is lost; row 5 has an own answer of another label, row 9 is an answer alone.
NO_ANSWER, OWN, ALONE = (2, 7), 5, 9


def single_rows(workshop) -> list[dict]:
    """The workshop's rows with one response each, right ones and wrong ones."""
    rows = []
    for i, row in enumerate(read_rows(workshop.train)):
        right = i % 3 != 1
        text = row["messages"][1]["content"] if right else row["rejected_response"]
        single = {"messages": [row["messages"][0], {"role": "assistant", "content": text}], "label": right}
        if i in NO_ANSWER:
            single |= {"empty_response": "<think>Thought.</think>No.", "empty_label": True}
        if i == OWN:
            single |= {"empty_response": "An answer of its own.", "empty_label": not right}
        if i == ALONE:
            single = {"messages": row["messages"][:1], "empty_response": "Alone.", "empty_label": False}
        rows.append(single)
    return rows


def parallel(config) -> tuple[str, ...]:
    return PARALLEL + (MORE_PARALLEL if config.getoption("--whole-matrix") else ())


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", parallel(metafunc.config))


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("unpaired")
    file = runs_of.write(workshop, "single", single_rows(workshop))
    alone = f"{runs_of.single_flags(workshop)} {runs_of.other_reference(workshop)} --global_batch_size 16"
    one = f"{alone} --dataset {file} {KTO}"
    held_out = f"--val_dataset {file} --bvpo_eval_on_start true --eval_iters -1"
    many = f"{moe(workshop)} --dataset {file} --global_batch_size 8 --train_iters 2 {KTO} {LORA} {held_out}"
    pairs = f"{alone} --dataset {workshop.train} --bvpo_alpha 0.4 --beta {BETA}"
    single = [
        cell("kto", one),
        cell("kto-two", f"{one} --micro_batch_size 2"),
        cell("auto", f"{one} --bvpo_alpha auto --bvpo_alpha_prior 0.4"),
        cell("apo", f"{one} --loss_type apo_zero_unpaired"),
        cell("apo-packed", f"{one} --loss_type apo_zero_unpaired {PACKED}"),
        cell("kto-packed", f"{one} {PACKED}"),
        cell("norm", f"{pairs} --loss_type sigmoid_norm --bvpo_empty_beta {EMPTY_BETA}"),
        cell("one-rank", many),
    ]
    by_ranks: dict[int, list] = {1: single, 2: [], 4: []}
    for layout in parallel(request.config):
        ranks, flags = LAYOUTS[layout]
        by_ranks[ranks].append(cell(layout, f"{many} {flags}"))
    return run_by_ranks(folder, by_ranks)


# ---- against Hugging Face


def members(row: dict, i: int) -> dict[str, tuple[Pair, bool]]:
    """By stream, (the response as a pair of its own, whether it is right), by the rules of docs/rows.md."""
    question, found = row["messages"][0]["content"], {}
    if i != ALONE:
        text = row["messages"][1]["content"]
        found["trace"] = Pair(question, text, text), row["label"]
    if i in NO_ANSWER:
        return found
    answer = row.get("empty_response") or text.split("</think>")[1].strip()
    right = row["empty_label"] if "empty_response" in row else row["label"]
    return found | {"empty": (Pair(question, answer, answer, EMPTY_BLOCK), right)}


def expected_loss(oracle: Oracle, rows: list[dict], baseline: bool):
    """(the mixed loss, each stream's z): r of every response, z from each prompt with the next one's response."""
    total, baselines = torch.zeros((), dtype=torch.float64), {}
    for stream, weight, beta in zip(STREAMS, (0.4, 0.6), (BETA, EMPTY_BETA), strict=True):
        mine = [found[stream] for i, row in enumerate(rows) if stream in (found := members(row, i))]
        sequences = [tokens(oracle.tokenizer, pair)[0] for pair, _ in mine]

        def ratio(ids, given):
            with torch.no_grad():
                reference = response_logp(oracle.reference, ids, given)
            return response_logp(oracle.model, ids, given, weights=oracle.policy) - reference

        z = torch.zeros((), dtype=torch.float64)
        if baseline:
            following = sequences[1:] + sequences[:1]
            mismatched = [
                (torch.cat([ids[:given], other[start:]]), given)
                for (ids, given), (other, start) in zip(sequences, following, strict=True)
            ]
            z = torch.stack([ratio(*sequence) for sequence in mismatched]).mean().clamp(min=0).detach()
        losses = []
        for sequence, (_, right) in zip(sequences, mine, strict=True):
            gain = ratio(*sequence) - z
            losses.append((RIGHT if right else WRONG) * (1 - torch.sigmoid(beta * (gain if right else -gain))))
        total = total + weight * torch.stack(losses).mean()
        baselines[stream] = z.item()
    return total, baselines


@pytest.mark.parametrize("name", ["kto", "apo"])
def test_single_responses_against_hugging_face(runs, oracle, workshop, name):
    loss, z = expected_loss(oracle, single_rows(workshop), baseline=name == "kto")
    against(runs[name], oracle, loss)
    line = runs[name].log[0]
    assert ("kl" in line) == ("empty/kl" in line) == (name == "kto")
    if name == "kto":
        found = {"trace": line["kl"], "empty": line["empty/kl"]}
        assert found == pytest.approx(z, rel=TOLERANCE) and max(z.values()) > 1e-3, "a z of 0 would show nothing"


def test_a_mean_by_tokens_and_a_beta_for_each_stream_against_hugging_face(runs, oracle, workshop):
    total = torch.zeros((), dtype=torch.float64)
    for stream, weight, beta in zip(STREAMS, (0.4, 0.6), (BETA, EMPTY_BETA), strict=True):
        losses = []
        for row in read_rows(workshop.train):
            pair = pair_of(row, stream)
            chosen, rejected, ref_chosen, ref_rejected = oracle.pair_logps(pair)
            counts = [len(ids) - given for ids, given in tokens(oracle.tokenizer, pair)]
            gain = (chosen - ref_chosen) / counts[0] - (rejected - ref_rejected) / counts[1]
            losses.append(torch.log1p(torch.exp(-beta * gain)))
        total = total + weight * torch.stack(losses).mean()
    against(runs["norm"], oracle, total)


# ---- in every layout


@pytest.mark.parametrize("name", ["kto-two", "auto"])
def test_other_micro_batches_and_probes_give_the_same_step(runs, name):
    for key in ("loss", "loss/trace", "loss/empty", "kl", "empty/kl", "grad_norm"):
        assert runs[name].log[0][key] == pytest.approx(runs["kto"].log[0][key], rel=TOLERANCE, abs=1e-9), key
    close(runs[name].recorded["gradients"][0], runs["kto"].recorded["gradients"][0], TOLERANCE)


def test_packs(runs):
    """All rows in one pack: their losses are the same; z is that of another order of the rows."""
    ours, base = runs["apo-packed"], runs["apo"]
    for key in ("loss", "loss/trace", "loss/empty", "grad_norm"):
        assert ours.log[0][key] == pytest.approx(base.log[0][key], rel=TOLERANCE), key
    close(ours.recorded["gradients"][0], base.recorded["gradients"][0], TOLERANCE)
    line, other = runs["kto-packed"].log[0], runs["kto"].log[0]
    assert line["empty/rewards/chosen"] == pytest.approx(other["empty/rewards/chosen"], rel=1e-4)
    assert line["empty/kl"] >= 0 and line["empty/kl"] == pytest.approx(other["empty/kl"], abs=1.0)


def test_layouts_agree_with_one_rank(runs, layout):
    ours, base = runs[layout], runs["one-rank"]
    assert len(ours.log) == len(base.log)
    seen = set()
    for line, expected in zip(ours.log, base.log, strict=True):
        for key, value in expected.items():
            what = key.removeprefix("eval_").removeprefix("empty/")
            if what.startswith(("loss", "grad_norm", "kl", "logps/", "rewards/")):
                floor = 1.0 if what.startswith(("rewards/", "kl")) else 0.0
                assert abs(line[key] - value) <= TOLERANCE * max(abs(value), floor), key
                seen.add(key)
    assert {"kl", "empty/kl", "rewards/margins", "empty/logps/rejected", "eval_loss", "eval_loss/empty"} <= seen
    close(ours.recorded["gradients"][0], base.recorded["gradients"][0], TOLERANCE)


def test_z_moves_with_the_policy(runs):
    assert any(value > 0 for key in ("kl", "empty/kl") for value in runs["one-rank"].steps(key))
