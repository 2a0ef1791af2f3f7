"""The streams: what a run can learn from. One table, which every room reads; nothing here loads torch.

A stream is: which fields of a row it reads, how many sequences these make, and whether it **estimates** the gradient of
the marginal preference loss (a weight on the simplex, fixed or measured) or **demonstrates** (a schedule or a gate).
Which loss it takes is a setting of the run: `--loss_type` for estimators, `--bvpo_expert_loss` for demonstrations.
A row takes part in every stream of the run that it has the fields for, and each stream counts its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PAIR = ("chosen", "rejected")
ALONE = ("response",)


@dataclass(frozen=True)
class Stream:
    """One signal.

    Attributes:
        name: in flags, logs and files.
        fields: fields of a row that it reads.
        sides: the sequences of one row: a preferred and a rejected response, or one response.
        estimates: it estimates the marginal gradient, and probes measure it; else it demonstrates.
        what: in a few words, for tables.
    """

    name: str
    fields: tuple[str, ...]
    sides: tuple[str, ...]
    estimates: bool
    what: str

    @property
    def key_prefix(self) -> str:
        """Of the names of an encoded row: `empty_` in `empty_chosen_input_ids`; ms-swift's own for the trace stream."""
        return "" if self.name == "trace" else f"{self.name}_"

    @property
    def log_prefix(self) -> str:
        """Of what is logged: `empty/` in `empty/rewards/margins`; ms-swift's own names for the trace stream."""
        return "" if self.name == "trace" else f"{self.name}/"

    @property
    def members(self) -> str:
        """What it counts, in words."""
        return "pairs" if self.sides == PAIR else "demonstrations"


# In the order of a batch. The first estimator of a run is the one whose bias is taken to be 0.
TABLE = {
    stream.name: stream
    for stream in (
        Stream("trace", ("messages", "rejected_response"), PAIR, True, "sampled traces with their answers"),
        Stream("empty", ("empty_response", "empty_rejected_response"), PAIR, True, "answers without a trace"),
        Stream("short", ("short_response", "short_rejected_response"), PAIR, True, "responses with a shortened trace"),
        Stream("expert", ("expert_response",), ALONE, False, "demonstrations"),
    )
}
ORDER = tuple(TABLE)
DEFAULT = ("trace", "empty")


def sides_of(name: str, *, unpaired: bool = False) -> tuple[str, ...]:
    """The sequences of one row: of an estimator whose loss takes single responses, one."""
    stream = TABLE[name]
    return ALONE if unpaired and stream.estimates else stream.sides


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order of the table."""
    given = set(names)
    return tuple(name for name in ORDER if name in given)


def estimators(names: Iterable[str]) -> tuple[str, ...]:
    """Those of them that estimate the marginal gradient."""
    return tuple(name for name in names if TABLE[name].estimates)
