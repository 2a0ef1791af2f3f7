"""ms-swift's other spellings of a row, read the way its AutoPreprocessor reads them.

The scan looks at files before ms-swift does, so it must not refuse what ms-swift would have understood:
`conversations` for `messages`, `from`/`value` for `role`/`content`, `query`/`response`/`history`, Alpaca's
`instruction`/`input`/`output`. After loading every row is in the standard form and none of this is needed.
Nothing here raises: what cannot be read stays as it is, and `check_row` says what is wrong with it.
"""

import ast
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MESSAGES_KEYS = ("messages", "conversation", "conversations")
REJECTED_KEYS = ("rejected_response", "rejected_messages")

_MEDIA = {"image": "images", "images": "images", "audio": "audios", "audios": "audios"}
_MEDIA |= {"video": "videos", "videos": "videos"}
_SYSTEM = {"system": "system", "system_prompt": "system"}
QUERY_KEYS = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = ("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution")
_RESPONSE += ("text", "completion", "content")

_MESSAGES_COLUMNS = _MEDIA | _SYSTEM | dict.fromkeys(MESSAGES_KEYS, "messages")
_QUERY_COLUMNS = _MEDIA | _SYSTEM | dict.fromkeys(QUERY_KEYS, "query") | dict.fromkeys(_RESPONSE, "response")

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function_call": "tool_call"}
_ROLES |= dict.fromkeys(("function_response", "observation", "observations"), "tool_response")
_USER_KEYS, _ASSISTANT_KEYS = ("user", "human"), ("assistant", "gpt", "bot")


def canonical_row(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, auto_mapping: bool = True
) -> dict[str, Any] | None:
    """The row with the columns `messages` and `rejected_…`, or None where its form is not known here.

    Args:
        row: one object of the file. It is not changed.
        columns: the user's `--columns` mapping, from the file's names to ms-swift's.
        auto_mapping: False under `--disable_auto_column_mapping`.
    """
    row = _rename(row, columns or {})
    if any(key in row for key in MESSAGES_KEYS):
        row = _rename(row, _MESSAGES_COLUMNS) if auto_mapping else dict(row)
        system = row.pop("system", None)
        row["messages"] = canonical_messages(row.get("messages"), system)
        if "rejected_messages" in row:
            # As in ms-swift, the `system` column does not reach the rejected conversation.
            row["rejected_messages"] = canonical_messages(row["rejected_messages"])
        return row
    if row and not any(key in row for key in REJECTED_KEYS):
        return None  # perhaps a registered dataset with a preprocessor of its own
    return _from_query(row, auto_mapping)


def _from_query(row: dict[str, Any], auto_mapping: bool) -> dict[str, Any]:
    """`query`, `response`, `history`, `system`, or Alpaca's columns, as messages."""
    alpaca = "instruction" in row and "input" in row
    row = _rename(row, _QUERY_COLUMNS) if auto_mapping else dict(row)
    if alpaca:
        parts = [row.pop("instruction", None), row.pop("input", None)]
        row["query"] = "\n".join(str(part) for part in parts if part) or None
        if row.get("output") is not None:
            row["response"] = row.pop("output")
    query, response, system = row.pop("query", None), row.pop("response", None), row.pop("system", None)
    history = _parsed(row.pop("history", None) or [])
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
        row["messages"] = messages
    return row


def canonical_messages(messages: Any, system: Any = None) -> Any:
    """Messages with the keys `role` and `content` and ms-swift's role names; anything else as it is."""
    messages = _parsed(messages)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return messages
    messages = [_renamed_keys(message) for message in messages]
    if "role" not in messages[0] and "content" not in messages[0]:
        messages = _from_sharegpt(messages)
    for message in messages:
        role = message.get("role")
        if isinstance(role, str):
            message["role"] = _ROLES.get(role.replace("-", "_"), role)
    if system is not None and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _renamed_keys(message: dict[str, Any]) -> dict[str, Any]:
    message = dict(message)
    for alias, name in (("from", "role"), ("value", "content")):
        if alias in message:
            message[name] = message.pop(alias)
    return message


def _from_sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """[{'human': …, 'gpt': …}] as user and assistant messages; unchanged if any pair lacks a half."""
    result = []
    for message in messages:
        user = next((key for key in _USER_KEYS if key in message), None)
        assistant = next((key for key in _ASSISTANT_KEYS if key in message), None)
        if user is None or assistant is None:
            return messages
        result.append({"role": "user", "content": message[user]})
        result.append({"role": "assistant", "content": message[assistant]})
    return result


def _parsed(value: Any) -> Any:
    """Text as JSON, or else as a Python literal, like ms-swift; text that is neither as it is."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


def _rename(row: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Renames columns, whatever their case. Where two would get one name, neither is renamed."""
    by_lower = {key.lower(): key for key in row}
    renamed = {by_lower[k.lower()]: new for k, new in mapping.items() if k.lower() in by_lower}
    uses = Counter(renamed.values())
    renamed = {key: new for key, new in renamed.items() if uses[new] == 1 and key != new}
    return {renamed.get(key, key): value for key, value in row.items()}
