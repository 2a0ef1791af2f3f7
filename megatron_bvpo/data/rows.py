"""Rows of data: what is wrong with one, and how it looks once it is right.

A row is an ms-swift DPO row: `messages`, whose last message is the chosen response, with `rejected_response` (text, or
a list of messages) or `rejected_messages` (a whole conversation). Optional fields hold more (docs/rows.md): answers
that were generated with thinking off, responses with a shortened trace, a demonstration. Where the loss takes single
responses (`RowRules.unpaired`), the last message is one, with `label`, and `empty_response` another, with
`empty_label`.

A row takes part in every stream of the run that it has the fields for (streams.py). As text it can lose any of them but
the trace stream, and keep the others; with its trace pair it is dropped. (As tokens it can, pair_checks.py.) It may
come without one: `messages` that end in the user turn, beside the fields of another stream. A stream that the run does
not use asks nothing of the rows. `check_row` never raises; it reports.
"""

from dataclasses import replace
from typing import Any

from megatron_bvpo.data.conversations import LEAVE_OUT, kind_of
from megatron_bvpo.data.empty_trace import ThinkTags, many_tags, own_answer, strip_answer, with_think_prefix
from megatron_bvpo.data.gate import gate_streams
from megatron_bvpo.data.response_checks import own_problems, stripped_problems, whole_problems
from megatron_bvpo.data.row_shape import (
    Responses,
    filled_streams,
    has_no_trace_responses,
    is_blank,
    prompt_problems,
    read_responses,
)
from megatron_bvpo.data.row_values import read_label, read_share
from megatron_bvpo.data.verdicts import (
    LABELS,
    RowProblem,
    RowRules,
    RowTally,
    RowVerdict,
    member_of,
    require_rows,
)
from megatron_bvpo.streams import TABLE, in_order

__all__ = ["RowProblem", "RowRules", "RowTally", "RowVerdict", "check_row", "normalise_row", "require_rows"]

# What a prompt is written from beside the messages. Either side's stands for both where the other names none.
PROMPT_FIELDS = ("tools", "chat_template_kwargs")

# Marks of a row in its normal form, which ms-swift hands on to the template: it came without a trace pair; the streams
# that it is trained in.
ALONE_KEY = "empty_pair_alone"
STREAMS_KEY = "bvpo_streams"

# Fields of whole responses, trace and answer, beside the row's first ones.
_WHOLE_FIELDS = {name: stream.fields for name, stream in TABLE.items() if name not in ("trace", "empty")}
_EMPTY_FIELDS = TABLE["empty"].fields


def check_row(row: Any, rules: RowRules) -> RowVerdict:
    """Judges one row in ms-swift's standard form. Missing fields and None are the same. Never raises."""
    verdict = _check_alone(row, rules) if has_no_trace_responses(row) else _check_whole(row, rules)
    if rules.gate_threshold is not None and verdict.kept:
        verdict = _gated(row, verdict, rules)
    if rules.unpaired:
        right = [s for s in verdict.streams if s in LABELS and read_label(_label_of(row, s, verdict))]
        verdict = replace(verdict, right=tuple(right))
    return verdict


def is_pair(row: Any) -> bool:
    """Whether the row has a prompt with what some stream learns from, whatever this holds."""
    return has_no_trace_responses(row) or not read_responses(row).problems


def _check_whole(row: Any, rules: RowRules) -> RowVerdict:
    """Of a row that has responses with traces."""
    found = read_responses(row, unpaired=rules.unpaired)
    if found.problems:
        return RowVerdict(problems=tuple(found.problems))
    many = _many_tags(row, [text for _, text in found.sides], rules)
    if "trace" in rules.streams:
        problems = whole_problems(found.sides, rules.tags)
        if not problems and rules.unpaired:
            problems = _label_problems(row, "label", "row")
        if problems:
            return RowVerdict(problems=tuple(problems), many_tags=many)
    return _verdict(row, [s for s in rules.streams if s != "trace"], found, rules, many)


def _check_alone(row: dict[str, Any], rules: RowRules) -> RowVerdict:
    """Of a prompt with responses of other streams."""
    there = filled_streams(row)
    many = _many_tags(row, [], rules)
    problems = prompt_problems(row)
    if not problems and not set(there) & set(rules.streams):
        what = member_of(there[0], rules.unpaired)
        article = "an" if what[0] in "aeiou" else "a"
        remedy = (
            f"add a trace pair, or run the {there[0]} stream: --bvpo_streams, or an --bvpo_alpha that gives it weight"
        )
        problem = f"{article} {what} alone, and no {there[0]} stream is run"
        problems = [RowProblem(TABLE[there[0]].fields[0], problem, remedy)]
    if problems:
        return RowVerdict(problems=tuple(problems), many_tags=many)
    return _verdict(row, [s for s in there if s in rules.streams], None, rules, many)


