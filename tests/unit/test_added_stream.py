"""A stream more is one entry of the table: layout, sums, metrics and a probe's rows go by it. And flags that idle."""

import pytest
import torch

from megatron_bvpo.data.batches import BatchLayout
from megatron_bvpo.errors import UserError
from megatron_bvpo.gradients.halves import WEIGHT_KEY, some_streams
from megatron_bvpo.launching.stream_flags import read_streams
from megatron_bvpo.objective.demonstrations import DemonstrationSums
from megatron_bvpo.objective.stream_losses import stacked, sums_of
from megatron_bvpo.objective.streams import mixing_factors, stream_metrics
from megatron_bvpo.streams import ALONE, TABLE, Stream
from megatron_bvpo.training.config import refuse_idle_flags


@pytest.fixture
def hint(monkeypatch):
    monkeypatch.setitem(TABLE, "hint", Stream("hint", ("hint_response",), ALONE, False, "hints"))


def sequence(name: str, length: int) -> dict:
    return {f"{name}_input_ids": [1] * length, f"{name}_labels": [-100] + [1] * (length - 1)}


def test_a_layout_has_its_sequences_behind_the_others(hint):
    layout = BatchLayout(
        rows={"trace": (4, 5), "expert": (4,), "hint": (5, 6)},
        weights={"trace": (1.0, 1.0), "expert": (1.0,), "hint": (1.0, 0.0)},
        tokens={"expert": (7,), "hint": (3, 9)},
    )
    assert layout.slices("trace") == (slice(0, 2), slice(2, 4))
    assert (layout.slices("expert"), layout.slices("hint")) == ((slice(4, 5),), (slice(5, 7),))
    assert (layout.real_count("hint"), layout.real_count("trace")) == (3.0, 2.0)
    assert layout.compared(torch.arange(7))[0].tolist() == [0, 1, 2, 3]


def test_it_is_summed_and_logged_under_its_name(hint):
    found = DemonstrationSums.of(*(torch.tensor(v, dtype=torch.float64) for v in ([6.0], [-6.0], [3.0], [1.0])))
    sums = {"hint": sums_of("hint", stacked(found))}
    metrics = {
        name: float(total / count) for name, (total, count) in stream_metrics(sums, {"hint": 1.0}, rpo=False).items()
    }
    assert metrics == {"loss": 2.0, "loss/hint": 2.0, "hint/nll_loss": 2.0, "hint/logps/response": -6.0}
    assert mixing_factors({"hint": 0.5}, {"hint": 3.0}) == {"hint": 0.5 / 3}


def test_a_probe_runs_all_that_demonstrates_in_one_pass(hint):
    pair = sequence("chosen", 5) | sequence("rejected", 4)
    rows = [{**pair, **sequence("expert_response", 3)}, {**pair, **sequence("hint_response", 6)}, pair]
    kept = some_streams(rows, ("expert", "hint"))
    assert [set(row) for row in kept] == [set(sequence("expert_response", 3)), set(sequence("hint_response", 6))]
    (alone,) = some_streams([pair], ("expert", "hint"))
    assert alone == {**pair, WEIGHT_KEY: 0.0}


SETTINGS = {
    "bvpo_gate": "none",
    "bvpo_mu_peak": 0.1,
    "bvpo_mu_valley": 0.1,
    "bvpo_mu_warmup_steps": 0,
    "bvpo_mu_decay_steps": 0,
    "bvpo_gate_threshold": 0.0,
    "bvpo_expert_loss": "sft",
    "bvpo_empty_beta": None,
    "bvpo_short_beta": None,
    "loss_type": "sigmoid",
}


@pytest.mark.parametrize(
    ("streams", "changed", "flag"),
    [
        ("trace expert", {"bvpo_mu_peak": 0.9}, "--bvpo_mu_peak"),
        ("trace empty", {"bvpo_mu_valley": 0.3}, "--bvpo_mu_valley"),
        ("expert", {"bvpo_mu_decay_steps": 5}, "--bvpo_mu_decay_steps"),
        ("trace expert", {"bvpo_gate": "hpt", "bvpo_mu_peak": 0.5}, "--bvpo_mu_peak"),
        ("trace expert", {"bvpo_gate_threshold": 0.5}, "--bvpo_gate_threshold"),
        ("trace empty", {"bvpo_expert_loss": "dft"}, "--bvpo_expert_loss"),
        ("trace short", {"bvpo_empty_beta": 0.5}, "--bvpo_empty_beta"),
        ("trace empty", {"bvpo_short_beta": 0.5}, "--bvpo_short_beta"),
        ("expert", {"loss_type": "ipo"}, "--loss_type"),
    ],
)
def test_a_flag_that_idles_is_refused(streams, changed, flag):
    with pytest.raises(UserError, match="nothing would read it") as found:
        refuse_idle_flags(SETTINGS | changed, read_streams(streams, None, "auto"))
    assert found.value.field == flag


@pytest.mark.parametrize(
    ("streams", "changed"),
    [
        ("trace empty", {}),
        ("expert", {"bvpo_expert_loss": "dft"}),
        ("trace expert", {"bvpo_mu_peak": 0.4, "bvpo_mu_valley": 0.4}),
        ("trace expert", {"bvpo_mu_peak": 0.9, "bvpo_mu_decay_steps": 200}),
        ("trace empty short", {"bvpo_empty_beta": 0.5, "bvpo_short_beta": 0.5, "loss_type": "ipo"}),
        ("trace expert", {"bvpo_gate": "hpt", "bvpo_gate_threshold": 0.5}),
    ],
)
def test_one_that_is_read_is_not(streams, changed):
    refuse_idle_flags(SETTINGS | changed, read_streams(streams, None, "auto"))
