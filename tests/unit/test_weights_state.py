"""What the weights' estimator keeps, says and refuses."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from megatron_bvpo.gradients.weights import WeightEstimator
from tests.unit.gaussian_streams import ALIKE, NAMES, SGD, Gaussian, fed, times


def test_resume_is_exact():
    probes = Gaussian().probes(np.random.default_rng(17), 30)
    make = functools.partial(WeightEstimator, NAMES[:3], **SGD)
    whole, first = fed(make(), probes[:13]), fed(make(), [*probes[:13], times(probes[0], math.nan)])
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict() and resumed.ignored == 1
    fed(whole, probes[13:])
    fed(resumed, probes[13:])
    assert (resumed.weights, resumed.bands, resumed.stderr) == (whole.weights, whole.bands, whole.stderr)


def test_the_memory_is_bounded_and_a_long_state_loads(monkeypatch):
    from megatron_bvpo.gradients import weights

    monkeypatch.setattr(weights, "_KEPT", 10)
    probes = Gaussian().probes(np.random.default_rng(18), 14)
    long = fed(WeightEstimator(NAMES[:3], **SGD), probes)
    assert len(long.state_dict()["kept"]) == 10 and long.probes == 14
    resumed = WeightEstimator(NAMES[:3], **SGD)
    resumed.load_state_dict(long.state_dict())
    assert resumed.weights == long.weights


def test_a_broken_state_is_refused_and_changes_nothing():
    estimator = fed(WeightEstimator(NAMES[:3], **SGD), Gaussian().probes(np.random.default_rng(19), 5))
    good = estimator.state_dict()
    for broken in (
        {k: v for k, v in good.items() if k != "kept"},
        good | {"kept": good["kept"][:-1]},
        good | {"kept": [*good["kept"][:-1], [1.0]]},
        good | {"kept": [*good["kept"][:-1], [math.nan] * 9]},
        good | {"log_scale": math.inf},
        good | {"streams": ["trace", "empty", "short"]},
        good | {"another": 1.0},
    ):
        with pytest.raises(ValueError, match="state of the weights"):
            estimator.load_state_dict(broken)
        assert estimator.state_dict() == good


def test_the_summary_says_it_in_words():
    toy = Gaussian()
    estimator = WeightEstimator(NAMES[:3], criterion="mse", moment_decay=ALIKE)
    fed(estimator, toy.probes(np.random.default_rng(20), 200))
    w, noise = estimator.weights, np.diag(toy.C)
    text = estimator.summary()
    assert text.startswith(f"the weights settled at trace {w['trace']:.2f} ± ")
    told = f"the trace gradient carries {noise[0] / noise[1]:.1f} times the noise of the short one and "
    assert told + f"{noise[0] / noise[2]:.1f} times the noise of the empty one" in text


def test_a_probe_by_the_names_of_the_log():
    probe = Gaussian().probes(np.random.default_rng(21), 1)[0]
    estimator = fed(WeightEstimator(NAMES[:3], **SGD), [probe])
    numbers = estimator.log_numbers(probe)
    assert numbers["gram/C_trace_empty"] == probe.C[0][2] and numbers["gram/D_short_empty"] == probe.D[0][1]
    assert (numbers["weight/short/low"], numbers["weight/short/high"]) == estimator.bands["short"]
    assert len(numbers) == 6 + 3 + 3 * 3


def test_it_imports_no_framework():
    heavy = "{'torch', 'megatron', 'swift', 'scipy'}"
    code = f"import sys, megatron_bvpo.gradients.weights; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
