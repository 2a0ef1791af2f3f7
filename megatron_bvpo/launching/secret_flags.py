"""Secrets in a run's flags and file, refused before anything prints them.

ms-swift prints its command line and all its arguments in every rank's log, keeps them in args.json, and warns of a
variable that is set twice with both values. What is looked for: flags, environment names and keys of JSON values that
are called like a secret, and addresses with a password. Not a scanner: a secret under another name is not noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import RunFile

_SECRET_FLAG = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|api_?key|key_file|(?:access|secret)_?key|webhook(?:_url)?)$"
)
# Tokenizers and what they do are no tokens. A file of credentials is none itself, but set twice both paths are printed.
_SECRET_NAME = re.compile(r"TOKEN(?!I[SZ])|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_ITSELF = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|PAT|KEY|APIKEY|WEBHOOK(?:_URL)?)$", re.IGNORECASE
)
# Not eos_token and its like, which are arguments of models and templates.
_SECRET_IN_JSON = re.compile(
    r"""["'](?:token|\w*(?:hub|hf|auth|access|api)_?token|\w*(?:secret|password|passwd|api_?key|access_?key))["']"""
    r"""\s*:\s*["'][^"']""",
    re.IGNORECASE,
)
_PASSWORD_IN_ADDRESS = re.compile(r"\w://[^/\s:@]*:[^/\s@]+@")
_INSTEAD = {"hub_token": "HF_TOKEN or MODELSCOPE_API_TOKEN", "swanlab_token": "SWANLAB_API_KEY"}
_NOTHING = ("", "None", "null")


def refuse_secrets(run: RunFile, environment: dict[str, str]) -> None:
    """Raise UserError where a secret would be printed; the message names the flag and never the value."""
    for name in _secret_flags(run):
        raise UserError(
            "a secret in a flag or YAML file is printed in every rank's log and kept in args.json",
            file=run.file,
            field=name,
            remedy=f"take it out and set {_INSTEAD.get(name, 'it')} in the environment of the job",
        )
    for name, value in run.env.items():
        if _SECRET_ITSELF.search(name) and value not in _NOTHING:
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


def _secret_flags(run: RunFile) -> Iterator[str]:
    """Names of the flags that hold a secret, as far as names and values tell."""
    name, known = "", flag_names()
    for i, token in enumerate(run.flags):
        value = token
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            name = name.strip().lstrip("-").replace("-", "_")
            if is_secret_flag(name, known):
                # Whatever comes next counts as its value, another flag too: a secret may begin with dashes.
                given = value if equals else "".join(run.flags[i + 1 : i + 2])
                if given not in _NOTHING:
                    yield name
        if _SECRET_IN_JSON.search(value) or _PASSWORD_IN_ADDRESS.search(value):
            yield name


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, or the path of one."""
    return bool(_SECRET_ITSELF.search(name) or _SECRET_NAME.search(name))


def is_secret_flag(name: str, known: list[str]) -> bool:
    """By its name, or as the abbreviation of such a name, which ms-swift's parser takes."""
    if _SECRET_FLAG.search(name):
        return True
    meant = [flag for flag in known if flag.startswith(name)]
    return bool(meant) and all(_SECRET_FLAG.search(flag) for flag in meant)
