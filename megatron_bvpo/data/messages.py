"""Messages as data sets and servers write them, brought to `{"role": …, "content": text}`.

Read are ms-swift's spellings (`from`/`value`, ShareGPT's pairs, `gpt` and `human`), and what servers return: the role
`developer`, a content of text parts, and a trace that stands beside the content (`reasoning_content`, or `reasoning`
as vLLM calls it now). Nothing here raises: what cannot be read stays as it is, and `check_row` says what is wrong.
"""

import ast
import json
from typing import Any

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, ThinkTags

REASONING_KEYS = ("reasoning_content", "reasoning")

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "developer": "system"}
_ROLES |= {"function_call": "tool_call"}
_ROLES |= dict.fromkeys(("function_response", "observation", "observations"), "tool_response")
_USER_KEYS, _ASSISTANT_KEYS = ("user", "human"), ("assistant", "gpt", "bot")
# What ms-swift's template reads of a message. A table gives every message the keys of all the others, as null.
_KEPT_KEYS = ("role", "content", "loss", "loss_scale", "tool_calls", "tool_call_id", "name")


def canonical_messages(messages: Any, system: Any = None, tags: ThinkTags = DEFAULT_TAGS) -> Any:
    """Messages with the keys `role` and `content` and ms-swift's role names; anything else as it is.

    Args:
        messages: a list of messages, or one as text (JSON or a Python literal). It is not changed.
        system: text of a system message that goes in front unless there is one.
        tags: what a trace beside the content is put between.
    """
    messages = parsed(messages)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return messages
    messages = [_renamed_keys(message) for message in messages]
    if "role" not in messages[0] and "content" not in messages[0]:
        messages = _from_sharegpt(messages)
    messages = [_canonical_message(message, tags) for message in messages]
    if system is not None and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def with_reasoning(content: Any, reasoning: Any, tags: ThinkTags = DEFAULT_TAGS) -> Any:
    """The content with its trace in front, laid out as Qwen's and DeepSeek's chat templates do.

    A content that holds a closing tag has its trace already. Without a content the trace was cut off: it stays open.
    """
    if not isinstance(reasoning, str) or not reasoning.strip() or not (content is None or isinstance(content, str)):
        return content
    if content and tags.close in content:
        return content
    trace = tags.open + "\n" + reasoning.strip("\n")
    if not (content or "").strip():
        return trace
    return trace + "\n" + tags.close + "\n\n" + content.lstrip("\n")


def is_talk(text: str) -> bool:
    """Whether a text is messages written as JSON, which is how a cell of a table holds them. No response is that."""
    if not text.lstrip().startswith("[") or not any(f'"{key}"' in text for key in ("content", "value")):
        return False
    found = parsed(text)
    keys = ({"role", "content"}, {"from", "value"})
    return isinstance(found, list) and all(isinstance(m, dict) and any(k <= m.keys() for k in keys) for m in found)


def parsed(value: Any) -> Any:
    """Text as JSON, or else as a Python literal, like ms-swift; text that is neither as it is."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


def _renamed_keys(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    for alias, name in (("from", "role"), ("value", "content")):
        if alias in message:
            message[name] = message.pop(alias)
    return message


def _canonical_message(message: dict[str, Any], tags: ThinkTags) -> dict[str, Any]:
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = _ROLES.get(role.replace("-", "_"), role)
    if "content" in message:
        message["content"] = _joined_parts(message["content"])
    if message.get("role") == "assistant":
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
        if reasoning is not None:
            message["content"] = with_reasoning(message.get("content"), reasoning, tags)
    return {key: message[key] for key in _KEPT_KEYS if key in message}


def _joined_parts(content: Any) -> Any:
    """`[{"type": "text", "text": …}, …]` as one text; a list that holds anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if _is_text_part(part) else None for part in content]
    return content if None in texts else "".join(texts)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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
