"""Keys of which only one counts: which, where a run gives both.

ms-swift obeys one key of each pair wherever both are given: behind a file with `num_train_epochs: 1`,
`--train_iters 10` trains the whole epoch. Here the command line wins over the file, and two rivals in one place are
refused. The run itself, `bvpo plan`, the preflight and train.sh all ask `settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.argv import TRUE


def _given(value: str) -> bool:
    return True


def _is(*texts: str) -> Callable[[str], bool]:
    return lambda value: value.lower() in texts


def _is_positive(value: str) -> bool:
    try:
        return float(value) > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Rivals:
    """Two keys, of which ms-swift obeys `winner` where both are given.

    Attributes:
        winner, loser: the keys.
        winning, losing: at which of their values that is so.
        together: what both in one place are: `refused`; `told`, where ms-swift says itself which one it takes, or
            both have a use; `left`, where another check has words for it.
        across: what a loser on the command line does to the file's winner: `wins`; `refused`, where the run would
            then be another one than either asked for; `left`.
        drops: whether a winner on the command line takes the file's loser away. It does nothing there, but the
            checks of a single key would still see it.
    """

    winner: str
    loser: str
    winning: Callable[[str], bool] = _given
    losing: Callable[[str], bool] = _given
    together: str = "refused"
    across: str = "wins"
    drops: bool = True


_EPOCH = _is("epoch")
_TRUE = _is(*TRUE)
_FULL = _is("full")
_NOT_FULL = _is("selective", "none")
RIVALS = (
    Rivals("num_train_epochs", "train_iters"),
    Rivals("save_strategy", "save_steps", winning=_EPOCH),
    Rivals("save_strategy", "eval_steps", winning=_EPOCH, across="refused"),
    Rivals("eval_iters", "eval_steps", winning=_is("0"), together="told", drops=False),
    Rivals("lr_warmup_fraction", "lr_warmup_iters"),
    Rivals("target_regex", "target_modules"),
    Rivals("val_dataset", "split_dataset_ratio", losing=_is_positive, together="told"),
    # An adapter in Megatron's form wins, as train.sh's resume needs it; the other one still gives the LoRA rank.
    Rivals("mcore_adapter", "adapters", together="told", drops=False),
    Rivals("mcore_ref_adapter", "ref_adapters"),
    Rivals("mcore_ref_model", "ref_model"),
    Rivals("pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size"),
    Rivals("fp16", "bf16", winning=_TRUE, losing=_TRUE),
    # Of full recomputation only; without it they are refused or ignored.
    Rivals("recompute_granularity", "recompute_method", winning=_NOT_FULL, together="left", across="left"),
    Rivals("recompute_granularity", "recompute_num_layers", winning=_NOT_FULL, together="left", across="left"),
    # An adapter makes LoRA of the run, whatever tuner_type says.
    *(
        Rivals(adapter, "tuner_type", losing=_FULL, across="refused", drops=False)
        for adapter in ("adapters", "ref_adapters", "mcore_adapter", "mcore_ref_adapter")
    ),
)


def settle(
    file_keys: Mapping[str, Any], command_keys: Mapping[str, Any], file: str | None = None
) -> tuple[set[str], list[str]]:
    """Which of the file's keys do not count beside those of the command line.

    Args:
        file_keys, command_keys: names (with underscores) and values, those of the file and those behind it.
        file: its path, for the messages.

    Returns:
        The file's keys to leave out, and a line for each that says so.

    Raises:
        UserError: two rivals stand in one place.
    """
    in_file, on_line = _texts(file_keys), _texts(command_keys)
    both = {**in_file, **on_line}
    streaming = _TRUE(both.get("streaming", ""))
    dropped: dict[str, str] = {}
    for pair in RIVALS:
        if streaming and pair.winner == "num_train_epochs":
            continue  # a stream ends with its epochs or after train_iters, whichever comes first
        if not all(_counts(pair, name, both) for name in (pair.winner, pair.loser)):
            continue
        _settle_pair(pair, in_file, on_line, dropped, file)
    notes = [f"--{by} replaces {key} of {file or 'the file'}." for key, by in dropped.items()]
    return set(dropped), notes


def _settle_pair(pair: Rivals, in_file, on_line, dropped: dict[str, str], file: str | None) -> None:
    winner_here, loser_here = pair.winner in on_line, pair.loser in on_line
    if winner_here == loser_here:  # in one place
        if pair.together == "refused":
            raise _refusal(pair, {**in_file, **on_line}, file if not winner_here else None)
    elif loser_here:
        if pair.across == "refused":
            raise _refusal(pair, {**in_file, **on_line}, None)
        if pair.across == "wins":
            dropped[pair.winner] = pair.loser
    elif pair.drops:
        dropped[pair.loser] = pair.winner


def _counts(pair: Rivals, name: str, values: Mapping[str, str]) -> bool:
    test = pair.winning if name == pair.winner else pair.losing
    return name in values and test(values[name])


def _texts(keys: Mapping[str, Any]) -> dict[str, str]:
    """Values as text; a key without one (YAML's null) counts as not given, and an empty list too."""
    found = {}
    for name, value in keys.items():
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if text not in ("", "None", "null"):
            found[name.replace("-", "_")] = text
    return found


def _refusal(pair: Rivals, values: Mapping[str, str], file: str | None) -> UserError:
    dashes = "" if file else "--"
    return UserError(
        f"is {values[pair.loser]}, and {dashes}{pair.winner} {values[pair.winner]} would win over it",
        file=file,
        field=f"{dashes}{pair.loser}",
        remedy="leave one of the two out",
    )
