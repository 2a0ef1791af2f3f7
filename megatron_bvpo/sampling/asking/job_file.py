"""A sampling job as a YAML file, such as configs/sampling_*.yaml: flags of `bvpo sample`, and the engine of each node.

    model: Qwen/…                # flags of `bvpo sample`, by their names; `prompts` are its PROMPTS
    prompts: prompts.jsonl
    out: samples/…
    samples: 8
    engine:                      # flags of `vllm serve`, for launch/sample.sbatch and workflow/serving.py
      tensor_parallel_size: 8

`bvpo sample FILE.yaml --flag …` reads the first part: what stands on the command line wins. `engine` is read by what
starts an engine for the time of one command, whose words `read_line` takes apart:

    FILE.yaml [--engine.KEY VALUE …] [--flag value …]             # bvpo sample FILE.yaml --flag value …
    FILE.yaml [--engine.KEY VALUE …] -- bvpo eval --flag value …  # another command than the file's own

`--engine.KEY` wins over the file's; `--engine.model` is what the engine loads where the command asks for it by another
name (an adapter's, or `--engine.served_model_name`).
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.errors import EXIT_CODE, UserError
from megatron_bvpo.launching.run_file import read_keys

ENGINE, PROMPTS = "engine", "prompts"
SUFFIXES = (".yaml", ".yml")
# Given by what starts the engine, a job's own for each node.
OWN_OF_THE_JOB = ("host", "port", "api_key", "model")
# Of the command that asks it, likewise.
OWN_OF_THE_CLIENT = ("server", "api_key_file")
CLIENTS = ("sample", "eval")


class JobLine(NamedTuple):
    """What `FILE.yaml …` asks for.

    Attributes:
        file: the YAML file.
        engine: flags of the engine, the file's and those of the command line over them.
        model: what the engine loads.
        client: words behind `bvpo`, without --server.
        out: its folder.
    """

    file: str
    engine: dict[str, Any]
    model: str
    client: list[str]
    out: str

    @property
    def name(self) -> str:
        """By which the engine's model is asked for."""
        return str(self.engine.get("served_model_name") or self.model)