def _many_tags(row: dict[str, Any], texts: list[str], rules: RowRules) -> bool:
    fields = [name for stream in rules.streams if stream != "trace" for name in TABLE[stream].fields]
    fields += [name for name in _EMPTY_FIELDS if name not in fields]
    texts = [*texts, *(row.get(name) for name in fields)]
    return any(many_tags(text, rules.tags) for text in texts if isinstance(text, str))


def _verdict(row: dict[str, Any], asked: list[str], found: Responses | None, rules: RowRules, many: bool) -> RowVerdict:
    """Of a row whose shape and whose trace pair, if there is one, are right: the other streams, `asked` of it."""
    streams = ["trace"] if found is not None and "trace" in rules.streams else []
    problems: list[RowProblem] = []
    source = None
    for stream in asked:
        if stream == "empty":
            source, lost = _check_empty(row, found, rules)
            there = not lost
        else:
            lost = _check_fields(row, stream, rules.tags)
            there = not lost and not is_blank(row.get(TABLE[stream].fields[0]))
        problems += lost
        streams += [stream] if there else []
    if not streams and not problems:
        remedy = "add it, or leave the row out"
        problems = [RowProblem(TABLE[asked[0]].fields[0], "missing, and the row has nothing else to train", remedy)]
    if not streams or any(problem.drops == "row" for problem in problems):
        # With nothing left to keep, whatever is wrong costs the row.
        problems = problems if streams else [replace(problem, drops="row") for problem in problems]
        return RowVerdict(problems=tuple(problems), many_tags=many)
    source = source if "empty" in streams else None
    return RowVerdict(in_order(streams), source, tuple(problems), many)


# --- the streams beside the trace stream ---


def _check_fields(row: dict[str, Any], stream: str, tags: ThinkTags) -> list[RowProblem]:
    """Of a stream whose fields hold whole responses: all of them or none."""
    given = {name: row.get(name) for name in TABLE[stream].fields}
    if all(map(is_blank, given.values())):
        return []
    if odd := _no_text(given, stream):
        return odd
    missing = [name for name, text in given.items() if text is None]
    if missing:
        remedy = f"give both {stream} responses or neither"
        return [RowProblem(missing[0], f"missing, the other {stream} response is there", remedy, stream)]
    return [replace(problem, drops=stream) for problem in whole_problems(list(given.items()), tags)]


def _no_text(given: dict[str, Any], drops: str) -> list[RowProblem]:
    """At most one problem: the first value that is there and no text."""
    odd = [(name, value) for name, value in given.items() if not (value is None or isinstance(value, str))]
    return [
        RowProblem(name, "expected text", LEAVE_OUT, drops, found=kind_of(value), structural=True)
        for name, value in odd[:1]
    ]


def _check_empty(row: dict[str, Any], found: Responses | None, rules: RowRules) -> tuple[str | None, list[RowProblem]]:
    """Where the empty answers come from, and what stands against them."""
    names = _EMPTY_FIELDS[:1] if rules.unpaired else _EMPTY_FIELDS
    answers = {name: row.get(name) for name in names}
    missing = [name for name, answer in answers.items() if answer is None]
    # It may lack the other column, so a blank cell alone is no answer, either.
    if all(map(is_blank, answers.values())):
        if found is None:
            return None, [RowProblem(names[0], "missing", "give it, or leave the row out", "empty")]
        if rules.empty != "strip":
            both = "an empty answer" if rules.unpaired else "both empty answers"
            remedy = f"--bvpo_empty {rules.empty} needs {both}; add {'it' if rules.unpaired else 'them'}, or use strip"
            return None, [RowProblem(names[0], "missing", remedy, "row" if rules.empty == "require" else "empty")]
        source, problems = "stripped", stripped_problems(found.sides, rules.tags)
    elif odd := _no_text(answers, "empty"):
        return None, odd
    elif missing:
        remedy = "give both empty answers or neither"
        return None, [RowProblem(missing[0], "missing, the other empty answer is there", remedy, "empty")]
    else:
        source, problems = "own", own_problems(answers, rules.tags)
    problems = [replace(problem, drops="empty") for problem in problems]
    if not problems and rules.unpaired:
        problems = _label_problems(row, "label" if source == "stripped" else "empty_label", "empty")
    return source, problems


def _label_problems(row: dict[str, Any], name: str, drops: str) -> list[RowProblem]:
    value = row.get(name)
    if is_blank(value):
        problem = "missing, and this --loss_type takes single responses, right or wrong"
        return [RowProblem(name, problem, "say true or false, or choose a loss of pairs", drops)]
    if read_label(value) is None:
        remedy = "say true where the response is right, false where it is wrong"
        return [RowProblem(name, "expected true or false", remedy, drops, found=kind_of(value), structural=True)]
    return []


def _label_of(row: dict[str, Any], stream: str, verdict: RowVerdict) -> Any:
    """A stripped answer is right where the response is that it was taken from."""
    own = stream == "empty" and verdict.empty_source == "own"
    return row.get("empty_label" if own else "label")


# --- the gate ---


