"""Rows of preference data: what is wrong with one, and how it looks once it is right.

A row is an ms-swift DPO row: `messages`, whose last message is the chosen response, with `rejected_response`
(text, or a list of messages) or `rejected_messages` (a whole conversation). Two optional fields hold answers
that were generated with thinking off: `empty_response` and `empty_rejected_response`.

A row gives a trace pair and an empty pair. As text it can lose the empty pair and keep the trace pair. It cannot
lose the trace pair alone: then the row is dropped. (As tokens it can, pair_checks.py.) It may come without one:
`messages` that end in the user turn, beside both empty answers, are an empty pair alone. A stream that the run does
not use (α fixed at 1 or 0) asks nothing of the rows. `check_row` never raises; it reports.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_bvpo.data.conversations import (
    LEAVE_OUT,
    conversation_problems,
    kind_of,
    last_user,
    many_ends,
    spoken,
)
from megatron_bvpo.data.empty_trace import (
    ThinkTags,
    Trace,
    many_tags,
    own_answer,
    split_trace,
    strip_answer,
    unclear_opening,
    with_think_prefix,
)
from megatron_bvpo.data.verdicts import RowProblem, RowRules, RowTally, RowVerdict, require_rows

__all__ = ["RowProblem", "RowRules", "RowTally", "RowVerdict", "check_row", "normalise_row", "require_rows"]

MEDIA_FIELDS = ("images", "videos", "audios", "rejected_images", "rejected_videos", "rejected_audios")

# What a prompt is written from beside the messages. Either side's stands for both where the other names none.
PROMPT_FIELDS = ("tools", "chat_template_kwargs")

# Marks, in its normal form, a row that came with an empty pair alone; ms-swift hands it on to the template.
ALONE_KEY = "empty_pair_alone"

_CUT_OFF = "generation was cut off; raise the generation limit, or leave the row out"


@dataclass
class _Pair:
    """The two responses of a row, once its shape is known to be right."""

    chosen: str = ""
    rejected: str = ""
    rejected_field: str = "rejected_response"
    problems: list[RowProblem] = field(default_factory=list)


def check_row(row: Any, rules: RowRules) -> RowVerdict:
    """Judges one row in ms-swift's standard form. Missing fields and None are the same. Never raises."""
    if has_empty_pair_alone(row):
        return _check_alone(row, rules)
    pair = _check_shape(row)
    if pair.problems:
        return RowVerdict(False, False, None, tuple(pair.problems))
    texts = [pair.chosen, pair.rejected, row.get("empty_response"), row.get("empty_rejected_response")]
    many = any(many_tags(text, rules.tags) for text in texts if isinstance(text, str))
    return replace(_check_pairs(row, pair, rules), many_tags=many)


def _check_pairs(row: dict[str, Any], pair: _Pair, rules: RowRules) -> RowVerdict:
    problems = _trace_problems(pair, rules.tags) if "trace" in rules.streams else []
    if problems or "empty" not in rules.streams:
        return RowVerdict(not problems, False, None, tuple(problems))
    source, empty_problems = _check_empty(row, pair, rules)
    drops_row = any(problem.drops == "row" for problem in empty_problems)
    if empty_problems:
        source = None
    trace_ok = "trace" in rules.streams and not drops_row
    return RowVerdict(trace_ok, source is not None, source, tuple(empty_problems))


