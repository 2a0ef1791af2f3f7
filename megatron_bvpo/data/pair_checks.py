"""What is left of a row's pairs once they are tokens: one prompt, responses that fit, a difference. Pure.

Rows are judged as texts, and token ids are trained. In between stand a template, which may write another prompt for
one side, and `--max_length`, behind which two responses can become the same one or vanish. So every pair is looked at
again when it is encoded, whole, and what cannot be trained as it was judged is lost by name.

A sequence is a dict with `input_ids` and `labels`, lists of one length; in `labels`, -100 is what does not count. The
response counts whole and nothing else does (data/batches.py sees to that), so the prompt ends at the first label that
counts; in an empty pair the empty trace is the prompt's end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

IGNORED = -100
# Whatever runs along the tokens is cut with them.
_ALONG_TOKENS = ("input_ids", "labels", "loss_scale", "token_type_ids", "mm_token_type_ids", "image_token_types")

Sequence = dict[str, Any]
Pair = dict[str, Sequence]  # by side: 'chosen' and 'rejected', or 'response' alone


@dataclass(frozen=True)
class Loss:
    """Why a pair is not trained: a reason that can be counted over rows, what to do, what is particular to this row."""

    reason: str
    remedy: str = ""
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.reason}{detail}{f': {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True)
class Account:
    """What became of a row's pairs, each named by its stream.

    Attributes:
        pairs: streams that have a pair.
        lost: streams whose pair was lost in encoding, with the reason.
        cut: streams whose pair was cut to `--max_length`.
    """

    pairs: tuple[str, ...] = ()
    lost: dict[str, Loss] = field(default_factory=dict)
    cut: tuple[str, ...] = ()

    def only(self, streams: tuple[str, ...]) -> Account:
        """The part of it that is about `streams`."""
        lost = {stream: loss for stream, loss in self.lost.items() if stream in streams}
        pairs, cut = ([s for s in found if s in streams] for found in (self.pairs, self.cut))
        return Account(tuple(pairs), lost, tuple(cut))

    def to_json(self) -> str:
        lost = {stream: [loss.reason, loss.remedy, loss.detail] for stream, loss in self.lost.items()}
        return json.dumps({"pairs": self.pairs, "lost": lost, "cut": self.cut})

    @classmethod
    def from_json(cls, text: str) -> Account:
        found = json.loads(text)
        lost = {stream: Loss(*loss) for stream, loss in found["lost"].items()}
        return cls(tuple(found["pairs"]), lost, tuple(found["cut"]))


@dataclass(frozen=True)
class PairRules:
    """What pairs are held to.

    Attributes:
        max_length: most tokens of a sequence; None: any number.
        truncation: what happens to longer ones: 'raise' (lost), 'right' or 'left' (cut).
        block: tokens of the empty trace that ends an empty pair's prompt; none where it counts.
        frame: control tokens that the template writes around messages.
        closing: tokens that the template writes behind a response that does not end with them.
        decode: token ids to text.
    """

    max_length: int | None
    truncation: str
    block: tuple[int, ...]
    frame: frozenset[int]
    closing: tuple[int, ...]
    decode: Callable[[list[int]], str]


def response_start(sequence: Sequence) -> int:
    """Index of the first token that counts; the sequence's length where none does."""
    labels = sequence["labels"]
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


def check_pairs(whole: Mapping[str, Pair], rules: PairRules) -> tuple[dict[str, Pair], Account]:
    """Judges the pairs of one row.

    Args:
        whole: the pairs by stream, encoded without a limit of length.
        rules: what they are held to.

    Returns:
        The pairs that can be trained, cut where that is asked for, and the account of all.
    """
    lost = _other_prompts(whole, rules)
    kept: dict[str, Pair] = {}
    cut = []
    for stream, pair in whole.items():
        if stream in lost:
            continue
        found = _framed(pair, rules) or _fitted(pair, rules, len(rules.block) if stream == "empty" else 0)
        if isinstance(found, dict) and len(found) > 1 and not _differ(found, rules.closing):
            where, remedy = "", "leave the row out: it prefers nothing"
            if found is not pair:
                where, remedy = f" within --max_length {rules.max_length}", "raise it, or shorten the row"
            found = Loss(f"the same tokens on both sides{where}", remedy)
        if isinstance(found, Loss):
            lost[stream] = found
            continue
        kept[stream] = found
        if found is not pair:
            cut.append(stream)
    return kept, Account(tuple(kept), lost, tuple(cut))


# --- one prompt ---


