"""Waiting of replicas, packs proposed for rows, a probe's bubble, and recomputation of as few layers as fit."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.command import make_plan
from megatron_bvpo.planning.costs import probe_bubble, recomputed_share
from megatron_bvpo.planning.layout import Cluster, groups_of
from megatron_bvpo.planning.memory import GIB, fullest
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.planning.report import as_text
from megatron_bvpo.planning.row_lengths import row_lengths
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.planning.suggest import BUSIEST, HEADROOM
from megatron_bvpo.planning.waiting import example_sizes, packs_of, replicas_together, variation, waiting_share
from tests.unit.sample_rows import EXPERT, REJECTED, jsonl, row, talk
from tests.unit.test_shipped_configs import EXPECTED, FOLDER, cluster_of


def plan_of(name: str, **more):
    return make_plan(str(FOLDER / f"{name}.yaml"), cluster_of(name), **more)


@pytest.mark.parametrize(
    "sizes, ranks, together",
    [((4, 1, 8), 32, 2), ((4, 2, 8), 64, 1), ((2, 1, 8), 8, 4), ((2, 1, 1), 8, 1), ((1, 1, 64), 8, 8)],
)
def test_who_meets_in_an_all_to_all(sizes, ranks, together):
    tp, cp, ep = sizes
    run = RunSettings(tensor_model_parallel_size=tp, context_parallel_size=cp, expert_model_parallel_size=ep)
    assert replicas_together(groups_of(run, ranks)) == together


def test_waiting_for_the_longest():
    assert waiting_share([5.0], micro_batches=4, dp=4, together=2) == pytest.approx(0)
    # Two lengths: of two replicas the longer one has 3 in three cases of four, 2.5 on average where the mean is 2.
    assert waiting_share([1.0, 3.0], micro_batches=8, dp=2, together=2) == pytest.approx(1 - 2 / 2.5, abs=0.01)
    alone = waiting_share([1.0, 3.0], micro_batches=64, dp=2, together=1)
    assert 0 < alone < 0.06, "over many micro-batches lengths even out"
    assert waiting_share([1.0, 3.0], micro_batches=8, dp=4, together=4) > 0.28
    assert variation(example_sizes()) == pytest.approx(0.5, abs=0.03)


def test_packs_are_those_of_ms_swift():
    """ms-swift packs with binpacking's to_constant_volume, 1000 items at a time."""
    binpacking = pytest.importorskip("binpacking")
    draw = random.Random(1)
    sizes = [int(1000 * draw.lognormvariate(0, 0.5)) for _ in range(1000)]
    ours = packs_of(sizes, 8000)
    theirs = [sum(pack) for pack in binpacking.to_constant_volume(sizes, 8000)]
    assert sum(ours) == sum(sizes) and max(ours) <= 8000
    assert len(ours) == pytest.approx(len(theirs), rel=0.02) and variation(ours) < 0.1
    assert packs_of([9000, 100], 8000) == [9000, 100], "a longer row is a pack of its own"


def test_the_plan_says_who_waits_and_what_a_probe_waits():
    plan = plan_of("qwen3_235b_a22b_thinking_lora_4nodes")
    text = as_text(plan)
    assert "2 replicas meet in every all-to-all, 4 at the step's end: 27% of a step" in text and "predicted" in text
    assert "pipeline bubble 11%" in text and "a bubble of 20%" in text
    assert 0.2 < plan.waiting.single < 0.35 and plan.waiting.packed is None
    groups = plan.groups
    assert probe_bubble(plan.run, groups, 8) == pytest.approx(1 / 5), "four passes of four micro-batches"
    assert probe_bubble(plan.run, groups, 3) == pytest.approx(1 / 4), "an odd number is not halved: each pass has all"


def test_rows_propose_a_pack(workshop):
    overrides = dict(
        tensor_model_parallel_size="2",
        pipeline_model_parallel_size="1",
        expert_model_parallel_size="2",
        global_batch_size="8",
        packing="false",
        max_length="512",
        # cells of a tiny model
        context_parallel_size="1",
    )
    file = str(FOLDER / "qwen3_30b_a3b_thinking_lora_1node.yaml")
    plan = make_plan(file, Cluster(1, 8, 80), model=str(workshop.moe), overrides=overrides, rows=str(workshop.train))
    found = plan.waiting
    assert found.rows == 16 and found.packing_length % 64 == 0 and found.rows_a_pack >= 1
    assert f"packing: true, packing_length: {found.packing_length}" in as_text(plan)
    with pytest.raises(UserError, match="tokenizer.json"):
        plan_of("qwen3_235b_a22b_thinking_lora_4nodes", rows=str(workshop.train))


@pytest.mark.parametrize("name", ["qwen3_30b_a3b_thinking_lora_1node", "qwen3_30b_a3b_thinking_full_1node"])
def test_as_few_recomputed_layers_as_fit(name):
    plan = plan_of(name)
    few, room = plan.fewer, (1 - HEADROOM) * 80 * GIB
    assert few.recompute_method == "block" and few.recompute_num_layers < plan.run.recompute_num_layers

    def size(n):
        run = dataclasses.replace(few, recompute_num_layers=n)
        return fullest(plan.shape, run, 8, plan.lengths, BUSIEST)

    assert size(few.recompute_num_layers) <= room < size(few.recompute_num_layers - 1)
    assert recomputed_share(plan.shape, few) == few.recompute_num_layers / 48
    assert f"recompute_num_layers: {few.recompute_num_layers} of about 48" in as_text(plan)


@pytest.mark.parametrize("name", EXPECTED)
def test_shipped_runs_bear_unevenly_loaded_experts(name):
    assert plan_of(name, imbalance=BUSIEST).fits


def test_rows_are_judged_as_the_run_judges_them(workshop, tmp_path):
    """The gate switches streams off, `--bvpo_empty` and `--columns` do what they do in the run."""
    file = tmp_path / "rows.jsonl"

    def lengths(*rows, **given):
        file.write_bytes(jsonl(*rows))
        run = settings_from({"max_length": 512, "bvpo_streams": "trace empty expert", **given})
        return row_lengths(str(file), str(workshop.dense), run)

    rows = [row(**EXPERT, accept_rate=rate) for rate in (0.25, 0.75)]
    (both, same), (pairs, again) = lengths(*rows), lengths(*rows, bvpo_gate="hpt")
    assert both == same and pairs == again < both
    demonstration, other = lengths(*rows, bvpo_gate="hpt", bvpo_gate_threshold=0.5)
    assert other == pairs and demonstration == both - pairs > 0

    (trace_alone,) = lengths(row(), bvpo_empty="own")
    assert trace_alone < pairs == lengths(row())[0]
    renamed = {"messages": talk(), "worse": REJECTED}
    assert lengths(renamed, columns={"worse": "rejected_response"}) == [pairs]
    with pytest.raises(UserError, match="of use"):
        lengths(renamed)
