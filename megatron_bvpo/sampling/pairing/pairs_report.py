"""The report of `bvpo pairs`: what was made, why the rest was not, and what to fear of the pairs. Markdown lines."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean, median

from megatron_bvpo.sampling.pairing.pairing import FAILED, UNPARSED, Pair, preferring_shorter
from megatron_bvpo.sampling.pairing.pairs_run import Outcome
from megatron_bvpo.sampling.pairing.sample_facts import CUT, STILL_THINKS, other_settings

# Edges of the accept rates' histogram: none and all apart.
BINS = ("0", "to .25", "to .5", "to .75", "below 1", "1")
_FEW_PROMPTS, _FEW_PAIRS = 200, 30
_NAMED = 5


def report_lines(outcome: Outcome) -> list[str]:
    """The report, a line a line."""
    lines = ["# Pairs", "", *_what_was_made(outcome), ""]
    lines += ["| mode | samples | prompts with a pair | pairs | accept rate |", "|---|---|---|---|---|"]
    lines += [_mode_line(outcome, mode) for mode in outcome.modes]
    lines += ["", *_length_table(outcome), "", *_rate_table(outcome), "", "## Prompts without a pair", ""]
    for mode in outcome.modes:
        lines.append(f"- {mode}: {_counted(outcome.reasons[mode]) or 'none'}")
    lines += ["", "## Samples left out", ""]
    lines += [f"- {mode}: {_counted(outcome.left_out[mode]) or 'none'}" for mode in outcome.modes]
    lost = sum((part.lost for part in outcome.parts.values()), Counter())
    if lost:
        lines += ["", "## Pairs that the trainer would not take", "", *(f"- {n} × {why}" for why, n in lost.items())]
    fears = list(_fears(outcome))
    lines += ["", "## What to fear", "", *(f"- {fear}" for fear in fears or ["nothing of what is looked for here"])]
    return lines


def _what_was_made(outcome: Outcome) -> Iterator[str]:
    plan, facts = outcome.plan, outcome.facts
    rules = plan.rules
    folders = ", ".join(folder.name for folder in facts.folders)
    how = f"{rules.policy}, rejected {rules.rejected}" if rules.policy == "right_wrong" else rules.policy
    more = [f"margin {rules.margin:g}"] if rules.margin else []
    more += ["lengths matched"] if rules.match_length else []
    more += ["truncated samples kept"] if plan.keep_truncated else []
    yield f"{outcome.prompts} prompts of {folders}, judged by {facts.judge}. Pairs: {', '.join([how, *more])}."
    for part, writer in outcome.parts.items():
        yield f"{plan.outputs[part]}: {_number(writer.tally.rows, 'row')} of {_number(writer.prompts, 'prompt')}."
        for line in writer.tally.lines()[1:]:
            yield f"The trainer's own checks: {line}"
        if plan.shares is not None:
            rows = ", ".join(f"{name} {n} ({n / writer.tally.rows:.2f})" for name, n in sorted(writer.rows_of.items()))
            yield f"Rows by folder: {rows}."
    if outcome.not_mixed:
        yield f"The mix left {outcome.not_mixed} prompts out that have a pair."


def _mode_line(outcome: Outcome, mode: str) -> str:
    rates, pairs = outcome.rates[mode], outcome.pairs(mode)
    asked = len(outcome.facts.prompts)
    with_pair = asked - outcome.reasons[mode].total()
    rate = f"{mean(rates):.2f}" if rates else "not told"
    return f"| {mode} | {outcome.facts.samples[mode]} | {with_pair} of {asked} | {len(pairs)} | {rate} |"


def lengths(pairs: Sequence[Pair], what: str) -> list[tuple[int, int]]:
    """(chosen, rejected) in `characters` or `tokens`, of the pairs where both are known."""
    found = [(getattr(pair.chosen, what), getattr(pair.rejected, what)) for pair in pairs]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _length_table(outcome: Outcome) -> Iterator[str]:
    yield "| length, median | chosen | rejected | preferring the shorter scores |"
    yield "|---|---|---|---|"
    for mode in outcome.modes:
        for what in ("characters", "tokens"):
            if found := lengths(outcome.pairs(mode), what):
                chosen, rejected = (median(side) for side in zip(*found, strict=True))
                score = preferring_shorter(found)
                yield f"| {mode}, {what} | {chosen:.0f} | {rejected:.0f} | {score:.2f} |"


def histogram(rates: Sequence[float]) -> list[int]:
    """Prompts in each of `BINS`."""
    counts = [0] * len(BINS)
    for rate in rates:
        counts[0 if rate == 0 else 5 if rate == 1 else min(math.ceil(rate * 4), 4)] += 1
    return counts


def _rate_table(outcome: Outcome) -> Iterator[str]:
    yield f"| prompts by accept rate | {' | '.join(BINS)} |"
    yield "|---" * (len(BINS) + 1) + "|"
    for mode in outcome.modes:
        yield f"| {mode} | {' | '.join(map(str, histogram(outcome.rates[mode])))} |"


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common())


# --- what to fear ---


def _fears(outcome: Outcome) -> Iterator[str]:
    for mode in outcome.modes:
        yield from _of_lengths(outcome, mode)
        yield from _of_words(outcome, mode)
        yield from _of_samples(outcome, mode)
    yield from _of_empty_answers(outcome)
    yield from _of_prompts(outcome)
    yield from _of_folders(outcome)


def _of_lengths(outcome: Outcome, mode: str) -> Iterator[str]:
    pairs = outcome.pairs(mode)
    told = []
    for what in ("characters", "tokens"):
        found = lengths(pairs, what)
        score = preferring_shorter(found)
        if score is not None and len(found) >= _FEW_PAIRS and abs(score - 0.5) > 0.05:
            told.append(f"{score:.2f} in {what}")
    if told:
        matched = outcome.plan.rules.match_length
        remedy = " (these samples allow no better)" if matched else "; --match_length chooses pairs that do not"
        why = "the loss can fall by length alone"
        yield f"{mode}: preferring the shorter scores {' and '.join(told)}: {why}{remedy}."


def _of_words(outcome: Outcome, mode: str) -> Iterator[str]:
    words = outcome.words.get(mode)
    if words is None or not words.tells:
        return
    telling = ", ".join(f"{word!r} ({up}:{down})" for word, up, down in words.telling)
    yield (
        f"{mode}: words alone find the chosen side in {words.score:.2f} ± {words.error:.2f} of {words.asked} pairs of "
        "prompts they were not fitted on" + (f"; most telling (chosen:rejected): {telling}." if telling else ".")
    )


def _of_samples(outcome: Outcome, mode: str) -> Iterator[str]:
    n = outcome.facts.samples[mode]
    cut = outcome.left_out[mode][CUT] / n
    if cut > 0.05:
        yield (
            f"{mode}: {cut:.0%} of the samples are truncated and left out, which leaves the prompts that need short "
            "answers; sample with a larger --max_tokens."
        )
    unparsed = outcome.reasons[mode][UNPARSED]
    if unparsed > 0.1 * len(outcome.facts.prompts):
        yield (
            f"{mode}: {unparsed} prompts have wrong answers of which none could be read: their form fails, not their "
            "result; say in the prompt how to end, or judge otherwise."
        )
    yield from _without_a_verdict(outcome, mode)
    rates = outcome.rates[mode]
    for name, count in (("right", sum(r == 1 for r in rates)), ("wrong", sum(r == 0 for r in rates))):
        if rates and count > 0.5 * len(rates):
            harder = "harder" if name == "right" else "easier"
            share = f"{count / len(rates):.0%}"
            yield f"{mode}: on {share} of the prompts all answers are {name}; {harder} ones give pairs."


def _without_a_verdict(outcome: Outcome, mode: str) -> Iterator[str]:
    n = outcome.facts.samples[mode]
    unseen = in_vain = lost = 0
    for candidate in (c for _, m, found in outcome.facts.pools() if m == mode for c in found if not c.judged):
        lost += candidate.unusable == FAILED
        unseen += candidate.unusable != FAILED and not candidate.seen
        in_vain += candidate.unusable != FAILED and candidate.seen
    for count, line in (
        (unseen, f"{unseen} of {n} samples are not judged yet; bvpo judge goes on where it was stopped."),
        (in_vain, f"the judge came to no verdict on {in_vain} of {n} samples; bvpo judge --again failed tries again."),
        (lost, f"{lost} of {n} requests failed; bvpo sample --retry_failed asks for these answers again."),
    ):
        if count > 0.01 * n:
            yield f"{mode}: {line}"


def _of_empty_answers(outcome: Outcome) -> Iterator[str]:
    still = outcome.left_out.get("empty", {}).get(STILL_THINKS, 0)
    if still:
        share = still / outcome.facts.samples["empty"]
        yield (
            f"empty: {still} samples ({share:.0%}) think although thinking was off. They are left out of D_e; check "
            "--empty_block, and that the model has a mode without thinking."
        )
    median_of = {
        mode: median(max(pair) for pair in found)
        for mode in ("thinking", "empty")
        if mode in outcome.modes and len(found := lengths(outcome.pairs(mode), "characters")) >= _FEW_PAIRS
    }
    if len(median_of) == 2 and median_of["empty"] > 0.5 * median_of["thinking"]:
        yield (
            f"empty: answers are {median_of['empty'] / median_of['thinking']:.2f} times as long as those with a trace "
            "(medians): the model may think on without tags. Read some of D_e."
        )
    without = sum(part.tally.trace_pairs - part.tally.own for part in outcome.parts.values())
    without += sum(part.tally.alone["empty"] for part in outcome.parts.values())
    if "empty" in outcome.modes and without > 0:
        yield (
            f"{without} rows have no empty pair of their own: --bvpo_empty strip takes their answers without the "
            "trace, own trains their trace pair alone, require leaves them out."
        )


def _of_prompts(outcome: Outcome) -> Iterator[str]:
    facts = outcome.facts
    if facts.excluded:
        named = list(dict.fromkeys(facts.excluded.values()))
        told = "; ".join(named[:_NAMED]) + ("; …" if len(named) > _NAMED else "")
        yield f"{len(facts.excluded)} prompts stand in an evaluation set and are dropped: {told}."
    if outcome.suspect:
        yield f"{outcome.suspect}."
    prompts = sum(part.prompts for part in outcome.parts.values())
    if prompts < _FEW_PROMPTS:
        yield f"few distinct prompts: {prompts}. A run goes through them again and again, and learns them by heart."
    asked = len(facts.asked)
    if asked - len(facts.prompts) - len(facts.excluded) > 0.05 * asked and len(facts.folders) == 1:
        yield f"{asked} prompts are {len(facts.prompts) + len(facts.excluded)} different ones; equal ones were joined."
    if facts.strays:
        yield f"{facts.strays} samples belong to no prompt of their folder; they are left out."


def _of_folders(outcome: Outcome) -> Iterator[str]:
    told = other_settings(outcome.facts.folders, outcome.facts.judge)
    if told:
        yield (
            "the folders were sampled or judged with other settings, so a pair of a prompt that stands in both may "
            f"compare models and not answers: {'; '.join(told[:_NAMED])}."
        )