def has_empty_pair_alone(row: Any) -> bool:
    """Whether the row is a prompt with empty answers and no other responses, whatever these hold."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        return False
    last = row["messages"][-1]
    ends_in_user = isinstance(last, dict) and last.get("role") == "user"
    # "": a table has no other way to leave a cell out.
    responses = [row.get(name) for name in ("rejected_response", "rejected_messages")]
    answers = [row.get(name) for name in ("empty_response", "empty_rejected_response")]
    return ends_in_user and all(r in (None, "") for r in responses) and any(a not in (None, "") for a in answers)


def _check_alone(row: dict[str, Any], rules: RowRules) -> RowVerdict:
    problems = _media_problems(row)
    if not problems:
        # Whether it is a prompt is whether it could be answered.
        answered = [*row["messages"], {"role": "assistant", "content": ""}]
        problems = conversation_problems(answered, "messages")
    if not problems and "empty" not in rules.streams:
        remedy = "--bvpo_alpha 1 trains the trace stream alone; add a trace pair, or choose another α"
        problems = [RowProblem("empty_response", "an empty pair alone, and no empty stream is run", remedy)]
    source = None
    if not problems:
        source, problems = _check_empty(row, _Pair(), rules)
        problems = [replace(problem, drops="row") for problem in problems]
    texts = [row.get("empty_response"), row.get("empty_rejected_response")]
    many = any(many_tags(text, rules.tags) for text in texts if isinstance(text, str))
    return RowVerdict(False, not problems, None if problems else source, tuple(problems), many)


def is_pair(row: Any) -> bool:
    """Whether the row has a prompt, a chosen and a rejected response, whatever these hold."""
    return has_empty_pair_alone(row) or not _check_shape(row).problems


def normalise_row(row: dict[str, Any], verdict: RowVerdict, rules: RowRules) -> dict[str, Any]:
    """The row as the template should see it; the input is not changed.

    The opening think tag stands in both responses, the rejected side is given in one way only, tools that one side
    alone names are both sides', and `empty_response` and `empty_rejected_response` are both texts, or both None where
    there is no empty pair. An empty pair that comes alone stands as the row's responses, too, marked `ALONE_KEY`. Other
    columns stay. Doing it twice with one verdict changes nothing.
    """
    assert verdict.kept, "a dropped row has no normal form"
    new = dict(row)
    if has_empty_pair_alone(row):
        # As a pair of answers: ms-swift's template wants a response on either side, and the trace pair is not encoded.
        answers = [own_answer(row[name], rules.tags) for name in ("empty_response", "empty_rejected_response")]
        new["messages"] = [*row["messages"], {"role": "assistant", "content": answers[0]}]
        new["rejected_response"], new[ALONE_KEY] = answers[1], True
        row = new
    new.pop("margin", None)  # of reward models; ms-swift drops the row over one that is no number
    new["messages"] = _prefixed(row["messages"], rules.tags)
    response = row.get("rejected_response")
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
    if verdict.empty_source == "own":
        answers = [own_answer(row[name], rules.tags) for name in ("empty_response", "empty_rejected_response")]
    elif verdict.empty_source == "stripped":
        pair = _check_shape(row)
        answers = [strip_answer(pair.chosen, rules.tags), strip_answer(pair.rejected, rules.tags)]
    else:
        answers = [None, None]
    new["empty_response"], new["empty_rejected_response"] = answers
    return new


def _prefixed(messages: list[dict[str, Any]], tags: ThinkTags) -> list[dict[str, Any]]:
    last = messages[-1]
    return [*messages[:-1], {**last, "content": with_think_prefix(last["content"], tags)}]


# --- shape: is there a prompt, a chosen and a rejected response at all? ---


def _check_shape(row: Any) -> _Pair:
    if not isinstance(row, dict):
        problem = RowProblem("row", "expected an object", LEAVE_OUT, found=kind_of(row), structural=True)
        return _Pair(problems=[problem])
    pair = _Pair(problems=_media_problems(row))
    messages = row.get("messages")
    problems = conversation_problems(messages, "messages")
    if problems:
        pair.problems += problems
        return pair
    pair.chosen = messages[-1]["content"]
    _check_rejected(row, messages[: last_user(messages) + 1], pair)
    return pair


def _media_problems(row: dict[str, Any]) -> list[RowProblem]:
    remedy = "only text rows can be trained; leave it out"
    return [RowProblem(name, "not empty", remedy) for name in MEDIA_FIELDS if _is_filled(row.get(name))]


def _check_rejected(row: dict[str, Any], prompt: list[dict[str, Any]], pair: _Pair) -> None:
    """Finds the rejected text, in whichever of the two fields it stands."""
    response, conversation = row.get("rejected_response"), row.get("rejected_messages")
    if response is None and conversation is None:
        remedy = "give rejected_response or rejected_messages, or leave the row out"
        pair.problems.append(RowProblem("rejected_response", "missing", remedy))
        return
    texts = []
    if response is not None:
        texts.append(_from_response(response, prompt, pair))
    if conversation is not None and not pair.problems:
        texts.append(_from_conversation(conversation, prompt, pair))
    if pair.problems:
        return
    pair.rejected = texts[0]
    pair.rejected_field = "rejected_messages" if response is None else "rejected_response"
    if texts[0] != texts[-1]:
        problem = "rejected_response holds another response"
        pair.problems.append(RowProblem("rejected_messages", problem, "give one of the two fields"))
    elif response is not None and pair.rejected == pair.chosen:
        # Whatever streams are in use: ms-swift deletes such rows while it loads them.
        pair.problems.append(_same_text(pair.rejected_field))


def _from_response(response: Any, prompt: list[dict[str, Any]], pair: _Pair) -> str:
    name = "rejected_response"
    if isinstance(response, str):
        return response
    if not isinstance(response, list):
        problem = "expected text or a list of messages"
        pair.problems.append(RowProblem(name, problem, LEAVE_OUT, found=kind_of(response), structural=True))
        return ""
    if len(response) > 1 and all(isinstance(text, str) for text in response):
        remedy = "a row prefers one response to one other: write a row for each"
        found = str(len(response))
        pair.problems.append(RowProblem(name, "several responses in one list", remedy, found=found, structural=True))
        return ""
    if any(isinstance(message, dict) and message.get("role") == "user" for message in response):
        problem = "holds a user turn"
        pair.problems.append(RowProblem(name, problem, "put the whole conversation in rejected_messages"))
        return ""
    pair.problems += conversation_problems(response, name, prompt)
    return "" if pair.problems else response[-1]["content"]


def _from_conversation(conversation: Any, prompt: list[dict[str, Any]], pair: _Pair) -> str:
    name = "rejected_messages"
    pair.problems += conversation_problems(conversation, name)
    if pair.problems:
        return ""
    if spoken(conversation[: last_user(conversation) + 1]) != spoken(prompt):
        problem = "another prompt than in messages"
        remedy = "both must be the same up to the last user turn, system message included"
        pair.problems.append(RowProblem(name, problem, remedy))
    return conversation[-1]["content"]


def _is_filled(value: Any) -> bool:
    """Whether a media column holds anything; tables leave blank cells, and objects and lists of nothing."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "null", "None")
    if isinstance(value, dict):
        value = list(value.values())
    return any(_is_filled(item) for item in value) if isinstance(value, list) else bool(value)


