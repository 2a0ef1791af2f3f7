"""Judges of the tests of sampling, as `package.module:function`."""


def last_digit(text: str, answer: str) -> bool:
    """Whether the text ends in the right digit."""
    return text.rstrip(".").endswith(answer)
