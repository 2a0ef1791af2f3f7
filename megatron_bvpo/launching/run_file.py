"""A run as its user gave it, before ms-swift reads it: flags from YAML and command line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError, or_bound
from megatron_bvpo.launching import argv as flags
from megatron_bvpo.launching.rivals import settle


@dataclass(frozen=True)
class RunFile:
    """A run as it was given.

    Attributes:
        argv: as given: a YAML file first, or flags only.
        flags: YAML and flags in one list, as ms-swift unrolls them; the last of two equal flags wins. A key of the
            file that loses to a rival on the command line is not in it (rivals.py).
        env: the YAML's ENV block.
        file: the YAML file, if there is one.
        notes: a line for each such key.
    """

    argv: tuple[str, ...]
    flags: tuple[str, ...]
    env: dict[str, str]
    file: str | None
    notes: tuple[str, ...] = ()

    def value(self, name: str) -> str | None:
        values = flags.option_values(list(self.flags), name)
        return values[-1] if values else None

    def values(self, name: str) -> list[str]:
        return flags.option_list(list(self.flags), name)

    def is_given(self, name: str) -> bool:
        return bool(flags.option_values(list(self.flags), name))

    @property
    def title(self) -> str:
        return Path(self.file).stem if self.file else "run"


def read_run(argv: list[str]) -> RunFile:
    """The run of `train.sh CONFIG.yaml --flag …`; raises UserError for a file that is not to be read, or for rivals in
    one place (rivals.py)."""
    if not argv:
        raise UserError("no run given", remedy="give a YAML file, or flags: launch/train.sh configs/FILE.yaml")
    file = argv[0] if argv[0].endswith((".yaml", ".yml", ".json")) else None
    if file is None:
        if not argv[0].startswith("-"):
            raise UserError(f"{argv[0]!r} is neither a .yaml file nor a flag", remedy="flags come after the YAML file")
        return _settled(argv, [], argv, {}, None)
    settings = read_keys(file)
    env = settings.pop("ENV", None) or {}
    if not isinstance(env, dict):
        raise UserError("is no mapping", file=file, field="ENV", remedy="write one `NAME: value` a line, indented")
    unrolled: list[str] = []
    for key, value in settings.items():
        unrolled.append(f"--{key}")
        if isinstance(value, list):
            unrolled += [str(item) for item in value]
        else:
            unrolled.append(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))
    return _settled(argv, unrolled, argv[1:], {str(k): str(v) for k, v in env.items()}, file)


def _settled(argv: list[str], unrolled: list[str], given: list[str], env: dict[str, str], file: str | None) -> RunFile:
    """The run of a file's flags and of those behind it; of another method's run, ms-swift decides what wins."""
    notes: list[str] = []
    if flags.rlhf_type([*unrolled, *given]) in (None, "bvpo"):
        dropped, notes = settle(flags.all_values(unrolled), flags.all_values(given), file)
        unrolled = flags.without(unrolled, dropped)
    return RunFile(tuple(argv), (*unrolled, *given), env, file, tuple(notes))


def read_keys(file: str) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file; raises UserError, which quotes nothing of the file."""
    import yaml  # flags alone do not need it

    try:
        text = Path(file).read_text(encoding="utf-8")
        # As ms-swift reads them: tabs may indent JSON, and YAML has none.
        settings = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except OSError as e:
        remedy = f"check the path, and that it is mounted here{or_bound()}"
        raise UserError(f"cannot be read: {e.strerror}", file=file, remedy=remedy) from None
    except json.JSONDecodeError as e:
        remedy = "JSON has no comments and no comma after the last entry"
        raise UserError(f"is no valid JSON ({e.msg})", file=file, line=e.lineno, remedy=remedy) from None
    except UnicodeDecodeError:
        raise UserError("is no text", file=file, remedy="name a YAML file such as those in configs/") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        # Neither the text of the error nor what it quotes of the line, which may hold a secret.
        problem = re.sub(r"""(['"])(?!<).{2,}\1""", "…", getattr(e, "problem", None) or "unreadable")
        raise UserError(
            f"is no valid YAML ({problem})",
            file=file,
            line=None if mark is None else mark.line + 1,
            remedy="a value with a colon, a # or a leading @, ! or * needs quotes",
        ) from None
    if not isinstance(settings, dict):
        raise UserError("holds no settings", file=file, remedy="write one `flag: value` a line")
    return settings
