"""Judges of the tests of sampling, as `package.module:function`."""

import time


def slow(text: str) -> bool:
    """Takes a minute."""
    time.sleep(60)
    return bool(text)


def last_digit(text: str, answer: str) -> bool:
    """Whether the text ends in the right digit."""
    return text.rstrip(".").endswith(answer)


def third(text: str) -> float:
    """A third for an answer of 0, two for 1, a whole for 2."""
    return (int(text.rstrip(".")[-1]) + 1) / 3
