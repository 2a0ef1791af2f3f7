"""The stages of a sweep, each a command that goes on where it was, and in folders of its own.

OUT/references/                  the shared cache of reference log-probs
OUT/data-cache/                  the rows as they are read and encoded, likewise
OUT/fills/<rows>-<digest>/       the run that filled the cache; its file lies beside it
OUT/runs/<name>.yaml             a run's file
OUT/runs/<name>/                 its checkpoints and log
               /model/           what an engine loads
               /eval/            what it scores
OUT/runs/base/eval/              what the base model scores
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation.evaluation_run import ANSWERS
from megatron_bvpo.launching.adapter_folders import CONFIG, max_rank
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.sampling.asking.job_file import ENGINE, as_flags
from megatron_bvpo.workflow.data_files import count_of, data_file, listed
from megatron_bvpo.workflow.stage_kinds import CHECKPOINT, asking, served, training, yaml_text
from megatron_bvpo.workflow.stages import Stage
from megatron_bvpo.workflow.sweep_file import BASE, Evaluation, Run, Sweep
from megatron_bvpo.workflow.yaml_lines import key_lines

# Keys that no reference log-prob depends on, so that runs that differ in them alone share one fill. A key that is
# missing here costs a second fill, which finds most pairs known; one too many would cost misses.
FREE = re.compile(
    r"lr|lr_\w+|min_lr|beta|loss_type|label_smoothing|rpo_alpha|f_divergence_type|optimizer|adam_\w+|muon_\w+|sgd_momentum"
    r"|weight_decay\w*|(start|end)_weight_decay|clip_grad"
    r"|bvpo_(simpo_gamma|alpha_prior|criterion|kappa|probe_interval|moment_decay|empty_beta|short_beta|expert_loss|mu_\w+)"
    r"|bvpo_eval_on_start|train_iters|num_train_epochs|save_\w+|eval_steps|eval_iters|logging_steps|report_to"
    r"|metric_for_best_model|greater_is_better|early_stop_interval|merge_lora|dist_ckpt_optim_fully_reshardable"
    r"|(wandb|swanlab)_\w+"
)
# Of the policy; a reference adapter is given the run's own.
FREE_OF_LORA = re.compile(r"lora_\w+|use_rslora|target_modules|target_regex|modules_to_save")
# With one of these a run is LoRA, whatever tuner_type says.
ADAPTERS = ("adapters", "ref_adapters", "mcore_adapter", "mcore_ref_adapter")
# What decides whether a run has a reference at all.
OF_THE_LOSS = ("rlhf_type", "loss_type", "reference_free", "bvpo_streams", "bvpo_weights", "bvpo_alpha")


def stages_of(sweep: Sweep) -> list[Stage]:
    """All stages, in order.

    Raises:
        UserError: a stage is to be submitted, and there is no script for it; a rank that no engine serves.
    """
    stages: dict[str, Stage] = {}
    evaluation = sweep.evaluation
    if evaluation and evaluation.base:
        stage = _asked(sweep, evaluation, BASE, sweep.common, ())
        stages[stage.name] = stage
    for run in sweep.runs:
        fill = _fill(sweep, run)
        if fill:
            stages[fill.name] = fill
        train = _training(sweep, run, fill)
        stages[train.name] = train
        if evaluation:
            export = _export(sweep, evaluation, run)
            stages[export.name] = export
            stage = _asked(sweep, evaluation, run.name, run.settings, (export.name,))
            stages[stage.name] = stage
    return list(stages.values())


def uses_cache(sweep: Sweep, run: Run) -> bool:
    """Whether the run has reference log-probs of pairs."""
    given = {key: value for key, value in run.settings.items() if key in OF_THE_LOSS}
    settings = settings_from({"max_length": 1, **given}, file=sweep.file)
    return sweep.references is not None and settings.uses_reference and not settings.unpaired


def fill_settings(run: Run) -> dict[str, Any]:
    """What a fill's run file has of a run's: all that the reference's log-probs may depend on."""
    kept = {}
    own_adapter = any(run.settings.get(key) for key in ("ref_adapters", "mcore_ref_adapter"))
    for key, value in run.settings.items():
        free = FREE.fullmatch(key) or (not own_adapter and FREE_OF_LORA.fullmatch(key))
        free = free or (key == "bvpo_alpha" and _measured(value)) or (key in ("seed", "data_seed") and not _drawn(run))
        if not free:
            kept[key] = value
    return kept


def require_models(sweep: Sweep) -> None:
    """Raise UserError where an engine is to be started on a model whose folder is not on this machine."""
    models = [run.settings.get("model") for run in sweep.runs] if sweep.evaluation else []
    for model in models:
        if not Path(str(model)).is_dir():
            remedy = "name the folder where it lies: engines, tokenizer and exports read it"
            raise UserError(f"there is no folder {model}", file=sweep.file, field="train.model", remedy=remedy)


def run_folder(sweep: Sweep, name: str) -> Path:
    return sweep.out / "runs" / name


def _measured(alpha: Any) -> bool:
    """At 0 or 1 the other stream is not run, and its rows need not be there."""
    try:
        return 0 < float(alpha) < 1
    except ValueError:
        return True