def _other_prompts(whole: Mapping[str, Pair], rules: PairRules) -> dict[str, Loss]:
    """Streams whose sequences do not all answer the row's one prompt.

    Two prompts of the trace pair cost the row: which of the two the other answers belong to is not known.
    """
    prompts = {
        stream: {side: sequence["input_ids"][: response_start(sequence)] for side, sequence in pair.items()}
        for stream, pair in whole.items()
    }
    for stream, sides in prompts.items():
        one, *more = sides.values()
        if more and one != more[0]:
            detail = _difference(one, more[0], rules.decode)
            remedy = "give both the same system message, tools and earlier turns"
            loss = Loss("the rejected response has another prompt than the chosen", remedy, detail)
            return dict.fromkeys(whole if stream == "trace" else [stream], loss)
    return _unlike_the_trace_pairs({stream: next(iter(sides.values())) for stream, sides in prompts.items()}, rules)


def _unlike_the_trace_pairs(prompts: Mapping[str, list[int]], rules: PairRules) -> dict[str, Loss]:
    """Streams whose prompt is not the trace pair's; the empty stream's has an empty trace behind it."""
    lost = {}
    for stream, prompt in prompts.items() if "trace" in prompts else ():
        expected = [*prompts["trace"], *(rules.block if stream == "empty" else ())]
        # As text where the tokens differ: the prompt's last characters may join the block's first ones.
        if prompt != expected and rules.decode(prompt) != rules.decode(expected):
            detail = _difference(expected, prompt, rules.decode)
            if stream == "empty":
                reason = "the empty pair's prompt is not the trace pair's with an empty trace"
                lost[stream] = Loss(reason, "check --bvpo_empty_block", detail)
            else:
                reason = f"the {stream} stream's prompt is not the trace pair's"
                lost[stream] = Loss(reason, "the template writes it in another way for this response", detail)
    return lost


def _difference(one: list[int], other: list[int], decode: Callable[[list[int]], str], shown: int = 12) -> str:
    pairs = zip(one, other, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    texts = (repr(decode(ids[at : at + shown])) for ids in (one, other))
    return f"from token {at} on: {' against '.join(texts)}"


# --- a response, whole and nothing but that ---


def _framed(pair: Pair, rules: PairRules) -> Loss | None:
    """A response that holds the template's own control tokens repeats its prompt, or speaks for others."""
    for side, sequence in pair.items():
        response = _without_closing(sequence["input_ids"][response_start(sequence) :], rules.closing)
        found = next((token for token in response if token in rules.frame), None)
        if found is not None:
            reason = f"control tokens of the template in the {side} response"
            return Loss(reason, "give the response's own text alone", repr(rules.decode([found])))
    return None


def _fitted(pair: Pair, rules: PairRules, block_tokens: int) -> Pair | Loss:
    """The pair itself where it fits, else cut, else why it is lost."""
    limit = rules.max_length
    longest = max(len(sequence["input_ids"]) for sequence in pair.values())
    if limit is None or longest <= limit:
        return pair
    prompt = response_start(next(iter(pair.values())))
    if rules.truncation == "right":
        if prompt >= limit:
            detail = f"the prompt alone has {prompt} tokens"
            return Loss(f"no response within --max_length {limit}", "raise it, or shorten the prompt", detail)
        return {side: _slice(sequence, slice(limit)) for side, sequence in pair.items()}
    if rules.truncation == "left":
        # The same cut on both sides: cut each for itself, the two would answer different prompts.
        over = longest - limit
        if over >= prompt - block_tokens:
            detail = f"the response alone has {longest - prompt} tokens"
            return Loss(f"no prompt within --max_length {limit}", "raise it, or shorten the response", detail)
        return {side: _slice(sequence, slice(over, None)) for side, sequence in pair.items()}
    return Loss(f"longer than --max_length {limit}", "raise it, or cut with --truncation_strategy", f"{longest} tokens")


def _slice(sequence: Sequence, part: slice) -> Sequence:
    cut = {key: value[part] if key in _ALONG_TOKENS and value is not None else value for key, value in sequence.items()}
    return {**cut, "length": len(cut["input_ids"])}


def _differ(pair: Pair, closing: tuple[int, ...]) -> bool:
    """Whether the two responses differ in more than what the template may write behind them."""
    starts = {side: response_start(sequence) for side, sequence in pair.items()}
    chosen, rejected = (_without_closing(s["input_ids"][starts[side] :], closing) for side, s in pair.items())
    return chosen != rejected


def _without_closing(response: list[int], closing: tuple[int, ...]) -> list[int]:
    """Without the end that the template wrote, or that stood in the text in its place."""
    for n in range(min(len(closing), len(response)), 0, -1):
        if response[-n:] == list(closing[:n]):
            return response[:-n]
    return response
