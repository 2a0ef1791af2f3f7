"""What a server's answer means: status, body, headers → an `Outcome`."""

import email.utils
import json
import time
from typing import Any, Literal, NamedTuple

from megatron_bvpo.sampling.asking.modes import CHAT


class Outcome(NamedTuple):
    """What became of one try.

    Attributes:
        kind: good; failed (try again, counted); busy (wait); down (this server is of no use now); refused (for good).
        why: in words.
        wait: seconds that a busy server asks for.
        wrong: down by a wrong setting.
        lost: no answer came: is the server there at all?
        choice, usage: the answer.
    """

    kind: Literal["good", "failed", "busy", "down", "refused"]
    why: str = ""
    wait: float | None = None
    wrong: bool = False
    lost: bool = False
    choice: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


def outcome_of_status(status: int, text: str, wait: float | None) -> Outcome:
    """What a status other than 200 means."""
    why = f"{status}: {text}"
    if status in (429, 502, 503, 504):
        return Outcome("busy", why, wait=wait)
    if status in (401, 403, 404):
        return Outcome("down", why, wrong=True)
    if status >= 500 or status in (408, 409, 425):
        return Outcome("failed", why)
    return Outcome("refused", why)


def choice_of(raw: bytes, path: str) -> Outcome:
    """The answer in a body, or what is wrong with it."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return Outcome("failed", f"no JSON: {raw[:60].decode('utf-8', 'replace')!r}")
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Outcome("failed", f"no answer in it: {refusal_text(raw)}")
    choice = choices[0]
    kept = choice.get("message") if path == CHAT else choice.get("text")
    if not isinstance(kept, dict if path == CHAT else str):
        return Outcome("failed", f"an answer without {'message' if path == CHAT else 'text'}")
    if choice.get("finish_reason") in ("abort", "error"):
        return Outcome("failed", "the server broke the answer off")
    usage = data.get("usage")
    return Outcome("good", choice=choice, usage=usage if isinstance(usage, dict) else None)


def refusal_text(raw: bytes) -> str:
    """What a server says of an error, on one line."""
    text = raw.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    text = " ".join(text.split())
    return text[:300] + ("…" if len(text) > 300 else "") if text else "no reason given"


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header: a number or a date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