def _drawn(run: Run) -> bool:
    """Whether the seed decides which rows there are: `file#100` is a draw. What it splits off (split_dataset_ratio) is
    filled, too."""
    entries = (entry for key in ("dataset", "val_dataset") for entry in listed(run.settings.get(key)))
    return any(count_of(entry) is not None for entry in entries)


def _shared(sweep: Sweep) -> dict[str, str]:
    return {"BVPO_DATA_CACHE": str(sweep.out / "data-cache")}


def _fill(sweep: Sweep, run: Run) -> Stage | None:
    """The stage that writes the reference log-probs of the run's rows; none for a stream, which has no end."""
    settings = fill_settings(run)
    if not uses_cache(sweep, run) or str(settings.get("streaming", "")).lower() == "true":
        return None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = f"{run.rows}-{digest}" if run.rows else digest
    folder = sweep.out / "fills" / name
    # One epoch, whatever the runs train: each row once.
    settings |= {"num_train_epochs": 1, "bvpo_ref_cache": str(sweep.references), "bvpo_refs_only": True}
    return _run_of(sweep, f"refs/{name}", folder, settings, ())


def _training(sweep: Sweep, run: Run, fill: Stage | None) -> Stage:
    settings = dict(run.settings)
    if uses_cache(sweep, run):
        settings["bvpo_ref_cache"] = str(sweep.references)
    return _run_of(sweep, f"train/{run.name}", run_folder(sweep, run.name), settings, (fill.name,) if fill else ())


def _run_of(sweep: Sweep, name: str, folder: Path, settings: dict[str, Any], after: tuple[str, ...]) -> Stage:
    env = {"BVPO_RUN_DIR": str(folder), **_shared(sweep)}
    settings |= {"output_dir": str(folder)}
    # Beside the folder: ms-swift copies it there.
    file = folder.with_name(f"{folder.name}.yaml")
    stage = training(name, file, settings, after, sweep.place, sweep.ranks, env)
    return dataclasses.replace(stage, reads=_data_files(settings))


def _data_files(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """A run whose rows have changed is another run."""
    entries = [entry for key in ("dataset", "val_dataset") for entry in listed(settings.get(key))]
    return tuple(dict.fromkeys(os.path.abspath(path) for entry in entries if (path := data_file(entry))))


def _form(evaluation: Evaluation, settings: Mapping[str, Any]) -> str:
    """What an export is: `model` of full tuning, the default, and of layers that were trained whole beside an adapter;
    `merged` where asked for, and of a router, which no engine serves as an adapter; else `adapter`."""
    if str(settings.get("bvpo_new_layers_only")).lower() == "true":
        return "model"
    if settings.get("tuner_type", "full") == "full" and not any(settings.get(key) for key in ADAPTERS):
        return "model"
    return "merged" if evaluation.merge or "all-router" in listed(settings.get("target_modules")) else "adapter"


def _rank(settings: Mapping[str, Any]) -> int:
    """Of the adapter that comes out: that of --adapters, where it begins with one."""
    for folder in listed(settings.get("adapters")):
        try:
            return int(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["r"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of a hub, or none, which the run refuses
    return int(settings.get("lora_rank", 8))


def _export(sweep: Sweep, evaluation: Evaluation, run: Run) -> Stage:
    folder = run_folder(sweep, run.name)
    command = ["bvpo", "export", str(folder / CHECKPOINT), "--out", str(folder / "model")]
    command += ["--merge"] if _form(evaluation, run.settings) == "merged" else []
    return Stage(f"export/{run.name}", tuple(command), (f"train/{run.name}",), whole=str(folder / "model"))


def _asked(sweep: Sweep, evaluation: Evaluation, name: str, settings: Mapping[str, Any], after) -> Stage:
    """The evaluation of a run, or of the base model, which comes after nothing."""
    folder, base = run_folder(sweep, name), settings.get("model")
    if not base:
        raise UserError("is missing", file=sweep.file, field="train.model", remedy="an engine needs a model: add it")
    model = str(folder / "model") if after else None
    rank = None
    if after and _form(evaluation, settings) == "adapter":
        try:
            rank = max_rank(_rank(settings))
        except UserError as error:
            lines = key_lines(sweep.file)
            raise UserError(
                f"{name}: {error.message}",
                file=sweep.file,
                line=lines.get("evaluate.merge") or lines.get("evaluate"),
                field="evaluate.merge",
                remedy="write `merge: true`",
            ) from None
    flags = {"model": name, "out": str(folder / "eval"), **evaluation.flags}
    if not flags.get("thinking_switch"):  # the model's own template says how thinking is turned off
        flags.setdefault("tokenizer", str(base))
    suite, file = str(evaluation.flags.get("suite")), folder / "evaluate.yaml"
    return asking(
        f"eval/{name}",
        [str(file), *served(name, str(base), model, rank), "--", "bvpo", "eval", *as_flags(flags)],
        after,
        evaluation.place,
        sweep.ranks,
        files={str(file): yaml_text({"model": str(base), ENGINE: dict(evaluation.engine)})},
        reads=(suite,) if Path(suite).is_file() else (),
        kept=str(folder / "eval" / ANSWERS),
    )
