r"""How many samples each prompt gets: pure arithmetic on what is known of the prompts.

| budget | after the pilot |
|---|---|
| `uniform` | as many for each prompt, no pilot |
| `balanced` | rounds for the prompts that lack three right or three wrong answers |
| `gvm` | n ∝ G / √(p + α/p^(β−1)), none where no pilot answer was right: for training on right answers |
| `pairs` | n ∝ G / √q: a prompt has about q·n pairs, q = min(p, 1 − p), and Σ G²/(q n) is least so |

p is the rate of right answers, G the size of an answer's gradient; `gvm` is arXiv 2505.02391's. For `pairs` q is its
mean under a Beta posterior (uniform prior), which is never 0: a prompt whose pilot was all right or all wrong gets more
samples, not none.

There is no best one (MATH.md §7): less variance is bought with prompts that are no longer seen. `describe` tells the
trade for the prompts at hand.
"""

from collections.abc import Mapping
from typing import NamedTuple

from megatron_bvpo.errors import UserError

BUDGETS = ("uniform", "balanced", "gvm", "pairs")
WANTED = 3  # right and wrong answers after which `balanced` leaves a prompt
GVM_ALPHA, GVM_BETA = 1e-3, 2.0
DESCRIBED_PROMPTS = 4000


class Tally(NamedTuple):
    """What is known of one prompt in one mode.

    Attributes:
        asked: samples that were asked for, failed ones too.
        right, wrong: of the judged ones.
        gradient_norm: the mean of its answers' `Sample.gradient_norm`; None where no server told log-probs.
    """

    asked: int = 0
    right: int = 0
    wrong: int = 0
    gradient_norm: float | None = None


def plan(budget: str, tallies: Mapping[str, Tally], total: int, pilot: int, max_samples: int) -> dict[str, int]:
    """How many more samples each prompt gets next.

    Ask again with new tallies until nothing is left to ask. The same tallies in the same order give the same plan.

    Args:
        budget: one of `BUDGETS`.
        tallies: by prompt; the order of prompts decides between equal ones.
        total: samples that all prompts may get in all.
        pilot: the first round's, per prompt (fewer where `total` has not as many); not of `uniform`.
        max_samples: what one prompt may get in all.

    Returns:
        prompt → more samples, without zeros. {}: nothing is left to ask, though `total` may not be spent.

    Raises:
        UserError: no such budget.
    """
    import numpy as np

    if budget not in BUDGETS:
        raise UserError(f"no budget {budget!r}; there are {', '.join(BUDGETS)}", field="--budget")
    if not tallies:
        return {}
    known = _Known.of(tallies.values())
    more = _more(budget, known, total, pilot, max_samples)
    names = list(tallies)
    return {names[at]: int(more[at]) for at in np.flatnonzero(more)}


class _Known(NamedTuple):
    """Tallies as arrays of one length: integers, and G in arbitrary units."""

    asked: "np.ndarray"  # noqa: F821
    right: "np.ndarray"  # noqa: F821
    wrong: "np.ndarray"  # noqa: F821
    norm: "np.ndarray"  # noqa: F821

    @classmethod
    def of(cls, tallies) -> "_Known":
        import numpy as np

        rows = list(tallies)
        counts = np.array([row[:3] for row in rows], dtype=np.int64)
        norm = np.array([np.nan if row.gradient_norm is None else row.gradient_norm for row in rows], dtype=float)
        told = norm[np.isfinite(norm) & (norm > 0)]
        norm, told = (norm / told.max(), told / told.max()) if told.size else (norm, told)
        # Where nothing is told, the average prompt stands in; a gradient of zero counts as the least that was seen.
        norm = np.where(norm <= 0, told.min() if told.size else 1.0, norm)
        norm = np.where(np.isfinite(norm), norm, told.mean() if told.size else 1.0)
        return cls(*counts.T, norm)


