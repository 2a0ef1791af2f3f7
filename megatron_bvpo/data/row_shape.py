"""The shape of a row: is there a prompt, a chosen and a rejected response? What is missing, in words. Never raises."""

from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.conversations import LEAVE_OUT, conversation_problems, kind_of, last_user, spoken
from megatron_bvpo.data.verdicts import RowProblem
from megatron_bvpo.streams import TABLE

MEDIA_FIELDS = ("images", "videos", "audios", "rejected_images", "rejected_videos", "rejected_audios")


@dataclass
class Responses:
    """The responses of a row, once its shape is known to be right; of unpaired ones there is no rejected one."""

    chosen: str = ""
    rejected: str | None = ""
    rejected_field: str = "rejected_response"
    problems: list[RowProblem] = field(default_factory=list)

    @property
    def sides(self) -> list[tuple[str, str]]:
        """(field, text) of each."""
        found = [("messages", self.chosen)]
        return found if self.rejected is None else [*found, (self.rejected_field, self.rejected)]


def is_blank(value: Any) -> bool:
    """Whether a field says nothing. "": a table has no other way to leave a cell out."""
    return value is None or value == ""


def filled_streams(row: dict[str, Any]) -> list[str]:
    """The streams beside the trace stream that a row has any field of, whatever it holds."""
    return [
        name
        for name, stream in TABLE.items()
        if name != "trace" and not all(map(is_blank, map(row.get, stream.fields)))
    ]


def has_no_trace_responses(row: Any) -> bool:
    """Whether the row is a prompt with responses of other streams than the trace stream, whatever these hold."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        return False
    last = row["messages"][-1]
    if not isinstance(last, dict) or last.get("role") != "user":
        return False
    return all(is_blank(row.get(name)) for name in ("rejected_response", "rejected_messages")) and bool(
        filled_streams(row)
    )


def prompt_problems(row: dict[str, Any]) -> list[RowProblem]:
    """Why `messages` that end in the user turn are no prompt: they are one if they could be answered."""
    problems = media_problems(row)
    return problems or conversation_problems([*row["messages"], {"role": "assistant", "content": ""}], "messages")


def read_responses(row: Any, *, unpaired: bool = False) -> Responses:
    """The row's chosen and rejected response, or of unpaired ones the last message; `problems` where there are none."""
    if not isinstance(row, dict):
        problem = RowProblem("row", "expected an object", LEAVE_OUT, found=kind_of(row), structural=True)
        return Responses(problems=[problem])
    found = Responses(problems=media_problems(row))
    messages = row.get("messages")
    problems = conversation_problems(messages, "messages")
    if problems:
        found.problems += problems
        return found
    found.chosen = messages[-1]["content"]
    if unpaired:
        found.rejected = None
    else:
        _check_rejected(row, messages[: last_user(messages) + 1], found)
    return found


def same_text(name: str) -> RowProblem:
    return RowProblem(name, "the same text as the chosen response", "leave the row out: it prefers nothing")


def media_problems(row: dict[str, Any]) -> list[RowProblem]:
    """Whatever of a row is not text."""
    remedy = "only text rows can be trained; leave it out"
    return [RowProblem(name, "not empty", remedy) for name in MEDIA_FIELDS if _is_filled(row.get(name))]


def _check_rejected(row: dict[str, Any], prompt: list[dict[str, Any]], pair: Responses) -> None:
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
        pair.problems.append(same_text(pair.rejected_field))


def _from_response(response: Any, prompt: list[dict[str, Any]], pair: Responses) -> str:
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


def _from_conversation(conversation: Any, prompt: list[dict[str, Any]], pair: Responses) -> str:
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
