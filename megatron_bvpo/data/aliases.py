"""The spellings of a row that are read, brought to one: `messages` with `rejected_response` or `rejected_messages`.

ms-swift's own spellings are read as its AutoPreprocessor reads them: `conversations` for `messages`, `query`,
`response` and `history`, Alpaca's `instruction`, `input` and `output`. Read too are the public forms that it drops:
`chosen` and `rejected` (data/pair_forms.py) and what servers return (data/messages.py).
Nothing here raises: what cannot be read stays as it is, and `check_row` says what is wrong with it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, ThinkTags
from megatron_bvpo.data.messages import REASONING_KEYS, canonical_messages, is_talk, parsed, with_reasoning
from megatron_bvpo.data.pair_forms import from_pair_form
from megatron_bvpo.streams import TABLE

MESSAGES_KEYS = ("messages", "conversation", "conversations")
REJECTED_KEYS = ("rejected_response", "rejected_messages")
# What a prompt can be trained with beside a response of its own.
_STREAM_KEYS = tuple(name for stream in TABLE.values() if stream.name != "trace" for name in stream.fields)

_MEDIA = {"image": "images", "images": "images", "audio": "audios", "audios": "audios"}
_MEDIA |= {"video": "videos", "videos": "videos"}
_SYSTEM = {"system": "system", "system_prompt": "system"}
QUERY_KEYS = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = ("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution")
_RESPONSE += ("text", "completion", "content")

# A blank response is somebody's mistake, a blank conversation an empty cell.
_NEVER_BLANK = {*MESSAGES_KEYS, *_SYSTEM, "rejected_messages", "history", "tools", "chat_template_kwargs"}
_NEVER_BLANK |= {"chosen", "rejected", "chosen_messages", "context", "completions"}
_NEVER_BLANK |= {"label", "empty_label", "accept_rate"}

_MESSAGES_COLUMNS = _MEDIA | _SYSTEM | dict.fromkeys(MESSAGES_KEYS, "messages")
_QUERY_COLUMNS = _MEDIA | _SYSTEM | dict.fromkeys(QUERY_KEYS, "query") | dict.fromkeys(_RESPONSE, "response")


def canonical_row(
    row: dict[str, Any],
    columns: Mapping[str, str] | None = None,
    auto_mapping: bool = True,
    tags: ThinkTags = DEFAULT_TAGS,
) -> dict[str, Any] | None:
    """The row with the columns `messages` and `rejected_…`, or None where its form is not known.

    Args:
        row: one row of the file. It is not changed.
        columns: the user's `--columns` mapping, from the file's names to ms-swift's.
        auto_mapping: False under `--disable_auto_column_mapping`: columns then have ms-swift's names.
        tags: the model's think tags, for a trace that stands beside its answer.
    """
    row = _without_blanks(_mapped(row, columns or {}))
    if auto_mapping:
        row = from_pair_form(row, QUERY_KEYS)
    if any(key in row for key in MESSAGES_KEYS):
        row = _rename(row, _MESSAGES_COLUMNS) if auto_mapping else dict(row)
        system = row.pop("system", None)
        row["messages"] = canonical_messages(row.get("messages"), system, tags)
        row = _with_one_rejected_side(row, system, tags)
        return _with_row_reasoning(row, tags)
    if row and row.get("label") is None and not any(row.get(key) for key in (*REJECTED_KEYS, *_STREAM_KEYS)):
        return None
    row = _with_one_rejected_side(_from_query(row, auto_mapping, tags), row.get("system"), tags)
    return _with_row_reasoning(row, tags)


def _without_blanks(row: dict[str, Any]) -> dict[str, Any]:
    """The row without columns that say nothing: a table gives every row all columns."""
    return {
        key: value
        for key, value in row.items()
        if value is not None and not (key.lower() in _NEVER_BLANK and isinstance(value, str) and not value.strip())
    }


def _from_query(row: dict[str, Any], auto_mapping: bool, tags: ThinkTags) -> dict[str, Any]:
    """`query`, `response`, `history`, `system`, or Alpaca's columns, as messages."""
    alpaca = "instruction" in row and "input" in row
    row = _rename(row, _QUERY_COLUMNS) if auto_mapping else dict(row)
    if alpaca:
        parts = [row.pop("instruction", None), row.pop("input", None)]
        row["query"] = "\n".join(str(part) for part in parts if part) or None
        if row.get("output") is not None:
            row["response"] = row.pop("output")
    query, response, system = row.pop("query", None), row.pop("response", None), row.pop("system", None)
    paired = row.get("label") is not None or any(row.get(key) for key in REJECTED_KEYS)
    if not paired and any(row.get(key) for key in _STREAM_KEYS):
        response = None  # a blank cell, or the answer that a judge compares with: the prompt comes with other responses
    history = parsed(row.pop("history", None) or [])
    if isinstance(response, list) and response:
        response = response[0]
    messages = [] if system is None else [{"role": "system", "content": system}]
    rounds = history if isinstance(history, list) else []
    for pair in [*rounds, [query, response]]:
        if not isinstance(pair, (list, tuple)) or len(pair) < 2:
            return row  # check_row then reports that there are no messages
        said = zip(("user", "assistant"), pair[:2], strict=True)
        messages += [{"role": role, "content": text} for role, text in said if text is not None]
    if messages:
        row["messages"] = canonical_messages(messages, tags=tags)
    return row


