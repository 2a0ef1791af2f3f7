"""Rows as public preference data have them: `chosen` and `rejected`, NeMo-RL's ranked completions, rated generations.

`chosen` and `rejected` are whole conversations, or responses beside a prompt (`prompt`, `question`, `messages` that
end with the user, …). A row that could mean two things is left as it is.
"""

from collections.abc import Sequence
from typing import Any

from megatron_bvpo.data.messages import canonical_messages, parsed

# The two sides, and what each name is paired with.
_SIDES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
)
_USED = {name for names in _SIDES for name in names} | {"context", "completions"}


def from_pair_form(row: dict[str, Any], prompt_keys: Sequence[str]) -> dict[str, Any]:
    """The row with `messages` and a rejected side, or the very row where it has no such form.

    Args:
        row: a row; it is not changed.
        prompt_keys: the columns that may hold the prompt, best first.
    """
    by_lower = {key.lower(): key for key in row}
    if "completions" in by_lower and "context" in by_lower:
        row = _from_ranked(row, by_lower)
    elif by_lower.keys() >= {"generations", "ratings"} and "chosen" not in by_lower:
        row = _from_rated(row, by_lower)  # argilla's rows have these two beside their sides, too
    by_lower = {key.lower(): key for key in row}
    for names in _SIDES:
        if all(row.get(by_lower.get(name)) is not None for name in names):
            keys = [by_lower[name] for name in names]
            return _from_sides(row, keys, by_lower, prompt_keys) or row
    return row


def _from_ranked(row: dict[str, Any], by_lower: dict[str, str]) -> dict[str, Any]:
    """NeMo-RL: `context`, and `completions` with a rank each; rank 0 is the best."""
    ranked = parsed(row[by_lower["completions"]])
    if not isinstance(ranked, list) or len(ranked) < 2 or not all(isinstance(entry, dict) for entry in ranked):
        return row
    ranks = [entry.get("rank") for entry in ranked]
    if not all(isinstance(rank, int) for rank in ranks) or sorted(ranks)[0] == sorted(ranks)[1]:
        return row
    said = [entry.get("completion") for entry in sorted(ranked, key=lambda entry: entry["rank"])]
    rest = {key: value for key, value in row.items() if key.lower() not in ("context", "completions")}
    # Of more than two, which is the rejected one is not ours to say: check_row refuses several responses.
    rejected = said[1] if len(said) == 2 else [_text_of(completion) for completion in said[1:]]
    return {**rest, "prompt": row[by_lower["context"]], "chosen": said[0], "rejected": rejected}


def _from_rated(row: dict[str, Any], by_lower: dict[str, str]) -> dict[str, Any]:
    """distilabel: two `generations` and their `ratings`; the higher one is the better. A tie prefers nothing."""
    said, ratings = (parsed(row[by_lower[name]]) for name in ("generations", "ratings"))
    if not all(isinstance(column, list) and len(column) == 2 for column in (said, ratings)):
        return row
    if not all(isinstance(rating, (int, float)) for rating in ratings) or ratings[0] == ratings[1]:
        return row
    rest = {key: value for key, value in row.items() if key.lower() not in ("generations", "ratings")}
    better = 0 if ratings[0] > ratings[1] else 1
    return {**rest, "chosen": said[better], "rejected": said[1 - better]}


def _text_of(completion: Any) -> Any:
    return completion[-1].get("content") if _is_talk(completion) else completion


def _from_sides(
    row: dict[str, Any], keys: list[str], by_lower: dict[str, str], prompt_keys: Sequence[str]
) -> dict[str, Any] | None:
    chosen, rejected = (_side(row[key]) for key in keys)
    rest = {key: value for key, value in row.items() if key.lower() not in _USED}
    prompt = _prompt(row, by_lower, prompt_keys)
    used = {by_lower[name] for name in ("messages", *prompt_keys) if name in by_lower}
    rest = {key: value for key, value in rest.items() if key not in used}
    if _is_conversation(chosen):
        said = row.get(by_lower.get("messages"))
        if said is not None and _ends_with_user(said) is False and not _same_talk(said, chosen):
            return None  # two chosen conversations
        rest["messages"] = chosen
    elif prompt is not None:
        rest["messages"] = [*prompt, *(chosen if _is_talk(chosen) else [{"role": "assistant", "content": chosen}])]
    else:
        return None
    rest["rejected_messages" if _is_conversation(rejected) else "rejected_response"] = rejected
    return rest


def _side(value: Any) -> Any:
    """Conversations that stand as text, such as in a table, as lists; one message as a list of one."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        read = parsed(value)
        value = read if _is_talk(read) or _is_talk([read]) else value
    return [value] if _is_talk([value]) else value


def _prompt(row: dict[str, Any], by_lower: dict[str, str], prompt_keys: Sequence[str]) -> list[dict[str, Any]] | None:
    """The messages before the responses; None where no column holds them, or two do."""
    messages = row.get(by_lower.get("messages"))
    if messages is None:
        messages = row.get(by_lower.get("conversations"))
    if messages is not None:
        return parsed(messages) if _ends_with_user(messages) else None
    filled = [row[by_lower[name]] for name in prompt_keys if row.get(by_lower.get(name)) not in (None, "")]
    if by_lower.keys() >= {"instruction", "input"} and all(isinstance(text, str) for text in filled):
        filled = ["\n".join(filled[::-1])]  # Alpaca: the input comes after the instruction
    if len(filled) != 1:
        return None
    prompt = _side(filled[0])
    if _is_talk(prompt):
        return prompt
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else None


def _is_talk(value: Any) -> bool:
    """Whether it is a list of messages."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and ("role" in m or "from" in m) and ("content" in m or "value" in m) for m in value)


def _is_conversation(value: Any) -> bool:
    """Whether it is a list of messages with a user turn."""
    return _is_talk(value) and any(message.get("role") == "user" for message in canonical_messages(value))


def _ends_with_user(messages: Any) -> bool | None:
    """None where it is no list of messages."""
    messages = canonical_messages(messages)
    return messages[-1].get("role") != "assistant" if _is_talk(messages) else None


def _same_talk(one: Any, other: Any) -> bool:
    return canonical_messages(one) == canonical_messages(other)