def _gated(row: dict[str, Any], verdict: RowVerdict, rules: RowRules) -> RowVerdict:
    """The verdict without what HPT's gate switches off."""
    rate = row.get("accept_rate")
    problem = None
    if is_blank(rate):
        remedy = "`bvpo pairs` writes it into its rows; for other prompts count what `bvpo judge` called right"
        problem = RowProblem("accept_rate", "missing, and --bvpo_gate goes by it", remedy)
    elif read_share(rate) is None:
        remedy = "give the share of the prompt's own samples that were right"
        problem = RowProblem(
            "accept_rate", "expected a number from 0 to 1", remedy, found=kind_of(rate), structural=True
        )
    if problem is not None:
        return RowVerdict(problems=(problem, *verdict.problems), many_tags=verdict.many_tags)
    streams = gate_streams(read_share(rate), rules.gate_threshold, verdict.streams)
    gated = tuple(s for s in verdict.streams if s not in streams)
    if streams:
        source = verdict.empty_source if "empty" in streams else None
        return replace(verdict, streams=streams, empty_source=source, gated=gated)
    remedy = "nothing need be done: it teaches nothing more"
    problem = RowProblem("accept_rate", "the gate switches off all that the row has", remedy)
    return RowVerdict(problems=(problem, *verdict.problems), many_tags=verdict.many_tags, gated=gated)


# --- the normal form ---


def normalise_row(row: dict[str, Any], verdict: RowVerdict, rules: RowRules) -> dict[str, Any]:
    """The row as the template should see it; the input is not changed.

    The opening think tag stands in all whole responses, the rejected side is given in one way only, tools that one side
    alone names are both sides', and the fields of a stream are all texts, or all None where it is not trained.
    `STREAMS_KEY` names the streams that are. ms-swift wants a response on either side: a row that came without a trace
    pair answers its prompt with what it has, and is marked `ALONE_KEY`; where there is no second response, the rejected
    one is ''. Of unpaired responses `label` and `empty_label` are true or false. Other columns stay. Doing it twice
    with one verdict changes nothing.
    """
    assert verdict.kept, "a dropped row has no normal form"
    new = dict(row)
    new.pop("margin", None)  # of reward models; ms-swift drops the row over one that is no number
    new[STREAMS_KEY] = list(verdict.streams)
    _set_streams(new, row, verdict, rules)
    if has_no_trace_responses(row):
        fields = TABLE[verdict.streams[0]].fields
        new["messages"] = [*row["messages"], {"role": "assistant", "content": new[fields[0]]}]
        new["rejected_response"], new[ALONE_KEY] = new[fields[-1]] if len(fields) > 1 else "", True
        new["rejected_response"] = new["rejected_response"] or ""
        new.pop("rejected_messages", None)
        row = new
    new["messages"] = _prefixed(row["messages"], rules.tags)
    response = row.get("rejected_response")
    if rules.unpaired:
        response = ""
    if response is None:
        # ms-swift reads a None here as a rejected response and fails.
        new.pop("rejected_response", None)
        new["rejected_messages"] = _prefixed(row["rejected_messages"], rules.tags)
    else:
        is_text = isinstance(response, str)
        prefixed = with_think_prefix(response, rules.tags) if is_text else _prefixed(response, rules.tags)
        new["rejected_response"] = prefixed
        new.pop("rejected_messages", None)
    for name in PROMPT_FIELDS:
        mine, other = row.get(name), row.get(f"rejected_{name}")
        if other and not mine:
            new[name] = other
        elif mine and not other and (response is None or f"rejected_{name}" in row):
            # Only beside a rejected_response, and where there is no such column, ms-swift does this itself.
            new[f"rejected_{name}"] = mine
    return new


def _set_streams(new: dict[str, Any], row: dict[str, Any], verdict: RowVerdict, rules: RowRules) -> None:
    """Fills in the fields of the streams beside the trace stream, and the labels."""
    for stream, fields in _WHOLE_FIELDS.items():
        for name in fields:
            if stream in verdict.streams:
                new[name] = with_think_prefix(row[name], rules.tags)
            elif name in row:
                new[name] = None
    answers: list[str | None] = [None, None]
    if verdict.empty_source == "own":
        answers = [own_answer(row[name], rules.tags) for name in _EMPTY_FIELDS[: 1 if rules.unpaired else 2]]
    elif verdict.empty_source == "stripped":
        sides = read_responses(row, unpaired=rules.unpaired).sides
        answers = [strip_answer(text, rules.tags) for _, text in sides]
    new["empty_response"], new["empty_rejected_response"] = (*answers, None)[:2]
    if rules.unpaired:
        for stream, name in LABELS.items():
            new[name] = stream in (verdict.right or ()) if stream in verdict.streams else None


def _prefixed(messages: list[dict[str, Any]], tags: ThinkTags) -> list[dict[str, Any]]:
    last = messages[-1]
    return [*messages[:-1], {**last, "content": with_think_prefix(last["content"], tags)}]
