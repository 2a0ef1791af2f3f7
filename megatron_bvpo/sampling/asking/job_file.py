"""A sampling job as a YAML file, such as configs/sampling_*.yaml: flags of `bvpo sample`, and the engine of each node.

    model: Qwen/…                # flags of `bvpo sample`, by their names; `prompts` are its PROMPTS
    prompts: prompts.jsonl
    out: samples/…
    samples: 8
    engine:                      # flags of `vllm serve`, for launch/sample.sbatch
      tensor_parallel_size: 8

`bvpo sample FILE.yaml --flag …` reads the first part: what stands on the command line wins. `engine` is read by
launch/sample.sbatch, through `python -m megatron_bvpo.sampling.asking.job_file engine FILE.yaml PORT`.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import EXIT_CODE, UserError
from megatron_bvpo.launching.run_file import read_keys

ENGINE, PROMPTS = "engine", "prompts"
SUFFIXES = (".yaml", ".yml")
# sample.sbatch gives them, a job's own for each node.
OWN_OF_THE_JOB = ("host", "port", "api_key", "model")


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
    return [*prompts, *_flags(values), *given]


def engine_command(file: str, port: int, model: str | None = None) -> list[str]:
    """`vllm serve …` of a job file, listening on `port` of every address.

    Raises:
        UserError: the file names no model.
    """
    values, engine = read_job(file)
    model = model or values.get("model")
    if not model:
        raise UserError("is missing", file=file, field="model", remedy="add `model: NAME`, or give --model")
    flags = _flags({key.replace("_", "-"): value for key, value in engine.items()})
    return ["vllm", "serve", str(model), "--host", "0.0.0.0", "--port", str(port), *flags]


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _flags(values: dict[str, Any]) -> list[str]:
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


def job_value(file: str, name: str, given: list[str]) -> str:
    """A flag's value: the last on the command line, else the file's, else ''."""
    values, _ = read_job(file)
    found = values.get(name)
    for i, word in enumerate(given):
        if word == f"--{name}" and i + 1 < len(given):
            found = given[i + 1]
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return "" if found is None else str(found)


def main(arguments: list[str]) -> int:
    """`engine FILE PORT [--flag …]`: the engine's words, each ended by NUL; `value NAME FILE [--flag …]`: a flag."""
    try:
        if arguments[0] == "engine":
            file, port, *given = arguments[1:]
            command = engine_command(file, int(port), job_value(file, "model", given) or None)
            sys.stdout.write("".join(f"{word}\0" for word in command))
        else:
            name, file, *given = arguments[1:]
            print(job_value(file, name, given))
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