def _with_one_rejected_side(row: dict[str, Any], system: Any, tags: ThinkTags) -> dict[str, Any]:
    """Reads the rejected side; a blank cell of a table counts as missing where the other column is filled."""
    conversation = row.get("rejected_messages")
    if conversation is not None:
        row["rejected_messages"] = canonical_messages(conversation, system, tags)
    response = row.get("rejected_response")
    if isinstance(response, str) and is_talk(response):
        response = parsed(response)
    if isinstance(response, str):
        if conversation is not None and not response.strip():
            row["rejected_response"] = None
        return row
    if isinstance(response, dict):
        response = [response]
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], str):
        row["rejected_response"] = response[0]
    elif isinstance(response, list):
        row["rejected_response"] = canonical_messages(response, tags=tags)
    return row


def _with_row_reasoning(row: dict[str, Any], tags: ThinkTags) -> dict[str, Any]:
    """A trace in a column of its own beside the response, on either side.

    `reasoning` alone may be anybody's: it is a trace only where the rejected side has one, too.
    """
    rejected = next((row[f"rejected_{key}"] for key in REASONING_KEYS if row.get(f"rejected_{key}")), None)
    chosen = row.get("reasoning_content") or (row.get("reasoning") if rejected is not None else None)
    if chosen is not None:
        row["messages"] = _reasoned(row.get("messages"), chosen, tags)
    if rejected is not None:
        if isinstance(row.get("rejected_response"), str):
            row["rejected_response"] = with_reasoning(row["rejected_response"], rejected, tags)
        for name in REJECTED_KEYS:
            row[name] = _reasoned(row.get(name), rejected, tags)
    return row


def _reasoned(messages: Any, reasoning: Any, tags: ThinkTags) -> Any:
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return messages
    last = messages[-1]
    if last.get("role") != "assistant":
        return messages
    return [*messages[:-1], {**last, "content": with_reasoning(last.get("content"), reasoning, tags)}]


def _mapped(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the user's names. A column that stands where another is mapped to gives way."""
    wanted = {old.lower(): new for old, new in columns.items()}
    renamed = {key: wanted[key.lower()] for key in row if key.lower() in wanted}
    taken = set(renamed.values())
    return {renamed.get(key, key): value for key, value in row.items() if key in renamed or key not in taken}


def _rename(row: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Renames columns, whatever their case. Where two would get one name, neither is renamed."""
    by_lower = {key.lower(): key for key in row}
    renamed = {by_lower[k.lower()]: new for k, new in mapping.items() if k.lower() in by_lower}
    uses = Counter(renamed.values())
    renamed = {key: new for key, new in renamed.items() if uses[new] == 1 and key != new}
    return {renamed.get(key, key): value for key, value in row.items()}
