"""Gives every flag wrong values, in one process and without a model: `python -m tests.unit.every_flag FOLDER`.

The parser, the checks and ms-swift's own arguments are real. Left out is what follows them: process groups. Prints
{case: what was said} as JSON; cases are `flag=value`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

NOTHING = "/no/such/place"
# Text fields that name files or folders.
PATHS = (
    "adapters cached_dataset cached_val_dataset custom_dataset_info custom_register_path dataset external_plugins "
    "mcore_adapter mcore_model mcore_ref_adapter mcore_ref_model model ref_adapters ref_model tensorboard_dir "
    "val_dataset bvpo_ref_cache output_dir"
).split()


# A secret, refused before this; and a model of GKD's and GRPO's, which ms-swift looks up on the hub.
NOT_ASKED = ("hub_token", "teacher_model")


def wrong_values(hint: object, name: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """What a field of this type can be given by mistake."""
    options = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    kinds = {typing.get_origin(part) or part for part in options} | {typing.get_origin(hint)}
    if name in PATHS:
        # /proc takes no folder, not even of root's
        yield ("/proc/no/such",) if name in ("tensorboard_dir", "bvpo_ref_cache", "output_dir") else (NOTHING,)
        if name not in ("tensorboard_dir", "bvpo_ref_cache", "output_dir"):
            yield (str(folder / "empty"),)
    elif typing.Literal in kinds:
        yield ("nonsense",)
    elif dict in kinds:
        yield from (('{"a":',), ("[1]",), ("nonsense",))
    elif bool in kinds:
        yield ("maybe",)
    elif list in kinds:
        item = typing.get_args(options[0])[0] if typing.get_args(options[0]) else options[0]
        yield ()
        yield from ((value,) for value in ("nonsense", *(("nan", "-1000000.5") if item is float else ())))
    elif int in kinds:
        yield from (("nonsense",), ("1.5",), ("-7",), ("0",))
    elif float in kinds:
        yield from (("nonsense",), ("nan",), ("-1000000.5",), ("inf",))
    else:
        yield ("nonsense",)


def cases(args_class: type, folder: Path) -> dict[str, list[str]]:
    """The flags of each case."""
    from swift.utils.utils import _patch_get_type_hints

    with _patch_get_type_hints():
        hints = typing.get_type_hints(args_class)
    return {
        f"{field.name}={' '.join(values).replace(str(folder), 'FOLDER')}": [f"--{field.name}", *values]
        for field in dataclasses.fields(args_class)
        if field.init and field.name not in NOT_ASKED
        for values in wrong_values(hints[field.name], field.name, folder)
    }


def without_ranks() -> None:
    """No process groups: one rank of one, which talks to nobody."""
    import swift.megatron.arguments.megatron_args as megatron_args
    import swift.megatron.arguments.sft_args as sft_args

    def alone(args) -> None:
        args.rank, args.world_size = 0, 1

    megatron_args.initialize_megatron = alone
    sft_args.init_process_group = lambda **given: None


def said(args_class: type, argv: list[str]) -> str:
    """`accepted`, what the user would be told, or an exception's name that nobody would have caught."""
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching.flags import _parser_of, check_flags

    try:
        check_flags(args_class, argv)
        _parser_of(args_class).parse_args_into_dataclasses(argv)
    except UserError as e:
        return f"told: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "accepted"


def main(folder: Path, base: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    from megatron_bvpo.rehearsal import install

    install()
    import megatron_bvpo.training.pipeline  # noqa: F401  before the other modules of swift.megatron
    from megatron_bvpo.training.arguments import BvpoArguments

    without_ranks()
    (folder / "empty").mkdir()
    found = {}
    base = ["--output_dir", str(folder / "out"), *base]
    for name, flags in {"": [], **cases(BvpoArguments, folder)}.items():
        environment = dict(os.environ)
        found[name] = said(BvpoArguments, [*base, *flags])
        os.environ.clear()
        os.environ.update(environment)
    json.dump(found, answers)
    answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
