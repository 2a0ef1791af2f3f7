"""Which save is one too many, and which settings could never tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_bvpo.launching.combinations import _early_stop, _raise_first, metrics_of
from megatron_bvpo.streams import ORDER
from megatron_bvpo.training.patience import Patience

RUN = dict(
    early_stop_interval=2,
    metric_for_best_model=None,
    save_steps=20,
    eval_steps=10,
    eval_iters=-1,
    val_dataset=["held-out.jsonl"],
    cached_val_dataset=[],
    split_dataset_ratio=0.0,
    bvpo_streams=["trace", "empty"],
    bvpo_weights=[],
    bvpo_alpha="auto",
    loss_type="sigmoid",
)


@pytest.mark.parametrize(
    ("greater", "values", "ends"),
    [
        (False, [1.0, 0.9, 0.9, 0.9], 4),  # as good is not better
        (False, [1.0, 1.1, 0.9, 1.0, 0.8, 0.9], None),
        (True, [1.0, 0.9, 0.8], 3),
        (True, [0.5, 0.6, 0.6, 0.7, 0.7, 0.7], 6),
        (True, [None, None], 2),
    ],
)
def test_the_last_save(greater, values, ends):
    patience, again = (Patience(2, greater) for _ in range(2))
    seen = []
    for save, value in enumerate(values, start=1):
        seen = [v for v in (*seen, value) if v is not None]
        best = (max(seen) if greater else min(seen)) if seen else None  # what ms-swift keeps
        patience.look(best)
        again.load_state_dict(patience.state_dict())
        assert again == patience
        assert patience.at_an_end == (save == ends), save
        if patience.at_an_end:
            break
    else:
        assert ends is None
    assert not Patience(None, greater, waited=99).at_an_end


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"val_dataset": []}, "--early_stop_interval: there is nothing held out to measure; give a --val_dataset"),
        ({"eval_iters": 0}, "nothing held out"),
        ({"save_steps": 15}, "save_steps 15 is no multiple of eval_steps 10"),
        (
            {"loss_type": "kto", "metric_for_best_model": "rewards/accuracies"},
            "--metric_for_best_model: is 'rewards/accuracies', .* names are loss, loss/trace, loss/empty",
        ),
        ({"metric_for_best_model": "accuracy"}, "--metric_for_best_model: is 'accuracy', .* rewards/accuracies"),
    ],
)
def test_what_would_never_tell_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        _raise_first(_early_stop(SimpleNamespace(**RUN | changed)))


@pytest.mark.parametrize(
    "changed",
    [{}, {"save_steps": None, "eval_steps": None}, {"val_dataset": [], "split_dataset_ratio": 0.1}]
    + [{"metric_for_best_model": metric} for metric in metrics_of(("trace", "empty"))]
    + [{"early_stop_interval": None, "metric_for_best_model": "another", "val_dataset": []}],
)
def test_what_can_tell_passes(changed):
    _raise_first(_early_stop(SimpleNamespace(**RUN | changed)))


def test_the_names_are_those_of_an_evaluation():
    import torch

    from megatron_bvpo.objective.stream_losses import WIDTH, sums_of
    from megatron_bvpo.objective.streams import stream_metrics

    for streams in (("trace", "empty"), ORDER):
        ones = {stream: sums_of(stream, torch.ones(WIDTH)) for stream in streams}
        found = stream_metrics(ones, dict.fromkeys(streams, 0.25), rpo=True)
        assert len(found) == len(metrics_of(streams)) and set(found) == set(metrics_of(streams))
    wrong = torch.ones(WIDTH)
    wrong[2] = 0.0  # none is right
    single = {stream: sums_of(stream, wrong, unpaired=True) for stream in ("trace", "empty")}
    found = stream_metrics(single, dict.fromkeys(single, 0.5), rpo=False)
    assert set(metrics_of(single, unpaired=True)) <= set(found) and "rewards/chosen" not in found
