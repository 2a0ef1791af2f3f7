"""`math`: math-verify's verdict of a final answer. `prepare` and `judge` run in the pool's processes.

math-verify's own time limit is an alarm, which a handler of sympy's may swallow and a long product of integers never
hears; here it is off, and the pool kills. `verify(gold, answer)` is not symmetric: the gold comes first.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging import final_answers
from megatron_bvpo.sampling.judging.judge_items import Item
from megatron_bvpo.sampling.judging.judge_pool import JudgePool
from megatron_bvpo.sampling.judging.pool_judges import PoolJudge
from megatron_bvpo.sampling.samples import Judgement

MEMORY_GIB = 4  # 10^(10^10) is over it before it is over the time limit

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " "),
        **{"²": "^2", "³": "^3", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "π": r"\pi "},
        **{"∪": r"\cup ", "∩": r"\cap ", "⁄": "/", "％": "%", "·": r"\cdot ", "½": "1/2", "¼": "1/4", "¾": "3/4"},
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,2})(?![\w.]*\w)")
_MIXED = re.compile(r"(?<![\w./^])(\d+)\s(\d+)/(\d+)(?![\w/])")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'’,-]+[^\W\d_]+)*")
_MATHS = re.compile(r"\$|\\boxed|\\\(|\\\[")


def prepare() -> None:
    """Import math-verify (sympy comes with it)."""
    import logging

    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def judge(payload: tuple[str, str]) -> tuple[bool, str | None]:
    """Whether the text's final answer is the gold one, and the final answer as it was read.

    Args:
        payload: the right answer and the text.

    Raises:
        ValueError: the right answer cannot be read.
    """
    from math_verify import verify

    gold, text = final_answers.gold(payload[0]), payload[1]
    if _is_words(gold):
        return _same_words(gold, text)
    golds = _expressions(_readable(gold) if _MATHS.search(gold) else f"${_readable(gold)}$")
    if not any(not isinstance(expression, str) for expression in golds):
        golds = _expressions(_readable(gold))
    if not golds:
        raise ValueError(f"the right answer {gold[:60]!r} cannot be read as mathematics")
    parsed = None
    for reading in _readings(text):
        answers = _expressions(reading)
        if answers and verify(golds, answers, timeout_seconds=None, allow_set_relation_comp=True):
            return True, _shown(answers)
        parsed = parsed or _shown(answers)
    return False, parsed


def math_judge(workers: int, time_limit: float) -> PoolJudge:
    """math-verify in `workers` processes, `time_limit` seconds an answer.

    Raises:
        UserError: math-verify is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        settings = {"judge": "math", "math_verify": version("math-verify")}
    except PackageNotFoundError as error:
        raise UserError(
            "math-verify is not installed", field="--with", remedy="pip install 'megatron-bvpo[rehearsal]'"
        ) from error

    def read(item: Item, told: tuple[bool, str | None]) -> Judgement:
        right, parsed = told
        return Judgement(*item.key, score=float(right), right=right, parsed=parsed)

    def payload(item: Item) -> Any:
        return item.answer, item.text

    pool = JudgePool("megatron_bvpo.sampling.judging.math_judge:judge", {}, workers, time_limit, MEMORY_GIB)
    return PoolJudge("math", settings, True, pool, payload, read)


def _readings(text: str) -> Iterator[str]:
    """The text as math-verify reads it, which finds LaTeX and numbers; then an answer in plain words' place, such as
    "The answer is 2π" and "the answer is x + 1", as LaTeX."""
    yield _readable(text)
    stated = final_answers.stated(text)
    if stated is not None and not _MATHS.search(text):
        for reading in final_answers.readings(stated):
            yield f"${_readable(reading.replace('**', '').strip().rstrip('.'))}$"


def _shown(answers: list[Any]) -> str | None:
    texts = [answer for answer in answers if isinstance(answer, str)]
    return texts[-1].strip(" .*") if texts else None


def _expressions(text: str) -> list[Any]:
    """math-verify's reading: [expression, its text], [text], or []."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def _readable(text: str) -> str:
    """The same text in signs that math-verify knows: its minus, 1e6 and 1 1/2 are not read."""
    text = re.sub(r"\\\$\s?(?=\d)", "", text)  # money: math-verify takes $1000 and not \$1000
    text = _SCIENTIFIC.sub(lambda match: format(Decimal(match[0]), "f"), text.translate(_SIGNS))
    return _MIXED.sub(lambda match: f"{int(match[1]) * int(match[3]) + int(match[2])}/{match[3]}", text)


def _is_words(gold: str) -> bool:
    """Whether the answer is words: math-verify would take them for products of letters, in which "was" is "saw"."""
    bare = final_answers.normalised(gold)
    words = re.split(r"[\s,-]+", bare)
    return bool(_WORDS.fullmatch(bare)) and (max(map(len, words)) > 3 or bare.casefold() in ("yes", "no"))


def _same_words(gold: str, text: str) -> tuple[bool, str | None]:
    wanted = final_answers.normalised(gold, ignore_case=True)
    parsed = final_answers.final(text)
    for candidate in final_answers.readings(parsed) if parsed is not None else ():
        if final_answers.normalised(candidate, ignore_case=True) == wanted:
            return True, candidate
    return False, parsed
