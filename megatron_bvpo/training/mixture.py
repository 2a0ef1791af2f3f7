"""How much each stream counts in the mixed loss: fixed, or estimated from probes and used for later steps."""

from __future__ import annotations

from typing import Any

from swift.utils import get_logger

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from megatron_bvpo.training.arguments import BvpoConfig

logger = get_logger()

# Every step measures until there is evidence for an alpha.
FIRST_PROBES = 8
# Beyond these the other stream costs more than it gives.
LOPSIDED = (0.05, 0.95)


class Mixture:
    """The weights that the next step uses.

    Attributes:
        alpha: weight of the trace stream.
        estimator: what alpha is learnt with, or None where it is fixed.
    """

    def __init__(self, config: BvpoConfig):
        self.estimator = None
        if config.alpha is None:
            self.estimator = AlphaEstimator(
                prior=config.alpha_prior,
                criterion=config.criterion,
                kappa=config.kappa,
                moment_decay=config.moment_decay,
            )
        self.alpha = config.alpha_prior if config.alpha is None else config.alpha

    @property
    def weights(self) -> dict[str, float]:
        """Each stream's weight; they add up to 1."""
        return stream_weights(self.alpha)

    def learn(self, moments: Moments, step: int) -> None:
        """Take in what the probe of `step` (from 1) has measured; that step was mixed with what was known before."""
        ignored = self.estimator.ignored
        self.estimator.update(moments)
        if self.estimator.ignored > ignored:
            logger.warning(f"The probe at step {step} is ignored: {self.estimator.last_ignored}.")
        self.alpha = self.estimator.alpha
        low, high = LOPSIDED
        if self.estimator.probes >= 2 * FIRST_PROBES and not low <= self.alpha <= high:
            stream = "empty" if self.alpha > high else "trace"
            logger.warning_once(
                f"alpha is {self.alpha:.2f}: the {stream} stream costs a forward and a backward pass and hardly "
                f"counts. Consider --bvpo_alpha {round(self.alpha)}, which does not run it.",
                hash_id="bvpo_lopsided_alpha",
            )

    def probe_metrics(self, moments: Moments) -> dict[str, tuple]:
        """Log names to (sum, count): what a probe has measured, and what the estimator made of it and the earlier."""
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
        return {"alpha": self.alpha, "estimator": None if self.estimator is None else self.estimator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's evidence; a fixed alpha stays what the run was given. ValueError: it is damaged."""
        if self.estimator is not None and state["estimator"] is not None:
            self.estimator.load_state_dict(state["estimator"])
            self.alpha = self.estimator.alpha


def stream_weights(alpha: float) -> dict[str, float]:
    """Each stream's weight at `alpha`."""
    return {"trace": alpha, "empty": 1 - alpha}
