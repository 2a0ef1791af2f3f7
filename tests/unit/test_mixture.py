"""The weights of a step: the schedule's share, what a checkpoint hands on, and what is logged of them."""

from __future__ import annotations

import pytest

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

from megatron_bvpo.gradients.grams import Grams  # noqa: E402
from megatron_bvpo.objective.preference import PreferenceConfig  # noqa: E402
from megatron_bvpo.objective.schedule import MuSchedule  # noqa: E402
from megatron_bvpo.streams import ORDER  # noqa: E402
from megatron_bvpo.training import mixture as mixture_module  # noqa: E402
from megatron_bvpo.training.config import BvpoConfig  # noqa: E402
from megatron_bvpo.training.mixture import Mixture  # noqa: E402


def mixture(streams=("trace", "empty"), probes=True, **changed) -> Mixture:
    estimators = [s for s in streams if s != "expert"]
    values = dict(
        streams=streams,
        probes=probes,
        start_weights={s: 1 / len(estimators) for s in estimators},
        alpha_prior=0.5,
        schedule=None,
        gate_threshold=None,
        expert_loss="sft",
        criterion="sgd",
        kappa=0.1,
        probe_interval=10,
        moment_decay=0.9,
        empty="strip",
        empty_block=None,
        logp_impl="auto",
        logp_memory=1.0,
        ref_cache=None,
        refs_only=False,
        eval_on_start=False,
        new_layers_only=False,
        preference=PreferenceConfig(),
    )
    return Mixture(BvpoConfig(**values | changed))


def grams(streams) -> Grams:
    k = len(streams)
    noise = [[0.5 if i != j else (2.0 if i else 6.0) for j in range(k)] for i in range(k)]
    gaps = [[3.0 if i == j else 1.0 for j in range(k - 1)] for i in range(k - 1)]
    return Grams(tuple(streams), tuple(map(tuple, noise)), tuple(map(tuple, gaps)))


def test_a_schedule_takes_its_share_and_a_gate_none():
    schedule = MuSchedule(peak=0.8, valley=0.2, warmup_steps=4)
    three = mixture(ORDER, probes=False, schedule=schedule)
    assert three.weights(2) == pytest.approx({"trace": 0.2, "empty": 0.2, "short": 0.2, "expert": 0.4})
    assert three.weights(9) == pytest.approx({"trace": 0.8 / 3, "empty": 0.8 / 3, "short": 0.8 / 3, "expert": 0.2})
    gated = mixture(("trace", "expert"), probes=False, gate_threshold=0.0)
    assert gated.weights(5) == {"trace": 1.0, "expert": 1.0}
    assert mixture(("expert",), probes=False).weights(0) == {"expert": 1.0}


def test_two_streams_log_alpha_and_others_their_weights():
    assert set(mixture().metrics(0)) == {"alpha"}
    assert set(mixture(("trace", "empty", "expert")).metrics(0)) == {
        "alpha", "weight/trace", "weight/empty", "weight/expert",
    }  # fmt: skip
    assert set(mixture(ORDER).metrics(0)) == {f"weight/{stream}" for stream in ORDER}


@pytest.mark.parametrize("streams", [("trace", "empty"), ("trace", "short"), ("trace", "empty", "short")])
def test_what_was_learnt_goes_on_from_a_checkpoint(streams):
    first, again = mixture(streams), mixture(streams)
    for step in range(4):
        first.learn(grams(streams), step + 1)
    again.load_state_dict(first.state_dict())
    assert again.weights(0) == first.weights(0) != mixture(streams).weights(0)
    assert set(first.probe_metrics(grams(streams))) == set(again.probe_metrics(grams(streams)))


def test_evidence_of_other_streams_is_left_and_told(monkeypatch):
    two, three, said = mixture(), mixture(("trace", "empty", "short")), []
    for step in range(4):
        two.learn(grams(two.estimated), step + 1)
    monkeypatch.setattr(mixture_module.logger, "warning", said.append)
    three.load_state_dict(two.state_dict())
    assert three.estimator.probes == 0 and len(said) == 1 and "measured anew" in said[0]
    with pytest.raises(ValueError, match="state"):
        three.load_state_dict({"estimator": {"streams": ["trace", "empty", "short"]}})
