"""`bvpo pairs`, from folders to files: read the facts, choose, write the rows, and keep what the report tells."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bvpo.data.whole_files import written_whole
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.pairing.pair_mixing import Lot, held_out, mixed
from megatron_bvpo.sampling.pairing.pair_rows import RowWriter
from megatron_bvpo.sampling.pairing.pairing import Pair, PairRules, Pool, accept_rate, choose_pairs, pool_of
from megatron_bvpo.sampling.pairing.prompt_overlap import Overlap
from megatron_bvpo.sampling.pairing.sample_facts import Facts, Folder, Texts, gather, settled_judge
from megatron_bvpo.sampling.pairing.side_words import SideWords, side_words
from megatron_bvpo.sampling.samples import MODES, read_prompts


@dataclass(frozen=True)
class PairsPlan:
    """What `bvpo pairs` was asked for, checked.

    Attributes:
        folders, judge, rules: whose samples, by whose words, how.
        outputs: the file of each part, `pairs` and perhaps `held-out`.
        shares: of the folders by name; None: all prompts of all.
        heldout: a share or a number of prompts; None: no such part.
        exclude, ngram: evaluation files whose prompts are dropped, and the words of an n-gram.
    """

    folders: tuple[Folder, ...]
    outputs: dict[str, Path]
    judge: str | None = None
    rules: PairRules = PairRules()
    keep_truncated: bool = False
    shares: dict[str, float] | None = None
    heldout: float | int | None = None
    exclude: tuple[str, ...] = ()
    ngram: int = 13


@dataclass
class Outcome:
    """What there was and what became of it, for the report.

    Attributes:
        prompts: how many there were, excluded ones too.
        reasons: for each mode, why prompts have no pair.
        left_out: for each mode, why samples were left out.
        rates: for each mode, the accept rates of prompts.
        whole: prompts that would have given a row, and how many of them the mix left out.
        parts: what was written, by part.
        words: what tells the sides apart, by mode.
    """

    plan: PairsPlan
    facts: Facts
    prompts: int = 0
    modes: list[str] = field(default_factory=list)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    usable: int = 0
    not_mixed: int = 0
    suspect: str | None = None
    parts: dict[str, RowWriter] = field(default_factory=dict)
    words: dict[str, SideWords] = field(default_factory=dict)

    def pairs(self, mode: str) -> list[Pair]:
        return [pair for part in self.parts.values() for pair in part.written[mode]]


def make_pairs(plan: PairsPlan) -> Outcome:
    """Writes the rows; every file is there whole, or none is.

    Raises:
        UserError: a folder, a judge or an evaluation file is not what it must be, or there is no pair at all.
    """
    judge = settled_judge(plan.folders, plan.judge)
    overlap = Overlap(plan.exclude, plan.ngram) if plan.exclude else None
    exclude = overlap.reason if overlap else None
    facts = gather(plan.folders, judge, keep_truncated=plan.keep_truncated, exclude=exclude)
    _require_verdicts(facts, plan.rules)
    outcome = Outcome(plan, facts, len(facts.prompts) + len(facts.excluded))
    outcome.suspect = overlap.suspect() if overlap else None
    pools, rates = _pools(facts, plan.rules, outcome)
    parts = _parts(facts, pools, plan, outcome)
    pairs = {part: choose_pairs((p for p in pools if p.key in keys), plan.rules) for part, keys in parts.items()}
    _write(plan, facts, pairs, rates, outcome)
    return outcome


def _require_verdicts(facts: Facts, rules: PairRules) -> None:
    """A policy that the judge's words cannot serve would give no pair, and no reason that helps."""
    where = str(facts.folders[0].path)
    candidates = [c for _, _, found in facts.pools() for c in found]
    if not candidates:
        raise UserError("no samples yet", file=where, remedy="bvpo sample goes on where it was stopped")
    judge, other = facts.judge, f"bvpo judge {where} --with SPEC"
    if rules.policy == "right_wrong":
        verdicts = [c for c in candidates if c.right is not None]
        if not verdicts:
            remedy = f"take --policy best_worst, or another judge ({other})"
            raise UserError(f"judge {judge!r} says of no sample whether it is right", file=where, remedy=remedy)
        if not any(c.parsed for c in verdicts):
            remedy = f"have it tell what it read (`parsed`), take --policy best_worst, or another judge ({other})"
            problem = f"judge {judge!r} reads no answer out of any text, so no wrong one is known to have an answer"
            raise UserError(problem, file=where, remedy=remedy)
        if rules.rejected == "likely" and not any(c.logprob is not None for c in candidates):
            remedy = "sample from a server that tells log-probabilities, or take --rejected random"
            raise UserError("no sample has a log-probability", file=where, field="--rejected", remedy=remedy)
    if (rules.policy == "best_worst" or rules.margin) and not any(c.score is not None for c in candidates):
        field = "--policy" if rules.policy == "best_worst" else "--margin"
        raise UserError(f"judge {judge!r} gives no scores", file=where, field=field, remedy=f"take another ({other})")


