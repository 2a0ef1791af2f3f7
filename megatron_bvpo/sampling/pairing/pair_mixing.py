"""Which prompts go where: data sets mixed in given shares, and a held-out part. Pure; whole prompts only.

Prompts are drawn by a hash of what they say and the seed, so the same prompt gets the same lot in every run, whatever
else there is: a held-out prompt stays held out when samples or prompts are added.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_bvpo.errors import UserError

_ROOM = 1 << 64


class Lot(NamedTuple):
    """What is drawn: a prompt.

    Attributes:
        key: stands for the prompt.
        split_key: stands for what it says; prompts that share it go the same way.
        source: the name of its data set.
    """

    key: str
    split_key: str
    source: str


def fortune(split_key: str, seed: int, what: str) -> float:
    """A number in [0, 1) that belongs to the prompt, the seed and the purpose."""
    raw = hashlib.blake2b(f"{what}|{seed}|{split_key}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") / _ROOM


def read_shares(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """`--mix NAME=SHARE …` as numbers that add up to one.

    Raises:
        UserError: no such data set, one without a share, or shares that are none.
    """
    shares: dict[str, float] = {}
    field = "--mix"
    for entry in given:
        name, mark, text = entry.rpartition("=")
        try:
            value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            value = math.nan
        if not mark or not math.isfinite(value) or value < 0:
            raise UserError(f"expected NAME=SHARE, found {entry!r}", field=field, remedy=f"write {names[0]}=0.3")
        if name not in names:
            remedy = f"the folders are called {', '.join(names)}; NAME=DIR gives one another name"
            raise UserError(f"no folder is called {name!r}", field=field, remedy=remedy)
        if name in shares:
            raise UserError(f"{name} has two shares", field=field, remedy="give each folder one")
        shares[name] = value
    if missing := [name for name in names if name not in shares]:
        raise UserError(f"no share for {', '.join(missing)}", field=field, remedy=f"add {missing[0]}=0 to leave it out")
    total = sum(shares.values())
    if not math.isclose(total, 1.0, rel_tol=1e-3):
        raise UserError(f"the shares add up to {total:g}", field=field, remedy="make it 1, or 100%")
    return {name: value / total for name, value in shares.items()}


def mixed(lots: Sequence[Lot], shares: Mapping[str, float], seed: int) -> set[str]:
    """Keys of as many prompts as the shares allow: the data set that is short of its share decides."""
    by_source = {name: [lot for lot in lots if lot.source == name] for name, share in shares.items() if share > 0}
    total = min(len(found) / shares[name] for name, found in by_source.items())
    kept: set[str] = set()
    for name, found in by_source.items():
        most = min(len(found), round(total * shares[name]))
        ordered = sorted(found, key=lambda lot: (fortune(lot.split_key, seed, "mix"), lot.key))
        kept |= {lot.key for lot in ordered[:most]}
    return kept


def read_heldout(text: str) -> float | int:
    """`--heldout SHARE|N`: a share in (0, 1), or a number of prompts.

    Raises:
        UserError: it is neither.
    """
    try:
        return int(text) if text.strip().isdigit() and int(text) > 0 else _share(text)
    except ValueError:
        remedy = "write 0.05 for a share of the prompts, or 500 for a number of them"
        raise UserError(
            f"expected a share between 0 and 1, or a number of prompts, found {text!r}",
            field="--heldout",
            remedy=remedy,
        ) from None


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def held_out(lots: Sequence[Lot], amount: float | int, seed: int) -> set[str]:
    """Keys of the prompts to hold out; one at least, and one at least stays.

    A share takes each prompt by its own number, so that the part grows with the data and no prompt changes sides.

    Raises:
        UserError: there are not so many prompts.
    """
    drawn = {lot.split_key: fortune(lot.split_key, seed, "heldout") for lot in lots}
    ordered = sorted(drawn, key=lambda key: (drawn[key], key))
    if isinstance(amount, int):
        wanted = amount
    else:
        wanted = min(max(sum(value < amount for value in drawn.values()), 1), max(len(ordered) - 1, 1))
    if wanted >= len(ordered):
        raise UserError(
            f"{wanted} prompts are to be held out, and {len(ordered)} have a pair",
            field="--heldout",
            remedy="hold out fewer, or sample more prompts",
        )
    chosen = set(ordered[:wanted])
    return {lot.key for lot in lots if lot.split_key in chosen}
