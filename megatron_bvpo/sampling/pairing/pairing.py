"""From the judged samples of prompts to pairs. Pure and deterministic: no files, no texts.

A sample comes as a `Candidate`: what is known of it beside its text. Each prompt and mode gives at most k pairs, and no
sample stands in two of them. Chance (`--rejected random`, ties) comes from the seed and the prompt alone, so that the
pairs of a prompt do not depend on which other prompts there are, except under `match_length`, which looks at all.
"""

import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Why a prompt has no pair in a mode, in the words of the report.
NO_SAMPLES, FAILED, NOT_JUDGED = "no samples", "whose request failed", "not judged"
ALL_RIGHT, ALL_WRONG, NO_SCORE, NO_VERDICT = "all right", "all wrong", "no score", "without a verdict"
UNPARSED = "no answer was read out of the wrong ones"
EQUAL_SCORES, MARGIN, ONE_TEXT = "equal scores", "the scores differ by less than --margin", "one text alone"
NO_TRACES = "no two of them of which one has a trace"
DUPLICATE = "the same text as another sample"
BOTH_WAYS = "the same text was judged right and wrong"

POLICIES, REJECTED = ("right_wrong", "best_worst"), ("random", "likely")
# More pairs of samples than these are not all looked at: the longest and shortest are, and a draw of the others.
_MOST_PAIRS = 400


@dataclass(slots=True)
class Candidate:
    """What is known of one sample beside its text.

    Attributes:
        folder: number of its folder.
        prompt_id, number: its name there.
        digest: of the text without outer white space; equal texts have one digest.
        characters: length of the text.
        tokens: length in tokens, where the server told it.
        logprob: mean log-probability of a token, where the server told it.
        unusable: why it can be no side of a pair; None where it can.
        traced: the text has a trace; for empty samples without meaning.
        right, score, parsed: the judge's words; `parsed`: an answer was read out of the text.
        seen: the judge has looked at it; whether or not it came to a verdict or a score (`judged`).
    """

    folder: int
    prompt_id: str
    number: int
    digest: int
    characters: int
    tokens: int | None = None
    logprob: float | None = None
    unusable: str | None = None
    traced: bool = True
    right: bool | None = None
    score: float | None = None
    parsed: bool = False
    seen: bool = False

    @property
    def judged(self) -> bool:
        return self.right is not None or self.score is not None

    @property
    def name(self) -> tuple[int, str, int]:
        return self.folder, self.prompt_id, self.number


class Pair(NamedTuple):
    chosen: Candidate
    rejected: Candidate


@dataclass(frozen=True)
class PairRules:
    """How pairs are chosen.

    Attributes:
        policy: `right_wrong`: a right sample over a wrong one of which an answer was read; `best_worst`: the highest
            score over the lowest.
        rejected: under right_wrong, which wrong one: `random`, or `likely`, the one with the highest mean log-prob.
        margin: least difference of the two scores. 0 asks best_worst for a difference, and right_wrong for nothing.
        most: pairs of a prompt in each mode.
        match_length: choose among the possible pairs so that the shorter side is the chosen one in half of them.
        seed: of all draws.
    """

    policy: str = "right_wrong"
    rejected: str = "random"
    margin: float = 0.0
    most: int = 1
    match_length: bool = False
    seed: int = 0


@dataclass
class Pool:
    """The samples of one prompt in one mode: which may be chosen, which rejected, or why there is no pair."""

    key: Hashable
    mode: str
    chosen: list[Candidate] = field(default_factory=list)
    rejected: list[Candidate] = field(default_factory=list)
    reason: str | None = None


