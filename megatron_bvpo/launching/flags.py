"""Mistakes in flags, told in one line: which flag, and which one was probably meant.

ms-swift's parser answers an unknown flag with a trace per rank, and a wrong choice with the usage of some
five hundred flags per rank. This check parses the same flags first, without building the arguments.
"""

import functools
import re

from transformers import HfArgumentParser

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import argv as argv_reading
from megatron_bvpo.launching.flag_names import meant_by


class _Parser(HfArgumentParser):
    """Raises where argparse would print the usage and exit."""

    def error(self, message: str):
        found = re.match(r"argument (--[\w-]+)[^:]*: (.*)", message, re.DOTALL)
        if found is None:
            raise UserError(message)
        # argparse names a flag by all its spellings, --a_b/--a-b; one is enough.
        raise UserError(found[2], field=found[1])


@functools.cache
def _parser_of(args_class: type) -> _Parser:
    # ms-swift teaches the parser its `dict | str | None` fields with this, and nothing public does.
    from swift.utils.utils import _patch_get_type_hints

    with _patch_get_type_hints():
        # Nothing of ours would know a flag by the first letters of its name.
        return _Parser([args_class], prog="swift rlhf --rlhf_type bvpo", allow_abbrev=False)


def check_flags(args_class: type, argv: list[str]) -> None:
    """Raise UserError for flags that a parser of `args_class` refuses or does not know.

    Prints the help and exits where `argv` asks for it. Unknown flags pass under --ignore_args_error true, as
    in ms-swift.
    """
    parser = _parser_of(args_class)
    _, unknown = parser.parse_known_args(argv)
    if not unknown or argv_reading.is_true(argv, "ignore_args_error"):
        return
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    names = [token.partition("=")[0] for token in unknown if token.startswith("--")]
    if not names:
        raise UserError(f"{' '.join(unknown)!r} belongs to no flag.", remedy="Flags start with two dashes.")
    raise UserError("; ".join(_explain(name, known) for name in names))


def _explain(name: str, known: list[str]) -> str:
    """One unknown flag in words, with the one that was probably meant."""
    plain = name[2:].replace("-", "_")
    return f"{name}: no such flag" + meant_by(plain, [option[2:] for option in known if "-" not in option[2:]])
