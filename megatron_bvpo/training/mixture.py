"""How much each stream counts in a step: fixed, or estimated from probes and used for later steps.

Estimators have weights on the simplex. A stream that demonstrates takes its share m from a schedule, and leaves the
others 1 − m; where a gate has chosen for each row (data/gate.py), both sides count whole (MATH.md §6).
"""

from __future__ import annotations

from typing import Any

from swift.utils import get_logger

from megatron_bvpo.gradients.alpha import AlphaEstimator
from megatron_bvpo.gradients.grams import Grams
from megatron_bvpo.gradients.weights import WeightEstimator
from megatron_bvpo.streams import DEFAULT, TABLE, estimators
from megatron_bvpo.training.config import BvpoConfig

logger = get_logger()

# Every step measures until there is evidence for a weight.
FIRST_PROBES = 8
# Beyond these the other stream costs more than it gives.
LOPSIDED = (0.05, 0.95)


class Mixture:
    """The weights that the next step uses.

    Attributes:
        streams: of the run, in the table's order.
        estimated: those of them that estimate the marginal gradient.
        estimator: what their weights are learnt with, or None where these are fixed.
    """

    def __init__(self, config: BvpoConfig):
        self.streams = config.streams
        self.estimated = estimators(config.streams)
        self.estimator: AlphaEstimator | WeightEstimator | None = None
        self._start, self._schedule = config.start_weights, config.schedule
        if config.probes:
            settings = {"criterion": config.criterion, "kappa": config.kappa, "moment_decay": config.moment_decay}
            if self.of_alpha:
                self.estimator = AlphaEstimator(prior=config.alpha_prior, **settings)
            else:
                self.estimator = WeightEstimator(self.estimated, prior=self._start, **settings)

    @property
    def of_alpha(self) -> bool:
        """Trace and empty, or one of them, are all that estimates: one number says it."""
        return bool(self.estimated) and set(self.estimated) <= set(DEFAULT)

    @property
    def alpha(self) -> float:
        """Weight of the trace stream, of what estimates."""
        return self._estimator_weights.get("trace", 0.0)

    @property
    def _estimator_weights(self) -> dict[str, float]:
        """Of each stream that estimates; they add up to 1."""
        if isinstance(self.estimator, AlphaEstimator):
            return {"trace": self.estimator.alpha, "empty": 1 - self.estimator.alpha}
        return self._start if self.estimator is None else self.estimator.weights

    def weights(self, iteration: int) -> dict[str, float]:
        """Each stream's weight in the step behind `iteration` steps, in the order of the streams."""
        share = None if self._schedule is None else self._schedule.at(iteration)
        rest = 1.0 if share is None else 1.0 - share
        mine = self._estimator_weights
        return {
            name: rest * mine[name] if TABLE[name].estimates else (1.0 if share is None else share)
            for name in self.streams
        }

    @property
    def as_it_is(self) -> str:
        """In words: that nothing is learnt."""
        return f"alpha stays at {self.alpha:.2f}" if self.of_alpha else "The weights stay as they are"

    @property
    def apart(self) -> bool:
        """Some stream demonstrates: no probe measures it."""
        return self.streams != self.estimated

    def learn(self, grams: Grams, step: int) -> None:
        """Take in what the probe of `step` (from 1) has measured; that step was mixed with what was known before."""
        ignored = self.estimator.ignored
        self.estimator.update(grams.moments() if self.of_alpha else grams)
        if self.estimator.ignored > ignored:
            logger.warning(f"The probe at step {step} is ignored: {self.estimator.last_ignored}.")
        if self.estimator.probes >= 2 * FIRST_PROBES:
            self._warn_of_idle_streams()

    def _warn_of_idle_streams(self) -> None:
        low, high = LOPSIDED
        if self.of_alpha:
            if not low <= self.alpha <= high:
                stream = "empty" if self.alpha > high else "trace"
                logger.warning_once(
                    f"alpha is {self.alpha:.2f}: the {stream} stream costs a forward and a backward pass and hardly "
                    f"counts. Consider --bvpo_alpha {round(self.alpha)}, which does not run it.",
                    hash_id="bvpo_lopsided_alpha",
                )
            return
        for name, weight in self._estimator_weights.items():
            if weight < low:
                logger.warning_once(
                    f"The weight of the {name} stream is {weight:.2f}: it costs a forward and a backward pass and "
                    "hardly counts. Consider leaving it out of --bvpo_streams.",
                    hash_id=f"bvpo_idle_{name}",
                )

    def metrics(self, iteration: int) -> dict[str, tuple]:
        """Log names to (sum, count): alpha where it says all, else each stream's weight in the step."""
        found = {"alpha": (self.alpha, 1)} if self.of_alpha else {}
        if set(self.streams) <= set(DEFAULT):
            return found
        return found | {f"weight/{name}": (weight, 1) for name, weight in self.weights(iteration).items()}

    def probe_metrics(self, grams: Grams) -> dict[str, tuple]:
        """Log names to (sum, count): what a probe has measured, and what the estimator made of it and the earlier."""
        if not isinstance(self.estimator, AlphaEstimator):
            return {name: (value, 1) for name, value in self.estimator.log_numbers(grams).items()}
        moments = grams.moments()
        found = {f"moments/{name}": (getattr(moments, name), 1) for name in ("D", "X", "W", "V_t")}
        found["alpha/stderr"] = (self.estimator.stderr, 1)
        for name, end in zip(("alpha/low", "alpha/high"), self.estimator.band, strict=True):
            found[name] = (end, 1)
        predicted = self.estimator.predicted_mse()
        if predicted is not None:
            for name in ("trace_only", "empty_only", "half", "chosen"):
                found[f"mse/{name}"] = (getattr(predicted, name), 1)
        return found

    def say_summary(self) -> None:
        """One line in words at the end of a run, where something was estimated."""
        if self.estimator is not None:
            logger.info(self.estimator.summary())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "alpha": self.alpha if self.of_alpha else None,
            "estimator": None if self.estimator is None else self.estimator.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's evidence, if it is of these streams; fixed weights stay what the run was given.

        Raises ValueError where it is damaged.
        """
        evidence = state["estimator"]
        if self.estimator is None or evidence is None:
            return
        measured = tuple(evidence.get("streams", DEFAULT))
        if measured != self.estimated:
            logger.warning(
                f"The checkpoint has measured the streams {', '.join(measured)}, and this run has "
                f"{', '.join(self.estimated)}: their weights are measured anew."
            )
            return
        self.estimator.load_state_dict(evidence)
