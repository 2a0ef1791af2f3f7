"""A run as its user gave it, before ms-swift reads it: flags from YAML and command line, and no secret in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bvpo.errors import UserError, or_bound
from megatron_bvpo.host import argv as flags

# ms-swift prints its command line and all its arguments, and keeps them in args.json.
_SECRET_FLAG = re.compile(r"(?:^|_)(?:token|secret|password|api_key|key_file|access_key)$")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
# Of those, the ones that hold the secret itself; TOKENIZERS_PARALLELISM and a file of credentials do not.
_SECRET_ITSELF = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|(?:ACCESS|SECRET)_?KEY)$", re.IGNORECASE)
_INSTEAD = {"hub_token": "HF_TOKEN or MODELSCOPE_API_TOKEN", "swanlab_token": "SWANLAB_API_KEY"}


@dataclass(frozen=True)
class RunFile:
    """A run as it was given.

    Attributes:
        argv: as given: a YAML file first, or flags only.
        flags: YAML and flags in one list, as ms-swift unrolls them; the last of two equal flags wins.
        env: the YAML's ENV block.
        file: the YAML file, if there is one.
    """

    argv: tuple[str, ...]
    flags: tuple[str, ...]
    env: dict[str, str]
    file: str | None

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
    """The run of `train.sh CONFIG.yaml --flag …`; raises UserError for a file that is not to be read."""
    if not argv:
        raise UserError("no run given", remedy="give a YAML file, or flags: launch/train.sh configs/FILE.yaml")
    file = argv[0] if argv[0].endswith((".yaml", ".yml", ".json")) else None
    if file is None:
        if not argv[0].startswith("--"):
            raise UserError(f"{argv[0]!r} is neither a .yaml file nor a flag", remedy="flags come after the YAML file")
        return RunFile(tuple(argv), tuple(argv), {}, None)
    settings = _read_settings(file)
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
    return RunFile(tuple(argv), (*unrolled, *argv[1:]), {k: str(v) for k, v in env.items()}, file)


def _read_settings(file: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        remedy = f"check the path, and that it is mounted here{or_bound()}"
        raise UserError(f"cannot be read: {e.strerror}", file=file, remedy=remedy) from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        # Not the text of the error: it quotes the line, and the line may hold a secret.
        raise UserError(
            f"is no valid YAML ({getattr(e, 'problem', None) or 'not UTF-8'})",
            file=file,
            line=None if mark is None else mark.line + 1,
            remedy="a value with a colon, a # or a leading @ needs quotes",
        ) from None
    if not isinstance(settings, dict):
        raise UserError("holds no settings", file=file, remedy="write one `flag: value` a line")
    return settings


def refuse_secrets(run: RunFile, environment: dict[str, str]) -> None:
    """Raise UserError where a secret would be printed; the message names the flag and never the value."""
    for token in run.flags:
        name = token.split("=", 1)[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and _SECRET_FLAG.search(name) and run.value(name) not in (None, "", "None"):
            raise UserError(
                "a secret in a flag or YAML file is printed in every rank's log and kept in args.json",
                file=run.file,
                field=name,
                remedy=f"take it out and set {_INSTEAD.get(name, 'it')} in the environment of the job",
            )
    for name, value in run.env.items():
        if _SECRET_ITSELF.search(name) and value not in ("", "None"):
            raise UserError(
                "a secret in the run's file can be read by all who may read the file, and is copied with it",
                file=run.file,
                field=f"ENV.{name}",
                remedy=f"take it out and set {name} in the environment of the job",
            )
        if _SECRET_NAME.search(name) and environment.get(name, value) != value:
            raise UserError(
                "set in the environment and, to something else, in ENV; ms-swift would print both",
                file=run.file,
                field=f"ENV.{name}",
                remedy="keep one of them, best the one in the environment",
            )
