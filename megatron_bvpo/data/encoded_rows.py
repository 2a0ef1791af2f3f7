"""What the names of an encoded row say: which streams it takes part in, and with how many tokens. Pure.

An encoded row is flat: `chosen_input_ids`, `empty_rejected_labels`, … It lacks the names of streams that it has nothing
for; of a single response there is one side, `response`.
"""

from __future__ import annotations

from typing import Any

from megatron_bvpo.streams import ALONE, TABLE


def sequence_names(stream: str) -> list[str]:
    """What the names of the stream's sequences begin with in an encoded row: `empty_chosen_`, …"""
    return [f"{TABLE[stream].key_prefix}{side}_" for side in dict.fromkeys((*TABLE[stream].sides, *ALONE))]


def tokens_of(row: dict[str, Any], stream: str) -> int:
    """Tokens that an encoded row has for `stream`; 0: it takes no part in it."""
    return sum(len(row.get(f"{name}input_ids") or ()) for name in sequence_names(stream))


def has_stream(row: dict[str, Any], stream: str) -> bool:
    """Whether an encoded row takes part in `stream`."""
    return tokens_of(row, stream) > 0


def right_key(stream: str) -> str:
    """Where an encoded row says whether its single response is right."""
    return f"bvpo_right_{stream}"
