"""Reading the few flags that decide where `swift rlhf` goes.

The argument lists are flags only: ms-swift has unrolled its YAML already. An ordinary `swift rlhf` loads this
file too, so it imports nothing that is not loaded anyway.
"""

import os

# The spellings that Hugging Face's argument parser takes for a boolean.
TRUE = {"yes", "true", "t", "y", "1"}
FALSE = {"no", "false", "f", "n", "0"}


def option_values(argv: list[str], name: str) -> list[str]:
    """Every value given for `--name`, as `--name value`, `--name=value` or with dashes for underscores.

    A bare flag counts as an empty string. The parser lets the last one win.
    """
    spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
    values = []
    for i, token in enumerate(argv):
        flag, equals, value = token.partition("=")
        if flag not in spellings:
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value = argv[i + 1]
        values.append(value)
    return values


def option_list(argv: list[str], name: str) -> list[str]:
    """The values of `--name` where it takes several; the parser lets the last `--name` win."""
    spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
    values: list[str] = []
    taking = False
    for token in argv:
        flag, equals, value = token.partition("=")
        if flag in spellings:
            taking, values = not equals, [value] if equals else []
        elif token.startswith("--"):
            taking = False
        elif taking:
            values.append(token)
    return values


def all_values(argv: list[str]) -> dict[str, list[str]]:
    """Every flag's name, with underscores, and the values that the parser will take: the last `--name` wins."""
    found: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            found[name] = [value] if equals else []
        elif name is not None:
            found[name].append(token)
    return found


def without(argv: list[str], names: set[str]) -> list[str]:
    """The arguments without these flags and their values."""
    kept, dropping = [], False
    for token in argv:
        if token.startswith("--"):
            dropping = token.partition("=")[0][2:].replace("-", "_") in names
        if not dropping:
            kept.append(token)
    return kept


def rlhf_type(argv: list[str]) -> str | None:
    """The value of `--rlhf_type` that the parser will use, None where it is not given."""
    values = option_values(argv, "rlhf_type")
    return values[-1] if values else None


def is_true(argv: list[str], name: str) -> bool:
    """Whether the boolean flag `--name` is given and not false."""
    values = option_values(argv, name)
    return bool(values) and values[-1].lower() not in FALSE


def take_megatron(argv: list[str]) -> tuple[bool | None, list[str]]:
    """Take `--megatron` out of the arguments: (its value or None where it is not given, the other arguments).

    ms-swift's parsers do not know the flag: one calls it ambiguous, the other refuses it. A value is taken
    only where it is a boolean, so that `--megatron` before another flag or at the end is true.
    """
    value, rest, i = None, [], 0
    while i < len(argv):
        flag, equals, given = argv[i].partition("=")
        i += 1
        if flag != "--megatron":
            rest.append(argv[i - 1])
            continue
        if not equals and i < len(argv) and argv[i].lower() in TRUE | FALSE:
            equals, given, i = "=", argv[i], i + 1
        value = given.lower() not in FALSE if equals else True
    return value, rest


def wants_help(argv: list[str]) -> bool:
    """Whether the arguments ask for the list of flags."""
    return any(token in ("-h", "--help") for token in argv)


def rehearsal_requested() -> bool:
    """Whether BVPO_REHEARSAL=1 asks for the CPU stand-ins."""
    return os.environ.get("BVPO_REHEARSAL") == "1"
