"""Judges of the tests of sampling, as `package.module:function`."""

import time


def slow(text: str) -> bool:
    """Takes a minute."""
    time.sleep(60)
    return bool(text)


def last_digit(text: str, answer: str) -> bool:
    """Whether the text ends in the right digit."""
    return text.rstrip(".").endswith(answer)