def accept_rate(candidates: Iterable[Candidate]) -> float | None:
    """Share of right ones among the samples that were judged right or wrong; None where none was."""
    verdicts = [c.right for c in candidates if c.right is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def distinct(candidates: Sequence[Candidate]) -> tuple[list[Candidate], Counter[str]]:
    """(usable candidates, each text once; what was left out, by reason). Of equal texts the first counts."""
    left_out: Counter[str] = Counter()
    by_text: dict[int, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: c.name):
        if candidate.unusable:
            left_out[candidate.unusable] += 1
        else:
            by_text.setdefault(candidate.digest, []).append(candidate)
    kept = []
    for same in by_text.values():
        if len({c.right for c in same if c.right is not None}) > 1:
            left_out[BOTH_WAYS] += len(same)
            continue
        left_out[DUPLICATE] += len(same) - 1
        kept.append(min(same, key=lambda c: (c.right is None, not c.judged, c.name)))
    return kept, +left_out


def pool_of(key: Hashable, mode: str, candidates: Sequence[Candidate], rules: PairRules) -> tuple[Pool, Counter[str]]:
    """(what may be chosen and rejected, or why there is no pair; the samples left out, by reason)."""
    pool = Pool(key, mode)
    kept, left_out = distinct(candidates)
    if not candidates:
        pool.reason = NO_SAMPLES
    elif not kept:
        pool.reason = left_out.most_common(1)[0][0]
    elif not any(c.judged for c in kept):
        pool.reason = NO_VERDICT if any(c.seen for c in kept) else NOT_JUDGED
    elif rules.policy == "right_wrong":
        _right_and_wrong(pool, candidates, kept)
    else:
        _by_score(pool, kept)
    if pool.reason is None and not _any_pair(pool, rules):
        pool.reason = MARGIN if rules.margin > 0 else NO_TRACES
    return pool, left_out


def _right_and_wrong(pool: Pool, candidates: Sequence[Candidate], kept: list[Candidate]) -> None:
    pool.chosen = [c for c in kept if c.right is True]
    wrong = [c for c in kept if c.right is False]
    pool.rejected = [c for c in wrong if c.parsed]
    verdicts = {c.right for c in candidates if c.right is not None}
    if not verdicts:
        pool.reason = NO_VERDICT
    elif not pool.chosen:
        pool.reason = ALL_WRONG if True not in verdicts else _why_none(candidates, True, "right")
    elif not pool.rejected:
        if False not in verdicts:
            pool.reason = ALL_RIGHT
        else:
            pool.reason = UNPARSED if wrong else _why_none(candidates, False, "wrong")


def _why_none(candidates: Sequence[Candidate], right: bool, word: str) -> str:
    reasons = Counter(c.unusable or BOTH_WAYS for c in candidates if c.right is right)
    return f"the {word} ones cannot be used: {reasons.most_common(1)[0][0]}"


def _by_score(pool: Pool, kept: list[Candidate]) -> None:
    scored = [c for c in kept if c.score is not None and math.isfinite(c.score)]
    pool.chosen, pool.rejected = scored, scored
    if not scored:
        pool.reason = NO_SCORE
    elif len(scored) == 1:
        pool.reason = ONE_TEXT
    elif len({c.score for c in scored}) == 1:
        pool.reason = EQUAL_SCORES


def fits(chosen: Candidate, rejected: Candidate, pool: Pool, rules: PairRules) -> bool:
    """Whether the two make a pair: other texts, a margin, and a trace in one of them where the mode has traces."""
    if chosen.digest == rejected.digest or (pool.mode != "empty" and not (chosen.traced or rejected.traced)):
        return False
    if rules.policy == "right_wrong" and not rules.margin:
        return True
    if chosen.score is None or rejected.score is None:
        return False
    gap = chosen.score - rejected.score
    return gap >= rules.margin and (gap > 0 or rules.policy == "right_wrong")


def _any_pair(pool: Pool, rules: PairRules) -> bool:
    return next(_options(pool, rules, set()), None) is not None


# --- which pairs of a pool ---


def _options(pool: Pool, rules: PairRules, used: set):
    """The pairs that may be next, in a random order: of the policy's best ones, all that are equally good."""
    draw = random.Random(f"{rules.seed}|{pool.key}|{pool.mode}|{len(used)}")
    chosen = [c for c in pool.chosen if c.name not in used]
    rejected = [c for c in pool.rejected if c.name not in used]
    draw.shuffle(chosen)
    draw.shuffle(rejected)
    if rules.policy == "best_worst":
        if not chosen:
            return
        best, worst = max(c.score for c in chosen), min(c.score for c in rejected)
        chosen, rejected = [c for c in chosen if c.score == best], [c for c in rejected if c.score == worst]
        groups = [rejected]
    elif rules.rejected == "likely":
        levels = sorted({_likelihood(c) for c in rejected}, reverse=True)
        groups = [[c for c in rejected if _likelihood(c) == level] for level in levels]
    else:
        groups = [rejected]
    for group in groups:
        found = False
        for one, other in _combined(chosen, group):
            if fits(one, other, pool, rules):
                found = True
                yield Pair(one, other)
        if found:
            return


def _likelihood(candidate: Candidate) -> float:
    return -math.inf if candidate.logprob is None else candidate.logprob


def _combined(chosen: list[Candidate], rejected: list[Candidate]):
    """All combinations, neighbours in the draw first; of very many, the extremes of length and a part."""
    if len(chosen) * len(rejected) > _MOST_PAIRS:
        chosen, rejected = _thinned(chosen), _thinned(rejected)
    n = max(len(chosen), len(rejected))
    for shift in range(n):
        for i in range(n):
            j = (i + shift) % n
            if i < len(chosen) and j < len(rejected):
                yield chosen[i], rejected[j]


def _thinned(candidates: list[Candidate]) -> list[Candidate]:
    most = math.isqrt(_MOST_PAIRS)
    if len(candidates) <= most:
        return candidates
    by_length = sorted(candidates, key=lambda c: c.characters)
    ends = [by_length[0], by_length[-1]]
    return [*ends, *[c for c in candidates if c not in ends][: most - 2]]


def choose_pairs(pools: Iterable[Pool], rules: PairRules) -> dict[tuple[Hashable, str], list[Pair]]:
    """At most `rules.most` pairs for each pool, by (key, mode). Pools with a reason have none."""
    open_pools = {(pool.key, pool.mode): pool for pool in pools if pool.reason is None}
    found: dict[tuple[Hashable, str], list[Pair]] = {name: [] for name in open_pools}
    used: dict[tuple[Hashable, str], set] = {name: set() for name in open_pools}
    for _ in range(rules.most):
        if rules.match_length:
            options = {name: _by_sign(_options(pool, rules, used[name])) for name, pool in open_pools.items()}
            chosen = _balanced(options, found, rules)
        else:
            firsts = {name: next(_options(pool, rules, used[name]), None) for name, pool in open_pools.items()}
            chosen = {name: pair for name, pair in firsts.items() if pair is not None}
        for name, pair in chosen.items():
            found[name].append(pair)
            used[name] |= {pair.chosen.name, pair.rejected.name}
        open_pools = {name: pool for name, pool in open_pools.items() if name in chosen}
    return found


# --- lengths ---


def shorter(pair: Pair) -> int:
    """1 where the chosen side has fewer characters, −1 where it has more, 0 where they are equal."""
    chosen, rejected = pair.chosen.characters, pair.rejected.characters
    return (chosen < rejected) - (chosen > rejected)


def _by_sign(pairs: Iterable[Pair]) -> dict[int, Pair]:
    """For each sign of `shorter`, the pair of the most equal lengths; of those, whose tokens say the same."""
    best: dict[int, tuple[tuple[bool, float], Pair]] = {}
    for pair in pairs:
        sign = shorter(pair)
        tokens = pair.chosen.tokens, pair.rejected.tokens
        agrees = None in tokens or (tokens[0] < tokens[1]) - (tokens[0] > tokens[1]) == sign
        unlike = abs(math.log((pair.chosen.characters + 1) / (pair.rejected.characters + 1)))
        rank = (not agrees, unlike)
        if sign not in best or rank < best[sign][0]:
            best[sign] = rank, pair
    return {sign: pair for sign, (_, pair) in best.items()}


def _balanced(
    options: Mapping[tuple[Hashable, str], dict[int, Pair]], before: Mapping[tuple, list[Pair]], rules: PairRules
) -> dict[tuple[Hashable, str], Pair]:
    """One pair of each prompt, so that in each mode, with the pairs before, as many are shorter as are longer."""
    chosen: dict[tuple[Hashable, str], Pair] = {}
    for mode in sorted({mode for _, mode in options}):
        mine = [(name, by_sign) for name, by_sign in options.items() if name[1] == mode and by_sign]
        balance = sum(shorter(pair) for (_, m), pairs in before.items() if m == mode for pair in pairs)
        signs = {name: 0 if 0 in by_sign else max(by_sign) for name, by_sign in mine}
        balance += sum(signs.values())
        # Who has the choice moves it towards 0: first from shorter to longer, then from a tie to whatever is needed.
        free = [(name, by_sign) for name, by_sign in mine if len(by_sign) > 1]
        random.Random(f"{rules.seed}|{mode}|{len(free)}").shuffle(free)
        for name, by_sign in sorted(free, key=lambda item: 0 in item[1]):
            step = -1 if balance > 0 else 1
            if balance and step in by_sign and step != signs[name]:
                balance += step - signs[name]
                signs[name] = step
        chosen.update({name: by_sign[signs[name]] for name, by_sign in mine})
    return chosen


def preferring_shorter(lengths: Iterable[tuple[int, int]]) -> float | None:
    """Share of pairs (chosen, rejected) whose chosen side is the shorter one, ties counting half; None without."""
    score, n = 0.0, 0
    for chosen, rejected in lengths:
        score += 1.0 if chosen < rejected else 0.5 if chosen == rejected else 0.0
        n += 1
    return score / n if n else None