def _pools(facts: Facts, rules: PairRules, outcome: Outcome) -> tuple[list[Pool], dict[tuple[str, str], float | None]]:
    outcome.modes = [mode for mode in MODES if facts.samples[mode]]
    pools, rates = [], {}
    for mode in outcome.modes:
        outcome.reasons[mode], outcome.left_out[mode], outcome.rates[mode] = Counter(), Counter(), []
    for prompt, mode, candidates in facts.pools():
        if mode not in outcome.modes:
            continue
        pool, left_out = pool_of(prompt.key, mode, candidates, rules)
        pools.append(pool)
        outcome.left_out[mode] += left_out
        if pool.reason:
            outcome.reasons[mode][pool.reason] += 1
        rate = rates[prompt.key, mode] = accept_rate(candidates)
        if rate is not None:
            outcome.rates[mode].append(rate)
    return pools, rates


def _parts(facts: Facts, pools: Sequence[Pool], plan: PairsPlan, outcome: Outcome) -> dict[str, set[str]]:
    """Keys of the prompts of each part."""
    usable = {pool.key for pool in pools if pool.reason is None and pool.mode != "short"}
    if not usable:
        _refuse_nothing(outcome)
    outcome.usable = len(usable)
    names = [folder.name for folder in plan.folders]
    lots = [Lot(key, p.split_key, names[p.folder]) for key, p in facts.prompts.items() if key in usable]
    if plan.shares is not None:
        kept = mixed(lots, plan.shares, plan.rules.seed)
        if not kept:
            empty = [name for name, share in plan.shares.items() if share and not any(x.source == name for x in lots)]
            remedy = f"leave it out with {empty[0]}=0" if empty else "sample more prompts"
            raise UserError("no prompt is left of the mix", field="--mix", remedy=remedy)
        outcome.not_mixed = len(lots) - len(kept)
        lots = [lot for lot in lots if lot.key in kept]
    held = held_out(lots, plan.heldout, plan.rules.seed) if plan.heldout is not None else set()
    parts = {"pairs": {lot.key for lot in lots} - held}
    return parts | {"held-out": held} if plan.heldout is not None else parts


def _refuse_nothing(outcome: Outcome) -> None:
    told = [
        f"{mode}: " + ", ".join(f"{number} {reason}" for reason, number in counts.most_common(3))
        for mode, counts in outcome.reasons.items()
        if counts
    ]
    if outcome.facts.excluded:
        told.append(f"{len(outcome.facts.excluded)} prompts stand in an evaluation set")
    where = ", ".join(str(folder.path) for folder in outcome.plan.folders)
    remedy = "sample more answers or other prompts, or look at what the judge reads out of them"
    raise UserError(f"no pair at all ({'; '.join(told)})", file=where, remedy=remedy)


def _write(plan: PairsPlan, facts: Facts, pairs: dict, rates: dict, outcome: Outcome) -> None:
    wanted = {
        (candidate.folder, candidate.prompt_id, mode, candidate.number)
        for found in pairs.values()
        for (_, mode), several in found.items()
        for pair in several
        for candidate in pair
    }
    beside = next(iter(plan.outputs.values())).absolute().parent
    texts = Texts(plan.folders, wanted, beside)
    try:
        with ExitStack() as stack:
            files = {part: stack.enter_context(written_whole(path)) for part, path in plan.outputs.items()}
            outcome.parts = {part: RowWriter(facts, texts, rates) for part in plan.outputs}
            for part, row in _rows(plan, facts, pairs, outcome):
                files[part].write(json.dumps(row, ensure_ascii=False) + "\n")
            if not outcome.parts["pairs"].tally.rows:
                lost = outcome.parts["pairs"].lost.most_common(3)
                told = "; ".join(f"{number} {reason}" for reason, number in lost)
                raise UserError(
                    f"the trainer would keep no row ({told})",
                    file=str(plan.folders[0].path),
                    remedy="docs/rows.md says what it asks of rows",
                )
        outcome.words = {mode: found for mode in outcome.modes if (found := _words(mode, outcome, texts))}
    finally:
        texts.close()


def _rows(plan: PairsPlan, facts: Facts, pairs: dict, outcome: Outcome) -> Iterator[tuple[str, dict]]:
    for number, folder in enumerate(plan.folders):
        for prompt in read_prompts(folder.path):
            found = facts.prompts.get(facts.asked.get((number, prompt.prompt_id), ""))
            here = (number, prompt.prompt_id, prompt.source)
            if found is None or (found.folder, found.prompt_id, found.source) != here:
                continue  # an equal prompt came before
            for part, chosen in pairs.items():
                mine = {mode: chosen[found.key, mode] for mode in outcome.modes if chosen.get((found.key, mode))}
                for row in outcome.parts[part].rows(prompt, found, mine):
                    yield part, row


def _words(mode: str, outcome: Outcome, texts: Texts) -> SideWords | None:
    pairs = outcome.pairs(mode)
    prompts = [outcome.facts.asked[pair.chosen.folder, pair.chosen.prompt_id] for pair in pairs]

    def sides(number: int) -> tuple[str, str]:
        chosen, rejected = (texts[c.folder, c.prompt_id, mode, c.number] for c in pairs[number])
        return chosen, rejected

    return side_words(prompts, sides)