# --- trace pair ---


def _trace_problems(pair: _Pair, tags: ThinkTags) -> list[RowProblem]:
    sides = (("messages", pair.chosen), (pair.rejected_field, pair.rejected))
    problems = [problem for name, text in sides if (problem := response_problem(name, text, tags))]
    if problems:
        return problems
    texts = [with_think_prefix(text, tags).strip() for _, text in sides]
    if texts[0] == texts[1]:
        return [_same_text(pair.rejected_field)]
    # One empty trace is a sample like any other: some models skip thinking, and that can be preferred or not.
    # Up to the first closing tag: what follows it may be an answer that speaks of the tags.
    if not any(split_trace(text.partition(tags.close)[0] + tags.close, tags).trace.strip() for text in texts):
        remedy = "generate with thinking on; answers without thinking belong in empty_response"
        return [RowProblem("messages", "neither response has a trace", remedy)]
    return []


def response_problem(name: str, text: str, tags: ThinkTags) -> RowProblem | None:
    """Why a whole response, trace and answer, cannot be one side of a trace pair; None where it can."""
    parts = split_trace(text, tags)
    if not parts.trace.strip() and not parts.answer.strip():
        return RowProblem(name, "blank response", LEAVE_OUT)
    if unclear := unclear_opening(text, tags):
        remedy = "a trace opens once, at the very start; mend the row or leave it out"
        return RowProblem(name, unclear, remedy)
    if parts.closed:
        if _reopened(parts, tags):
            return RowProblem(name, f"no {tags.close} after the second {tags.open}", _CUT_OFF)
        return None
    if parts.opened or tags.open in text:
        return RowProblem(name, f"no {tags.close}", _CUT_OFF)
    remedy = "generate with thinking on; if the trace was cut off, raise the generation limit"
    return RowProblem(name, f"no trace, neither {tags.open} nor {tags.close}", remedy)


