"""What a response must be to be trained: whole, with its trace, or an answer that stands behind an empty one."""

from typing import Any

from megatron_bvpo.data.conversations import LEAVE_OUT, kind_of, many_ends
from megatron_bvpo.data.empty_trace import ThinkTags, Trace, own_answer, split_trace, unclear_opening, with_think_prefix
from megatron_bvpo.data.row_shape import same_text
from megatron_bvpo.data.verdicts import RowProblem

_CUT_OFF = "generation was cut off; raise the generation limit, or leave the row out"


# --- whole responses ---


def whole_problems(sides: list[tuple[str, str]], tags: ThinkTags) -> list[RowProblem]:
    """What keeps whole responses, given as (field, text), from being a pair, or one response."""
    problems = [problem for name, text in sides if (problem := response_problem(name, text, tags))]
    if problems or len(sides) == 1:
        return problems
    texts = [with_think_prefix(text, tags).strip() for _, text in sides]
    if texts[0] == texts[1]:
        return [same_text(sides[1][0])]
    # One empty trace is a sample like any other: some models skip thinking, and that can be preferred or not.
    # Up to the first closing tag: what follows it may be an answer that speaks of the tags.
    if not any(split_trace(text.partition(tags.close)[0] + tags.close, tags).trace.strip() for text in texts):
        remedy = "generate with thinking on; answers without thinking belong in empty_response"
        return [RowProblem(sides[0][0], "neither response has a trace", remedy)]
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


# --- answers ---


def own_problems(answers: dict[str, Any], tags: ThinkTags) -> list[RowProblem]:
    """What keeps answers of their own, by field, from being a pair, or one answer."""
    problems = [problem for name, answer in answers.items() if (problem := own_answer_problem(name, answer, tags))]
    if not problems and len(answers) == 2 and len({own_answer(answer, tags) for answer in answers.values()}) == 1:
        remedy = "an empty pair needs two different answers"
        problems.append(RowProblem("empty_rejected_response", "the same text as empty_response", remedy))
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


def stripped_problems(sides: list[tuple[str, str]], tags: ThinkTags) -> list[RowProblem]:
    """What keeps the answers of whole responses, given as (field, text), from being trained without their traces."""
    add = "add empty_response" if len(sides) == 1 else "add empty_response and empty_rejected_response"
    parts = [split_trace(text, tags) for _, text in sides]
    problems = []
    for (name, text), part in zip(sides, parts, strict=True):
        if many := many_ends(text, tags):
            problems.append(RowProblem(name, many, add))
        elif part.cut_off or _reopened(part, tags):
            problems.append(RowProblem(name, f"no {tags.close}, so no answer", _CUT_OFF))
        elif not part.answer.strip():
            problems.append(RowProblem(name, f"no answer after {tags.close}", add))
        elif not part.closed and any(other.closed for other in parts):
            # A cut-off trace of a model that never writes the opening tag looks just like an answer.
            problem = "no trace, while the other response has one"
            problems.append(RowProblem(name, problem, f"{add}, or check that it was not cut off"))
    if not problems and len(sides) == 2 and parts[0].answer.strip() == parts[1].answer.strip():
        problem = "the same answer as the chosen response once the traces are stripped"
        problems.append(RowProblem(sides[1][0], problem, add))
    return problems


def _reopened(parts: Trace, tags: ThinkTags) -> bool:
    return parts.closed and parts.answer.lstrip().startswith(tags.open)
