"""Flags of a `bvpo` command as a section of a YAML file: read by the command's own parser before anything starts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.job_file import as_flags


class _Parser(argparse.ArgumentParser):
    """One that raises instead of ending the process."""

    def error(self, message: str):
        raise UserError(message)


def known_flags(add_command: Callable) -> list[str]:
    """The names of a command's flags, without dashes in front."""
    words = (word for action in _parser(add_command)[1]._actions for word in action.option_strings)
    return [word[2:] for word in words if word.startswith("--")]


def check_flags(
    add_command: Callable, command: list[str], own: Iterable[str], section: Mapping[str, Any], chain: str
) -> list[str]:
    """A section's flags as words.

    Args:
        add_command: registers the command.
        command: its name and what a chain gives it beside the section.
        own: flags that the chain gives; they must not be in the section.
        section: flags by name.
        chain: what the chain is called, `rounds` or `sweep`.

    Raises:
        UserError: with `field` the section's key, where one is to blame; no file or line.
    """
    known = set(known_flags(add_command)) - {"help"}
    for key in section:
        if key in own:
            raise UserError(f"is given by the {chain}", field=key, remedy="leave it out")
        if key not in known:
            import difflib

            close = difflib.get_close_matches(key, sorted(known - set(own)), 1)
            remedy = f"write {close[0]}" if close else f"bvpo {command[0]} --help names the flags"
            raise UserError(f"is no flag of bvpo {command[0]}", field=key, remedy=remedy)
    words = as_flags(dict(section))
    try:
        _parser(add_command)[0].parse_args([*command, *words])
    except UserError as error:
        blamed = re.match(r"argument --(\w+)(?:/--\w+)*: (.*)", error.message)
        if blamed is None:
            raise
        raise UserError(blamed[2], field=blamed[1]) from None
    return words


def _parser(add_command: Callable) -> tuple[_Parser, argparse.ArgumentParser]:
    parser = _Parser(prog="bvpo")
    commands = parser.add_subparsers(parser_class=_Parser)
    add_command(commands)
    return parser, next(iter(commands.choices.values()))
