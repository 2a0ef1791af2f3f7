"""Problems that a model of three million parameters solves now and then, with the work written out.

Four families of reasoning-gym in its own wording, in sizes of ours: sums of two to four numbers, products of a
two-digit and a one-digit number, greatest common divisors, and counts of one bits. The work is written here: steps
that are easy one by one, in at most 90 tokens. Answers are judged by reasoning-gym's scorers; drawing problems needs no
package.

Training and held-out problems can never meet: which side a question is on is decided by a hash of its text.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

SPLITS = ("train", "heldout")
_HELD_OUT_SHARE = 0.2
EMPTY_BLOCK = "<think>\n\n</think>\n\n"


class Problem(NamedTuple):
    """A question, the work that leads to its answer, and what reasoning-gym's scorer wants to know (`metadata`)."""

    family: str
    question: str
    work: str
    answer: str
    metadata: dict

    @property
    def thinking(self) -> str:
        """The response with its trace."""
        return f"<think>\n{self.work}\n</think>\n\n{self.answer}"

    @property
    def empty(self) -> str:
        """The response behind an empty think block."""
        return EMPTY_BLOCK + self.answer


def split_of(question: str) -> str:
    """`heldout` for a fifth of all questions, `train` for the others."""
    first = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big")
    return "heldout" if first < _HELD_OUT_SHARE * 2**32 else "train"


def problems(seed: int, split: str, families: tuple[str, ...] = ()) -> Iterator[Problem]:
    """An endless stream of problems of one split, families in turn; a problem may come again.

    Raises:
        ValueError: an unknown split or family.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    families = families or tuple(FAMILIES)
    if unknown := set(families) - FAMILIES.keys():
        raise ValueError(f"unknown families {sorted(unknown)}; there are {', '.join(FAMILIES)}")
    rng = random.Random(f"{split} {seed}")
    while True:
        for family in families:
            problem = FAMILIES[family](rng)
            while split_of(problem.question) != split:
                problem = FAMILIES[family](rng)
            yield problem


def different_problems(n: int, seed: int, split: str, families: tuple[str, ...] = ()) -> list[Problem]:
    """`n` problems with different questions, families in turn as long as they last.

    Raises:
        ValueError: there are not so many, or an unknown split or family.
    """
    found: dict[str, Problem] = {}
    in_vain = 0
    for problem in problems(seed, split, families):
        if len(found) == n:
            break
        in_vain = in_vain + 1 if problem.question in found else 0
        if in_vain > 2000:
            raise ValueError(f"there are only about {len(found)} different {split} questions; ask for fewer than {n}")
        found.setdefault(problem.question, problem)
    return list(found.values())


# ---- families


def _chain_sum(rng: random.Random) -> Problem:
    digits, terms = rng.choice(((1, 3), (1, 4), (2, 2), (2, 3)))
    numbers = [rng.randint(0 if digits == 1 else 10, 10**digits - 1) for _ in range(terms)]
    signs = [rng.choice("+-") for _ in numbers[1:]]
    expression = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
    total, work = numbers[0], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        before, total = total, total + (number if sign == "+" else -number)
        work.append(f"{before}{sign}{number}={total}")
    return Problem(
        "chain_sum",
        f"State the final answer to the following arithmetic problem: {expression} =",
        "\n".join(work),
        str(total),
        dict(source_dataset="chain_sum", expression=expression, num_terms=terms, num_digits=digits),
    )


def _products(rng: random.Random) -> Problem:
    large, small = rng.randint(11, 99), rng.randint(2, 9)
    tens, ones = large - large % 10, large % 10
    work = [f"{tens}*{small}={tens * small}"]
    if ones:
        work += [f"{ones}*{small}={ones * small}", f"{tens * small}+{ones * small}={large * small}"]
    a, b = rng.sample((large, small), 2)
    return Problem(
        "products",
        f"Solve the following multiplication: {a} * {b}. Give only the result as your final answer.",
        "\n".join(work),
        str(a * b),
        dict(source_dataset="products", expression=f"{a} * {b}", num_terms=2),
    )


def _gcd(rng: random.Random) -> Problem:
    # Numbers drawn one by one have mostly 1, which a guess would find.
    wished = rng.randint(1, 9)
    a, b = (wished * rng.randint(1, 60 // wished) for _ in range(2))
    result = math.gcd(a, b)
    work, large, small = [], max(a, b), min(a, b)
    while small:
        work.append(f"{large}%{small}={large % small}")
        large, small = small, large % small
    return Problem(
        "gcd",
        f"Find the Greatest Common Divisor (GCD) of these numbers: {a}, {b}. Give only the GCD as your final answer.",
        "\n".join(work),
        str(result),
        dict(source_dataset="gcd", numbers=[a, b], result=result, num_terms=2),
    )


def _count_bits(rng: random.Random) -> Problem:
    number = rng.randint(1, 1999)
    halves = [number]
    while halves[-1] > 1:
        halves.append(halves[-1] // 2)
    result = number.bit_count()
    return Problem(
        "count_bits",
        f"How many 1 bits are there in the binary representation of the number {number}?",
        "\n".join(f"{half}:{half % 2}" for half in halves),  # its bits, the last one first
        str(result),
        dict(source_dataset="count_bits", number=number, n=number, solution=result, binary=bin(number)[2:]),
    )


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "chain_sum": _chain_sum,
    "products": _products,
    "gcd": _gcd,
    "count_bits": _count_bits,
}