def _more(budget: str, known: _Known, total: int, pilot: int, max_samples: int):
    import numpy as np

    left = total - int(known.asked.sum())
    if left <= 0:
        return np.zeros_like(known.asked)
    if budget == "uniform":
        return _filled(np.ones(len(known.asked)), known.asked, total, max_samples) - known.asked
    first = np.clip(min(pilot, total // len(known.asked), max_samples) - known.asked, 0, None)
    if first.any():
        return _at_most(first, left)
    if budget == "balanced":
        return _balanced(known, left, max(1, pilot), max_samples)
    weight = _gvm_weight(known) if budget == "gvm" else known.norm / np.sqrt(_posterior_rarity(known))
    return _filled(weight, known.asked, total, max_samples) - known.asked


def _balanced(known: _Known, left: int, step: int, max_samples: int):
    """`step` more for each prompt that lacks answers of a kind; at the end for those that were asked least."""
    import numpy as np

    lacks = (np.minimum(known.right, known.wrong) < WANTED) & (known.asked < max_samples)
    more = np.where(lacks, np.minimum(step, max_samples - known.asked), 0)
    return _at_most(more, left, np.argsort(known.asked, kind="stable"))


def _at_most(more, left: int, order=None):
    """A round cut to what is left, in the order of the prompts or in another one."""
    import numpy as np

    order = np.arange(len(more)) if order is None else order
    before = np.cumsum(more[order]) - more[order]
    cut = np.zeros_like(more)
    cut[order] = np.clip(left - before, 0, more[order])
    return cut


def _gvm_weight(known: _Known):
    import numpy as np

    judged = known.right + known.wrong
    rate = known.right / np.maximum(judged, 1)
    safe = np.where(rate > 0, rate, 1.0)
    return np.where(rate > 0, known.norm / np.sqrt(safe + GVM_ALPHA / safe ** (GVM_BETA - 1)), 0.0)


def _posterior_rarity(known: _Known, points: int = 512):
    """The mean of q = min(p, 1 − p), p ~ Beta(1 + right, 1 + wrong), per prompt."""
    import numpy as np

    p = (np.arange(points) + 0.5) / points
    pairs, which = np.unique(np.stack([known.right, known.wrong], axis=1), axis=0, return_inverse=True)
    # In blocks: of ten thousand different tallies the densities would take 40 MB at once.
    means = [
        _means(pairs[at : at + 1024], np.log(p), np.log1p(-p), np.minimum(p, 1 - p))
        for at in range(0, len(pairs), 1024)
    ]
    return np.concatenate(means)[which.reshape(-1)]


def _means(pairs, log_p, log_not_p, q):
    import numpy as np

    density = pairs[:, :1] * log_p + pairs[:, 1:] * log_not_p
    density = np.exp(density - density.max(axis=1, keepdims=True))
    return density @ q / density.sum(axis=1)


def _filled(weight, least, total: int, most: int):
    """n ∝ weight within [least, most], Σ n = total where the bounds allow it: by largest remainders."""
    import numpy as np

    high = np.maximum(least, np.where(weight > 0, most, 0))
    total = int(min(total, high.sum()))
    if not (weight > 0).any() or total <= least.sum():
        return least.copy()
    # A billionth of the greatest is the least: ratios of any two floats would overflow.
    weight = np.where(weight > 0, np.maximum(weight / weight.max(), 1e-9), 0.0)
    low_c, high_c = 0.0, (most + 1.0) / weight[weight > 0].min()
    for _ in range(80):
        c = (low_c + high_c) / 2
        low_c, high_c = (low_c, c) if np.clip(c * weight, least, high).sum() > total else (c, high_c)
    exact = np.clip(low_c * weight, least, high)
    number = np.floor(exact + 1e-9).astype(np.int64)
    room = np.flatnonzero(number < high)
    by_remainder = room[np.argsort(number[room] - exact[room], kind="stable")]
    number[by_remainder[: max(0, total - int(number.sum()))]] += 1
    return number


class Outlook(NamedTuple):
    """What a budget comes to.

    Attributes:
        seen: share of prompts with a right and a wrong answer.
        pairs_per_sample: Σ min(right, wrong) / samples.
        variance: of the mean gradient of the seen prompts' pairs, Σ G²/m over those prompts, divided by their number
            squared, times the number of all prompts.
        spent: samples.
        dropped: share of prompts that got nothing after the pilot and have no pair.
    """

    seen: float
    pairs_per_sample: float
    variance: float
    spent: int
    dropped: float


def simulate(
    budget: str, rate, start: Mapping[str, Tally] | None, total: int, pilot: int, max_samples: int, random, norm=None
):
    """Drive a budget to its end on prompts whose rate of right answers is known.

    Args:
        budget: one of `BUDGETS`.
        rate: [prompts], in [0, 1].
        start: what is known already; None for nothing.
        total, pilot, max_samples: as in `plan`.
        random: a numpy Generator.
        norm: [prompts], G; without it `start`'s, else 1.

    Returns:
        An `Outlook`.
    """
    import numpy as np

    if start is not None:
        known = _Known.of(start.values())
    else:
        nothing = np.zeros(len(rate), dtype=np.int64)
        known = _Known(nothing, nothing, nothing, np.ones(len(rate)))
    if norm is not None:
        known = known._replace(norm=np.asarray(norm, dtype=float))
    had = known.asked
    while (more := _more(budget, known, total, pilot, max_samples)).any():
        right = random.binomial(more, rate)
        known = _Known(known.asked + more, known.right + right, known.wrong + more - right, known.norm)
    made = np.minimum(known.right, known.wrong)
    seen = made > 0
    spent = int(known.asked.sum())
    terms = known.norm[seen] ** 2 / made[seen]
    variance = float(terms.sum()) / max(1, seen.sum()) ** 2 * len(rate)
    idle = known.asked <= np.maximum(had, min(pilot, max_samples))
    return Outlook(float(seen.mean()), float(made.sum()) / max(1, spent), variance, spent, float((idle & ~seen).mean()))


def describe(tallies: Mapping[str, Tally], total: int, pilot: int, max_samples: int, chosen: str) -> list[str]:
    """The trade between variance and lost prompts for the prompts at hand, as a table of all budgets and a sentence.

    Rates of right answers are drawn once from what the tallies say of each prompt, with a prior fitted to all of them,
    and each budget is driven to its end on them. At most `DESCRIBED_PROMPTS` prompts are looked at.

    Args:
        tallies: by prompt, as a rule after the pilot.
        total, pilot, max_samples: as in `plan`.
        chosen: the budget of the run.
    """
    import numpy as np

    names = list(tallies)
    judged = sum(tally.right + tally.wrong for tally in tallies.values())
    if not judged:
        return ["no answer is judged yet: what a budget will come to cannot be told"]
    if len(names) > DESCRIBED_PROMPTS:
        names = [names[at] for at in np.linspace(0, len(names) - 1, DESCRIBED_PROMPTS).astype(int)]
    start = {name: tallies[name] for name in names}
    share = max(1, round(total * len(names) / len(tallies)))
    known = _Known.of(start.values())
    a, b = _prior(known)
    rate = np.random.default_rng(0).beta(known.right + a, known.wrong + b)
    outlooks = {
        budget: simulate(budget, rate, start, share, pilot, max_samples, np.random.default_rng(1)) for budget in BUDGETS
    }
    return _table(outlooks, chosen, len(tallies), len(tallies) / len(names), total)


def _table(outlooks: dict[str, Outlook], chosen: str, prompts: int, scale: float, total: int) -> list[str]:
    base = outlooks["uniform"]
    lines = [
        "expected of each budget on these prompts:",
        "budget       prompts with a pair    pairs a sample    variance (uniform: 1)    samples spent",
    ]
    for budget, look in outlooks.items():
        mark = "*" if budget == chosen else " "
        variance = look.variance / base.variance if base.variance else float("nan")
        lines.append(
            f"{mark} {budget:<10} {look.seen:>19.2f} {look.pairs_per_sample:>17.2f} {variance:>24.2f} "
            f"{min(total, round(look.spent * scale)):>16}"
        )
    look, lost = outlooks[chosen], outlooks[chosen].seen - base.seen
    if chosen != "uniform":
        change = look.variance / base.variance - 1 if base.variance else 0.0
        lines.append(
            f"{chosen} against uniform: variance of the gradient {change:+.0%}, prompts with a pair "
            f"{round(lost * prompts):+d} of {prompts}"
            + (f"; {round(look.dropped * prompts)} are given up after the pilot" if look.dropped else "")
        )
        if lost < -0.02:
            ends = "the hardest" if chosen == "gvm" else "the hardest and the easiest"
            lines.append(f"the prompts that are lost are {ends}: the training set moves to the middle")
    return lines


def _prior(known: _Known) -> tuple[float, float]:
    """A Beta distribution of the prompts' rates by moments of the judged counts; uniform where they do not tell."""
    import numpy as np

    judged = (known.right + known.wrong).astype(float)
    has = judged >= 2
    if has.sum() < 20:
        return 1.0, 1.0
    n, right = judged[has], known.right[has].astype(float)
    mean = float(right.sum() / n.sum())
    # E[R(R−1)] = n(n−1) E[p²]
    square = float((right * (right - 1)).sum() / (n * (n - 1)).sum())
    spread = square - mean**2
    if not 0 < mean < 1 or spread <= 0 or mean * (1 - mean) <= spread:
        return 1.0, 1.0
    size = float(np.clip(mean * (1 - mean) / spread - 1, 0.2, 50.0))
    return mean * size, (1 - mean) * size