def read_job(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flags of `bvpo sample`, flags of the engine), dashes in names as underscores.

    Raises:
        UserError: no YAML mapping, or an `engine` that is none.
    """
    values = {str(key).replace("-", "_"): value for key, value in read_keys(file).items()}
    engine = values.pop(ENGINE, None) or {}
    if not isinstance(engine, dict):
        raise UserError("is no mapping", file=file, field=ENGINE, remedy="write `flag: value` a line, indented")
    engine = {str(key).replace("-", "_"): value for key, value in engine.items()}
    for key in OWN_OF_THE_JOB:
        if key in engine:
            remedy = "write `model: NAME` outside of engine" if key == "model" else "leave it out"
            raise UserError("is set by launch/sample.sbatch", file=file, field=f"{ENGINE}.{key}", remedy=remedy)
    return values, engine


def read_line(arguments: list[str]) -> JobLine:
    """Take `FILE.yaml …` apart (at the top of this file).

    Raises:
        UserError: the file is wrong, no model, no folder, or a command that asks no engine.
    """
    if not arguments or not arguments[0].endswith(SUFFIXES):
        raise UserError("no job file given", remedy="give FILE.yaml first, with an `engine` section, as in configs/")
    file, given = arguments[0], arguments[1:]
    values, engine = read_job(file)
    mark = given.index("--") if "--" in given else None
    given_engine, flags = _engine_flags(given[:mark])
    if mark is None:
        client, own = ["sample", file, *flags], values
    else:
        client, own = _other_command(given[mark + 1 :], flags), {}
    for key in OWN_OF_THE_CLIENT:
        if key in own or _value(key, client):
            where = {"file": file, "field": key} if key in own else {"field": f"--{key}"}
            raise UserError("is set by what starts the engine", **where, remedy="leave it out")
    # Another command may ask for the model by another name than the file's.
    asked, named = _value("model", client), values.get("model")
    model = given_engine.pop("model", None) or (asked or named if mark is None else named or asked)
    if not model:
        raise UserError("is missing", file=file, field="model", remedy="add `model: NAME`, or give --model")
    for key in given_engine.keys() & set(OWN_OF_THE_JOB):
        raise UserError("is set by what starts the engine", field=f"--{ENGINE}.{key}", remedy="leave it out")
    out = _value("out", client) or own.get("out")
    if not out:
        remedy = f"add `out: FOLDER` to {file}, or --out FOLDER" if mark is None else "add --out FOLDER"
        raise UserError("no folder for the answers", field="--out", remedy=remedy)
    return JobLine(file, {**engine, **given_engine}, str(model), client, str(out))


def _other_command(words: list[str], in_front: list[str]) -> list[str]:
    """What stands behind --, without `bvpo`."""
    if in_front:
        raise UserError("stands in front of --", field=in_front[0], remedy="write it behind the command's name")
    client = words[1:] if words[:1] == ["bvpo"] else words
    if not client or client[0] not in CLIENTS:
        raise UserError(f"expected bvpo sample or bvpo eval behind --, found {' '.join(words[:2]) or 'nothing'}")
    return client


def _engine_flags(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(`--engine.KEY VALUE …` by key, the words that are none of these)."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    into: list[str] = rest
    for word in words:
        if word.startswith(f"--{ENGINE}."):
            key, equals, value = word.removeprefix(f"--{ENGINE}.").partition("=")
            into = found[key.replace("-", "_")] = [value] if equals else []
        elif word.startswith("--"):
            into = rest
            rest.append(word)
        else:
            into.append(word)
    return {key: (value if value[1:] else value[0]) if value else True for key, value in found.items()}, rest


def unroll(arguments: list[str], known: Iterable[str]) -> list[str]:
    """`FILE.yaml --flag …` as flags; other arguments come back as they are.

    Args:
        arguments: what follows `bvpo sample`.
        known: the names of its flags, without dashes.

    Raises:
        UserError: a key that is no flag, with the one that was probably meant.
    """
    if not arguments or not arguments[0].endswith(SUFFIXES):
        return arguments
    file, given = arguments[0], arguments[1:]
    values, _ = read_job(file)
    known = set(known) - {PROMPTS}
    for key in values:
        if key not in known | {PROMPTS}:
            import difflib

            close = difflib.get_close_matches(key, sorted(known | {PROMPTS}), 1)
            remedy = f"write {close[0]}" if close else "bvpo sample --help names the flags"
            raise UserError("is no flag of bvpo sample", file=file, field=key, remedy=remedy)
    prompts = _words(values.pop(PROMPTS, None))
    # argparse's flags that take several words would swallow prompts that come behind them, so the prompts come first;
    # those of the command line take their place.
    own = next((i for i, word in enumerate(given) if word.startswith("--")), len(given))
    prompts, given = (given[:own] or prompts), given[own:]
    if not prompts and not {"-h", "--help"} & set(given):
        raise UserError(
            "is missing", file=file, field=PROMPTS, remedy="add `prompts: FILE`, or give the file behind this one"
        )
    return [*prompts, *as_flags(values), *given]


def engine_command(line: JobLine, port: int, *, host: str = "0.0.0.0", program: str = "vllm") -> list[str]:
    """`vllm serve …` of a job, listening on `port` of `host`."""
    flags = as_flags({key.replace("_", "-"): value for key, value in line.engine.items()})
    return [program, "serve", line.model, "--host", host, "--port", str(port), *flags]


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def as_flags(values: dict[str, Any]) -> list[str]:
    """Flags as argparse reads them: true is the bare flag, false and null leave it out, a mapping is JSON."""
    words: list[str] = []
    for key, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{key}")
        if isinstance(value, dict):
            import json

            words.append(json.dumps(value))
        elif value is not True:
            words += _words(value)
    return words


def _value(name: str, words: list[str]) -> str:
    """A flag's value, the last on a command line; else ''."""
    found = ""
    for i, word in enumerate(words):
        if word == f"--{name}" and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def main(arguments: list[str]) -> int:
    """For launch/sample.sbatch. `engine PORT FILE …`: the engine's words, each ended by NUL; `client FILE …`: those of
    the command that asks it; `out FILE …`, `model FILE …`, `name FILE …`: its folder, what the engine loads, its name.
    """
    try:
        wanted, *given = arguments
        port = given.pop(0) if wanted == "engine" else "0"
        line = read_line(given)
        if wanted in ("out", "model", "name"):
            print(getattr(line, wanted))
        else:
            words = engine_command(line, int(port)) if wanted == "engine" else line.client
            sys.stdout.write("".join(f"{word}\0" for word in words))
    except UserError as error:
        print(f"megatron-bvpo: error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def is_job_file(file: str | Path) -> bool:
    """Whether a YAML file is a sampling job rather than a training run: it has an `engine`, or `modes`."""
    values = read_keys(str(file))
    return ENGINE in values or "modes" in values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
