"""`package.module:function` as a judge: what its signature asks for, and what its return value means.

Runs in the processes of the pool.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from megatron_bvpo.errors import UserError

GIVEN = ("text", "answer", "messages", "columns", "question", "prompt_id", "mode")
_loaded: list[tuple[Callable[..., Any], Callable[[dict], dict]]] = []


def prepare(function: str) -> None:
    """Import the user's function.

    Raises:
        UserError: no such module or attribute, or a signature that cannot be served.
    """
    call = _find(function)
    _loaded[:] = [(call, _arguments(call, function))]


def judge(payload: dict[str, Any]) -> dict[str, Any]:
    """One item: `{score, right, parsed}`, of which the function told what is not None."""
    call, choose = _loaded[0]
    return meaning(call(**choose(payload)))


def _find(function: str) -> Callable[..., Any]:
    name, _, path = function.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"cannot import {name}: {error}",
            remedy="run in the folder that holds it, or name that folder in PYTHONPATH",
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"{name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{function} is no function, but a {type(found).__name__}")
    return found


def _arguments(call: Callable[..., Any], function: str) -> Callable[[dict], dict]:
    """From an item to the keyword arguments that the signature takes."""
    parameters = inspect.signature(call).parameters.values()
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise UserError(f"{function} takes arguments by position only; named ones are expected: {', '.join(GIVEN)}")
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if {"answer", "entry"} <= set(names):
        # reasoning-gym's convention: the answer is the model's, and the right one stands in the entry.
        return lambda given: {
            "answer": given["final"],
            "entry": {**given["columns"], "question": given["question"], "answer": given["answer"]},
        }
    needed = {p.name for p in parameters if p.name in names and p.default is p.empty}
    if unknown := sorted(needed - set(GIVEN)):
        raise UserError(
            f"{function} needs {', '.join(unknown)}, which is not given; given are {', '.join(GIVEN)} "
            "(or answer and entry, as reasoning-gym's score_answer takes them)"
        )
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = [name for name in GIVEN if anything or name in names]
    if "text" not in taken:
        raise UserError(f"{function} does not take text, the answer that it should judge")
    return lambda given: {name: given[name] for name in taken}


def meaning(value: Any) -> dict[str, Any]:
    """What a function returned, as score, right and parsed (None: not told).

    Raises:
        TypeError: neither a truth value, a number, nor an object of these three.
        ValueError: a number that is none (nan, infinite).
    """
    told: dict[str, Any] = {"score": None, "right": None, "parsed": None}
    if isinstance(value, Mapping):
        if unknown := sorted(map(str, value.keys() - told.keys())):
            raise TypeError(f"the judge's object has {', '.join(unknown)}; expected are score, right and parsed")
        told.update(value, parsed_told="parsed" in value)
        if told["score"] is None and told["right"] is None:
            raise TypeError("the judge's object has neither score nor right")
    elif value is None:
        raise TypeError("a truth value, a number or an object was expected, found NoneType")
    elif _truth(value) is not None:
        told["right"] = _truth(value)
    else:
        told["score"] = value
    if told["right"] is not None:
        if _truth(told["right"]) is None:
            raise TypeError(f"right must be a truth value, found {type(told['right']).__name__}")
        told["right"] = _truth(told["right"])
    if told["score"] is not None:
        if not isinstance(told["score"], Real) or isinstance(told["score"], bool):
            raise TypeError(f"a truth value, a number or an object was expected, found {type(told['score']).__name__}")
        told["score"] = float(told["score"])
        if not math.isfinite(told["score"]):
            raise ValueError(f"the score is {told['score']}")
    if told["parsed"] is not None:
        told["parsed"] = str(told["parsed"])
    return told


def _truth(value: Any) -> bool | None:
    """bool and numpy's bool."""
    return bool(value) if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") else None
