"""One conversation of a row: is it a prompt and one response? The first thing that it lacks, in words."""

from typing import Any

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, ThinkTags, unclear_opening
from megatron_bvpo.data.verdicts import RowProblem

ROLES = frozenset({"system", "user", "assistant", "tool", "tool_call", "tool_response"})
TOOL_ROLES = frozenset({"tool", "tool_call", "tool_response"})

LEAVE_OUT = "mend the row or leave it out"


def conversation_problems(messages: Any, name: str, prompt: list[dict[str, Any]] | None = None) -> list[RowProblem]:
    """At most one problem: the first thing that keeps the messages from being prompt and one response."""
    if messages is None:
        return [RowProblem(name, "missing", "give the conversation as a list of messages")]
    if not isinstance(messages, list):
        kind = kind_of(messages)
        return [RowProblem(name, "expected a list of messages", LEAVE_OUT, found=kind, structural=True)]
    if not messages:
        return [RowProblem(name, "empty", "give the conversation as a list of messages")]
    for i, message in enumerate(messages):
        if problem := _message_problem(message, f"{name}[{i}]", is_first=i == 0 and prompt is None):
            return [problem]
    last = last_user(messages)
    if prompt is None and last < 0:
        return [RowProblem(name, "no user turn", "the prompt needs at least one user message")]
    response = messages[last + 1 :]
    if any(message["role"] in TOOL_ROLES or message.get("tool_calls") for message in response):
        remedy = "only plain text responses can be trained; leave the row out"
        return [RowProblem(name, "tool calls in the response", remedy)]
    if not response or response[-1]["role"] != "assistant":
        problem, found = "the last message is not the assistant's", f"role {messages[-1]['role']!r}"
        return [RowProblem(name, problem, "end it with the response", found=found)]
    if len(response) > 1:
        problem, found = "several messages after the last user turn", str(len(response))
        return [RowProblem(name, problem, "join them into one assistant message", found=found)]
    return _loss_problems(response[0], name) or _history_problems(messages[: max(last, 0)], name)


def _loss_problems(response: dict[str, Any], name: str) -> list[RowProblem]:
    """A response that its row does not want counted, or not as it is, cannot be preferred."""
    for key, fine in (("loss", "true"), ("loss_scale", "1")):
        value = response.get(key)
        if value is not None and value != 1:
            problem, remedy = f"{key} on the response is not {fine}", f"take {key} off it, or leave the row out"
            return [RowProblem(name, problem, remedy, found=kind_of(value))]
    return []


def _history_problems(earlier: list[dict[str, Any]], name: str) -> list[RowProblem]:
    """ms-swift takes the traces off earlier turns, too: up to the last closing tag, whoever speaks of it."""
    for i, message in enumerate(earlier):
        text = message.get("content")
        if message["role"] != "assistant" or not isinstance(text, str):
            continue
        if problem := many_ends(text, DEFAULT_TAGS) or unclear_opening(text):
            return [RowProblem(f"{name}[{i}].content", problem, "give earlier turns without their traces")]
    return []


def many_ends(text: str, tags: ThinkTags) -> str | None:
    if text.count(tags.close) < 2:
        return None
    return f"more than one {tags.close}, so where the answer begins cannot be told"


def _message_problem(message: Any, where: str, is_first: bool) -> RowProblem | None:
    if not isinstance(message, dict):
        remedy = "write {'role': …, 'content': …}"
        return RowProblem(where, "expected an object", remedy, found=kind_of(message), structural=True)
    role, content = message.get("role"), message.get("content")
    if role is None:
        return RowProblem(f"{where}.role", "missing", "give user, assistant or system")
    if not isinstance(role, str):
        found = kind_of(role)
        return RowProblem(f"{where}.role", "expected text", LEAVE_OUT, found=found, structural=True)
    if role not in ROLES:
        remedy = "use user, assistant or system"
        return RowProblem(f"{where}.role", "unknown role", remedy, found=_short(role))
    if role == "system" and not is_first:
        remedy = "put the system message first"
        return RowProblem(f"{where}.role", "a system message after the start", remedy)
    if message.get("tool_calls") or (role in TOOL_ROLES and content is not None):
        return None  # tool turns of the prompt may hold objects; ms-swift writes them as text
    if content is None:
        return RowProblem(f"{where}.content", "missing", LEAVE_OUT)
    if not isinstance(content, str):
        remedy = "write the message as one text"
        return RowProblem(f"{where}.content", "expected text", remedy, found=kind_of(content), structural=True)
    return None


def last_user(messages: list[dict[str, Any]]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)


def spoken(messages: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """Roles and contents, without the columns that only steer the loss."""
    roles = {"tool_response": "tool"}
    return [(roles.get(m["role"], m["role"]), m.get("content"), m.get("tool_calls")) for m in messages]


def kind_of(value: Any) -> str:
    """The type of a value in a reader's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if type(value) in (int, float):
        return f"the number {_short(value)}"
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} {_short(value)}" if kind == "text" else kind


def _short(value: Any) -> str:
    # A number of thousands of digits cannot be printed in Python, and need not be.
    text = "with too many digits" if isinstance(value, int) and abs(value) >= 10**40 else repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…"
