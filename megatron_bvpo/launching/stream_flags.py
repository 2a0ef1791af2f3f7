"""`--bvpo_streams`, `--bvpo_weights` and `--bvpo_alpha`: which streams are run, and what they count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bvpo.data.verdicts import UNPAIRED, RowRules
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.argv import option_list, option_values
from megatron_bvpo.streams import DEFAULT, ORDER, TABLE, estimators, in_order


def parse_alpha(value: Any) -> float | None:
    """`auto` to None, else a number in [0, 1]; raises UserError."""
    text = str(value).strip().lower()
    if text == "auto":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise UserError(
            f"alpha is {value!r}; expected a number in [0, 1], or auto",
            field="--bvpo_alpha",
            remedy="0.5 is the paper's value; 1 trains on the traces alone, 0 on the empty traces alone",
        )
    return alpha


@dataclass(frozen=True)
class StreamSettings:
    """What the flags say.

    Attributes:
        streams: those that are run, in the table's order; one of weight 0 is not.
        measured: the weights of those that estimate are measured.
        weights: of those that estimate: fixed, or where the measurement starts. Trace and empty are both named where
            one alpha says what the two count.
    """

    streams: tuple[str, ...]
    measured: bool
    weights: dict[str, float]


def read_streams(
    names: Sequence[str] | str | None, weights: Sequence[str] | str | None, alpha: object, prior: float = 0.5
) -> StreamSettings:
    """What the values of the flags mean.

    Args:
        names: of `--bvpo_streams`; None: trace and empty.
        weights: of `--bvpo_weights`: `auto`, or NAME=NUMBER for each stream that estimates; None: not given.
        alpha: of `--bvpo_alpha`.
        prior: of `--bvpo_alpha_prior`: of the first stream that estimates; the others share the rest.

    Raises:
        UserError: they are wrong, or do not go together.
    """
    asked = _names(names)
    mine = estimators(asked)
    fixed_alpha, given = parse_alpha(alpha), _words(weights)
    if given and fixed_alpha is not None:
        raise UserError(
            f"is {alpha}, and bvpo_weights is given, too",
            field="--bvpo_alpha",
            remedy="--bvpo_weights says it for any streams: leave --bvpo_alpha out",
        )
    of_alpha = set(mine) == set(DEFAULT)
    if not of_alpha and fixed_alpha is not None:
        raise UserError(
            f"is {alpha}, which weighs trace against empty; the streams are {', '.join(asked)}",
            field="--bvpo_alpha",
            remedy="--bvpo_weights NAME=NUMBER … weighs any streams",
        )
    if given and given != ["auto"]:
        named = _fixed(given, mine)
        return StreamSettings(tuple(s for s in asked if named.get(s, 1.0)), False, named)
    if of_alpha:
        start = prior if fixed_alpha is None else fixed_alpha
        named = {"trace": start, "empty": 1 - start}
        run = asked if fixed_alpha is None else tuple(s for s in asked if named.get(s, 1.0))
        return StreamSettings(run, fixed_alpha is None, named)
    if len(mine) > 1 and "trace" not in mine:
        raise UserError(
            f"are to be measured for {', '.join(mine)}, and what is measured is the distance to the trace stream",
            field="--bvpo_weights",
            remedy=f"add trace to --bvpo_streams, or fix them: {' '.join(f'{s}={1 / len(mine):.2g}' for s in mine)}",
        )
    named = {name: (1 - prior) / (len(mine) - 1) for name in mine} if len(mine) > 1 else dict.fromkeys(mine, 1.0)
    if len(mine) > 1:
        named[mine[0]] = prior
    return StreamSettings(asked, len(mine) > 1, named)


def _words(value: Sequence[str] | str | None) -> list[str]:
    """The words of a flag's value, however it was given."""
    texts = [value] if isinstance(value, str) else list(value or ())
    return [word for text in texts for word in str(text).replace(",", " ").split()]


def _names(value: Sequence[str] | str | None) -> tuple[str, ...]:
    found = _words(value) or list(DEFAULT)
    for name in found:
        if name not in TABLE:
            raise UserError(f"has {name!r}; expected of {', '.join(ORDER)}", field="--bvpo_streams")
    if len(set(found)) < len(found):
        raise UserError(f"is {' '.join(found)}: a stream twice", field="--bvpo_streams", remedy="name each once")
    return in_order(found)


def _fixed(given: list[str], mine: tuple[str, ...]) -> dict[str, float]:
    """NAME=NUMBER for each stream that estimates."""
    found: dict[str, float] = {}
    for word in given:
        name, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1 or name in found:
            remedy = f"for example {' '.join(f'{s}={1 / len(mine):.2g}' for s in mine)}, or auto"
            raise UserError(f"has {word!r}; expected NAME=NUMBER in [0, 1]", field="--bvpo_weights", remedy=remedy)
        found[name] = number
    if set(found) != set(mine):
        raise UserError(
            f"names {', '.join(found)}; the streams to weigh are {', '.join(mine) or 'none'}",
            field="--bvpo_weights",
            remedy="name each of --bvpo_streams once; demonstrations have a schedule or a gate instead",
        )
    if abs(sum(found.values()) - 1) > 1e-6:
        raise UserError(f"add up to {sum(found.values()):g}; expected 1", field="--bvpo_weights")
    return {name: found[name] for name in mine}


def _threshold(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise UserError(f"is {text!r}; expected a number in [0, 1)", field="--bvpo_gate_threshold")
    return number


def rules_of_command(argv: list[str]) -> RowRules:
    """What a run with this command line asks of its rows; raises UserError for values that are wrong."""

    def last(name: str, default: str) -> str:
        return (option_values(argv, name) or [default])[-1]

    names, weights = (option_list(argv, name) for name in ("bvpo_streams", "bvpo_weights"))
    streams = read_streams(names, weights, last("bvpo_alpha", "auto")).streams
    gate = last("bvpo_gate", "none")
    if gate not in ("none", "hpt"):
        raise UserError(f"is {gate!r}; expected none or hpt", field="--bvpo_gate")
    threshold = _threshold(last("bvpo_gate_threshold", "0")) if gate == "hpt" else None
    unpaired = last("loss_type", "sigmoid") in UNPAIRED
    empty = last("bvpo_empty", "strip")
    return RowRules(empty=empty, streams=streams, unpaired=unpaired, gate_threshold=threshold)
