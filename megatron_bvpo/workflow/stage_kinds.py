"""The stages that rounds and sweeps share: a training, and a command that asks an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow.sections import Place
from megatron_bvpo.workflow.stages import FREE_PORT, Slurm, Stage

SAMPLE_SCRIPT, TRAIN_SCRIPT = "sample.sbatch", "slurm.sbatch"
CHECKPOINT = "last-checkpoint"


def training(
    name: str,
    file: Path,
    settings: Mapping[str, Any],
    after: tuple[str, ...],
    place: Place,
    ranks: int,
    env: Mapping[str, str] | None = None,
) -> Stage:
    """A run that goes on from its last checkpoint.

    Args:
        file: of the run, which is written with `settings`; they have an output_dir.
        ranks: on this machine.
    """
    more = {"files": {str(file): yaml_text(settings)}, "kept": str(Path(settings["output_dir"]) / CHECKPOINT)}
    if place.slurm is not None:
        slurm = Slurm(script(TRAIN_SCRIPT), place.words)
        return Stage(name, (str(file),), after, env=env or {}, slurm=slurm, **more)
    env = {"NPROC_PER_NODE": str(ranks), "MASTER_PORT": FREE_PORT, **(env or {})}
    return Stage(name, ("bvpo", "supervise", "--", str(file)), after, env=env, cores=ranks, **more)


def asking(name: str, words: list[str], after: tuple[str, ...], place: Place, cores: int, **more) -> Stage:
    """A command with an engine: on the nodes of a job, or here.

    Args:
        words: as sampling/asking/job_file.py takes them.
        cores: what the engine counts as here.
    """
    if place.slurm is not None:
        return Stage(name, tuple(words), after, slurm=Slurm(script(SAMPLE_SCRIPT), place.words), **more)
    here = ("python", "-m", "megatron_bvpo.workflow.serving", *words)
    return Stage(name, here, after, cores=cores, **more)


def served(name: str, base: str, model: str | None = None, adapter_rank: int | None = None) -> list[str]:
    """Flags by which an engine serves a model as `name`.

    Args:
        base: the base model.
        model: what `bvpo export` wrote; None: the base model itself.
        adapter_rank: of the adapter that was written, as an engine is told it; None: a whole model was.
    """
    if model is None or adapter_rank is None:
        return ["--engine.model", model or base, "--engine.served_model_name", name]
    adapter = f"--engine.enable_lora --engine.max_lora_rank {adapter_rank} --engine.lora_modules".split()
    return ["--engine.model", base, *adapter, f"{name}={model}"]


def script(name: str) -> str:
    """launch/NAME of the checkout that this package is in, or of BVPO_ROOT.

    Raises:
        UserError: it is not there.
    """
    root = Path(os.environ.get("BVPO_ROOT") or Path(megatron_bvpo.__file__).parents[1])
    found = root / "launch" / name
    if not found.is_file():
        raise UserError("is not there", file=str(found), field="slurm", remedy="set BVPO_ROOT to a checkout")
    return str(found)


def yaml_text(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
