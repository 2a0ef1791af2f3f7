"""Which words give away which side of a pair is the chosen one, and how well they alone would do it.

Half of the prompts teach, the other half is asked. A text is its set of words and of neighbouring two, with its first
and last words apart: form shows there. A feature weighs the logarithm of how often it stands in the chosen side alone
to how often in the rejected side alone; the side with the larger sum is taken for the chosen one.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\\?\w+|[^\w\s]")
# Of a long text its beginning and end; and no more pairs than give a score to two digits.
_EACH_END, _PAIRS = 100, 4000
_LEAST = 40


@dataclass(frozen=True)
class SideWords:
    """What words alone know.

    Attributes:
        score: share of the asked pairs whose chosen side they find, ties counting half.
        error: its standard error.
        asked: how many pairs were asked.
        telling: the words that tell most, each with how often the chosen and the rejected side alone had it.
    """

    score: float
    error: float
    asked: int
    telling: tuple[tuple[str, int, int], ...] = ()

    @property
    def tells(self) -> bool:
        """Whether the score is above one half for certain (three standard errors), and not by a trifle."""
        return self.score > 0.5 + max(3 * self.error, 0.05)


def features(text: str) -> set[str]:
    words = _WORD.findall(text.casefold())
    ends = {f"^ {' '.join(words[:2])}", f"{' '.join(words[-2:])} $"}
    if len(words) > 2 * _EACH_END:
        words = [*words[:_EACH_END], *words[-_EACH_END:]]
    return {*words, *(f"{one} {other}" for one, other in zip(words, words[1:], strict=False)), *ends}


def side_words(prompts: Sequence[str], texts: Callable[[int], tuple[str, str]], shown: int = 8) -> SideWords | None:
    """What words know of the pairs; None of fewer than 40.

    Args:
        prompts: stands for the prompt of each pair; pairs of one prompt are taught or asked together.
        texts: number of a pair → its chosen and its rejected text. Asked for one at a time, of at most 4,000 pairs.
        shown: how many telling words.
    """
    step = max(len(prompts) // _PAIRS, 1)
    drawn = range(0, len(prompts), step)[:_PAIRS]
    taught = [i for i in drawn if hashlib.blake2b(prompts[i].encode(), digest_size=1).digest()[0] % 2]
    asked = sorted(set(drawn) - set(taught))
    if min(len(taught), len(asked)) < _LEAST // 2:
        return None
    ups, downs = Counter(), Counter()
    for i in taught:
        one, other = map(features, texts(i))
        ups.update(one - other)
        downs.update(other - one)
    weights = {w: math.log((ups[w] + 1) / (downs[w] + 1)) for w in ups.keys() | downs.keys()}
    score = 0.0
    for i in asked:
        one, other = map(features, texts(i))
        # Sorted: a sum depends on its order, and that of a set on the process.
        lead = sum(weights.get(w, 0.0) for w in sorted(one - other)) - sum(
            weights.get(w, 0.0) for w in sorted(other - one)
        )
        score += 1.0 if lead > 1e-9 else 0.5 if lead > -1e-9 else 0.0
    score /= len(asked)
    error = math.sqrt(max(score * (1 - score), 0.25 / len(asked)) / len(asked))
    return SideWords(score, error, len(asked), _telling(ups, downs, shown))


def _telling(ups: Counter[str], downs: Counter[str], shown: int) -> tuple[tuple[str, int, int], ...]:
    """Words that stand on one side more often than the luckiest of as many coins would fall."""
    seen = [w for w in ups.keys() | downs.keys() if ups[w] + downs[w] >= 5]
    bound = math.sqrt(2 * math.log(2 * max(len(seen), 1)))
    signs = {w: (ups[w] - downs[w]) / math.sqrt(ups[w] + downs[w]) for w in seen}
    told = sorted((w for w in seen if abs(signs[w]) > bound), key=lambda w: (-abs(signs[w]), w.count(" "), w))
    return tuple((w, ups[w], downs[w]) for w in told[:shown])
