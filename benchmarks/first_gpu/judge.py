"""Do two runs agree? What is compared, and how far roundings may part them.

u is the rounding of one number: 2^-24 in float32, 2^-9 in bfloat16. Bounds are multiples of u, as every quantity is
itself a sum of rounded terms:

- a sequence's log-prob, relative: roundings of its tokens (some 60 on the way through four layers and the head) are
  independent and partly cancel in the sum. The multiple is also room for tokens that a rounded router sends elsewhere.
- a gradient norm, relative: each element is a sum over all tokens.
- a loss, absolute: a pair's margin is beta times a sum of four log-probs, whose independent errors add to twice that of
  one; the loss moves by half of the margin; and the mean over a step's 8 pairs divides what is left, by up to 3.

The multiples were chosen with the differences of four CPU ranks (TP2 · PP2 · EP2) from one at hand, which are in
docs/first-gpu-run.md: they are calibrated, not proved. A bound that a sound GPU misses is a finding, not a reason to
raise it: say what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, BFLOAT16 = "float32", "bfloat16"
ROUNDING = {FLOAT32: 2.0**-24, BFLOAT16: 2.0**-9}
LOG_PROB, GRADIENT_NORM = {FLOAT32: 8, BFLOAT16: 1}, {FLOAT32: 64, BFLOAT16: 4}
BETA = 0.1


@dataclass(frozen=True)
class Verdict:
    """What a comparison found: the quantity that came nearest to its bound, or beyond it."""

    ok: bool
    quantity: str
    number: float
    bound: float
    all: dict

    def line(self) -> dict:
        return {"ok": self.ok, "quantity": self.quantity, "number": self.number, "bound": self.bound, "all": self.all}


class Disagreement(ValueError):
    """The runs cannot be compared: other steps or other rows."""


def judge(found: list[dict], wanted: list[dict], dtype: str, kind: str) -> Verdict:
    """Compare the steps of two runs, as `recorder.merged` gives them.

    Raises:
        Disagreement: they have no steps, or not the same rows, or a rank that should get no tokens got some.
    """
    if kind == "resume":
        wanted = [step for step in wanted if step["step"] > 2]
    if kind == "starved" and (got := sum(step["starved_tokens"] for step in found)):
        raise Disagreement(f"{got} tokens went to experts that should get none: the router's patch did not hold")
    if not wanted or [s["step"] for s in found] != [s["step"] for s in wanted]:
        raise Disagreement(f"steps {[s['step'] for s in found]} against {[s['step'] for s in wanted]}")
    u = ROUNDING[dtype]
    log_prob = LOG_PROB[dtype] * u
    largest = max(abs(value) for step in wanted for values in step["logps"].values() for value in values)
    return verdict(
        {
            "log-prob of a sequence, relative": (_log_probs(found, wanted), log_prob),
            "gradient norm, relative": (
                _worst(found, wanted, lambda a, b: abs(a - b) / abs(b), "grad_norm"),
                GRADIENT_NORM[dtype] * u,
            ),
            "loss": (_worst(found, wanted, lambda a, b: abs(a - b), "loss"), BETA * log_prob * largest / 4),
            "weight of the trace stream": (_worst(found, wanted, lambda a, b: abs(a - b), "alpha"), 0.02),
        }
    )


def verdict(numbers: dict[str, tuple[float, float]]) -> Verdict:
    """Of quantities (number, bound) the one nearest to its bound; what is no number is beyond any."""

    def share(name: str) -> float:
        number, bound = numbers[name]
        return number / bound if number == number else float("inf")

    worst = max(numbers, key=share)
    return Verdict(share(worst) <= 1, worst, *numbers[worst], all=numbers)


def _worst(found, wanted, distance, key: str) -> float:
    differences = [distance(a[key], b[key]) for a, b in zip(found, wanted, strict=True)]
    return float("nan") if any(d != d for d in differences) else max(differences)


def _log_probs(found: list[dict], wanted: list[dict]) -> float:
    worst = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine["logps"].keys() != theirs["logps"].keys():
            raise Disagreement(f"step {mine['step']} has other rows: {sorted(mine['logps'])[:3]} …")
        for row, values in theirs["logps"].items():
            for a, b in zip(mine["logps"][row], values, strict=True):
                if a != a or b != b:
                    return float("nan")
                worst = max(worst, abs(a - b) / abs(b))
    return worst