def _reopened(parts: Trace, tags: ThinkTags) -> bool:
    return parts.closed and parts.answer.lstrip().startswith(tags.open)


def _same_text(name: str) -> RowProblem:
    return RowProblem(name, "the same text as the chosen response", "leave the row out: it prefers nothing")


# --- empty pair ---


def _check_empty(row: dict[str, Any], pair: _Pair, rules: RowRules) -> tuple[str | None, list[RowProblem]]:
    """Where the empty answers come from, and what stands against them."""
    # Without a trace stream the empty pair is all that the row has.
    drops = "empty" if "trace" in rules.streams else "row"
    answers = {name: row.get(name) for name in ("empty_response", "empty_rejected_response")}
    missing = [name for name, answer in answers.items() if answer is None]
    # "": a table has no other way to leave a cell out, and it may lack the other column.
    if all(answer in (None, "") for answer in answers.values()):
        if rules.empty != "strip":
            remedy = f"--bvpo_empty {rules.empty} needs both empty answers; add them, or use strip"
            return None, [RowProblem("empty_response", "missing", remedy, "row" if rules.empty == "require" else drops)]
        return "stripped", _stripped_problems(pair, rules.tags, drops)
    if missing:
        remedy = "give both empty answers or neither"
        return None, [RowProblem(missing[0], "missing, the other empty answer is there", remedy, drops)]
    return "own", _own_problems(answers, rules.tags, drops)


def _own_problems(answers: dict[str, Any], tags: ThinkTags, drops: str) -> list[RowProblem]:
    found = [own_answer_problem(name, answer, tags) for name, answer in answers.items()]
    problems = [replace(problem, drops=drops) for problem in found if problem]
    if not problems and len({own_answer(answer, tags) for answer in answers.values()}) == 1:
        remedy = "an empty pair needs two different answers"
        problems.append(RowProblem("empty_rejected_response", "the same text as empty_response", remedy, drops))
    return problems


def own_answer_problem(name: str, answer: Any, tags: ThinkTags) -> RowProblem | None:
    """Why an answer that was generated with thinking off cannot be one side of an empty pair; None where it can."""
    if not isinstance(answer, str):
        return RowProblem(name, "expected text", LEAVE_OUT, found=kind_of(answer), structural=True)
    text = own_answer(answer, tags)
    if text is None:
        remedy = "generate it with thinking off"
        return RowProblem(name, f"holds a trace, or speaks of {tags.close}", remedy)
    if not text:
        return RowProblem(name, "blank", "leave both empty answers out of the row to use the stripped ones")
    if text.startswith(tags.open):
        return RowProblem(name, f"no {tags.close} after the second {tags.open}", _CUT_OFF)
    return None


def _stripped_problems(pair: _Pair, tags: ThinkTags, drops: str) -> list[RowProblem]:
    add = "add empty_response and empty_rejected_response"
    texts = (pair.chosen, pair.rejected)
    sides = list(zip(("messages", pair.rejected_field), (split_trace(text, tags) for text in texts), strict=True))
    problems = []
    for text, (name, parts) in zip(texts, sides, strict=True):
        if many := many_ends(text, tags):
            problems.append(RowProblem(name, many, add, drops))
        elif parts.cut_off or _reopened(parts, tags):
            problems.append(RowProblem(name, f"no {tags.close}, so no answer", _CUT_OFF, drops))
        elif not parts.answer.strip():
            problems.append(RowProblem(name, f"no answer after {tags.close}", add, drops))
        elif not parts.closed and any(other.closed for _, other in sides):
            # A cut-off trace of a model that never writes the opening tag looks just like an answer.
            problem = "no trace, while the other response has one"
            problems.append(RowProblem(name, problem, f"{add}, or check that it was not cut off", drops))
    if not problems and sides[0][1].answer.strip() == sides[1][1].answer.strip():
        problem = "the same answer as the chosen response once the traces are stripped"
        problems.append(RowProblem(pair.rejected_field, problem, add, drops))
    return problems
