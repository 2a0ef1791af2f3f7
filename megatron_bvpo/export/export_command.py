"""`bvpo export`: what an engine loads, from a checkpoint; on one machine, without ranks, GPUs or ms-swift."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.new_folder import copy_others, new_folder, require_free, require_room
from megatron_bvpo.launching.new_layers import KEY, forget_new_layers

OUT = "--out"
NOTE = "bvpo_export.json"


def add_command(commands) -> None:
    """Register `export` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "export",
        help="write what an engine loads: an adapter for --lora-modules, or a whole model",
        description="CHECKPOINT is a run's checkpoint-N or last-checkpoint. LoRA becomes an adapter; one server holds "
        "many of them. Full tuning becomes a model, with the base's layers that training dropped (MTP). Exit code 3: "
        "the export is written, and --check found other log-probs than training's.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--merge", action="store_true", help="LoRA: write the merged model instead of the adapter")
    parser.add_argument(
        "--model", metavar="DIR", help="the model that the run was started from (default: what its args.json names)"
    )
    parser.add_argument(
        "--check",
        metavar="ROWS",
        help="compare the log-probs of the first ten rows of a file with those of what was trained, in float32; "
        "takes the model's memory",
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.export import sources

    source = sources.find_source(args.checkpoint)
    model = sources.find_model(source, args.model)
    out = Path(args.out).absolute()
    require_free(out, OUT)
    if args.merge and source.kind == "model":
        raise UserError(
            "this checkpoint is a whole model, and there is nothing to merge", field="--merge", remedy="leave it out"
        )
    sequences = None
    if args.check:
        from megatron_bvpo.export import logprob_check

        model = sources.require_model(source, model, "--check")
        sequences = logprob_check.sequences_of(model, args.check)
    with new_folder(out, OUT) as partial:
        lines = _write(source, model, partial, merge=args.merge)
    named = source.trained_from
    if args.model and named and Path(named).name != model.folder.name:
        lines.append(
            f"note: the run was started from {named}. Of {model.folder}, names and shapes were compared, no more"
        )
    for line in (*lines, f"written: {out}"):
        print(line)
    if sequences is None:
        return 0
    found = logprob_check.check(source, out, model, sequences)
    print("\n".join(found.lines()))
    return 0 if found.agrees else 3


def _write(source, model, out: Path, *, merge: bool) -> list[str]:
    """Fill a new folder; returns what is to be told."""
    write = _write_model if source.kind == "model" else _write_merged if merge else _write_adapter
    form, told, flags = write(source, model, out)
    _write_note(source, model, out, form)
    final = out.with_name(out.name.removeprefix(".").removesuffix(".partial"))
    served = final
    if form == "adapter":
        served = model.folder if model is not None else source.trained_from or "MODEL"
        flags = [*flags, "--lora-modules", f"{final.name}={final}"]
    return [*told, f"serve it: {shlex.join(['vllm', 'serve', str(served), *flags])}"]


def _write_model(source, model, out: Path) -> tuple[str, list[str], list[str]]:
    from megatron_bvpo.export import sources
    from megatron_bvpo.export.tensor_files import ModelFiles
    from megatron_bvpo.export.whole_model import write_whole_model

    base = sources.require_model(source, model, "carrying along what training dropped")
    saved = ModelFiles(source.folder, sources.FIELD)
    require_room(out.parent, saved.bytes(), OUT)
    told = write_whole_model(saved, base, out)
    for folder in (source.folder, base.folder):
        copy_others(folder, out)
    if KEY not in saved.config:
        forget_new_layers(out)
    return "model", told, []


def _write_merged(source, model, out: Path) -> tuple[str, list[str], list[str]]:
    from megatron_bvpo.export import sources
    from megatron_bvpo.export.adapter import Adapter
    from megatron_bvpo.export.merging import merge

    base = sources.require_model(source, model, "a merge")
    adapter = Adapter(source.folder)
    require_room(out.parent, base.bytes(), OUT)
    told = merge(base, adapter, out)
    copy_others(base.folder, out)
    forget_new_layers(out)
    return "merged model", told, []


def _write_adapter(source, model, out: Path) -> tuple[str, list[str], list[str]]:
    from megatron_bvpo.export.adapter import Adapter, updates
    from megatron_bvpo.export.engine_adapter import write_engine_adapter
    from megatron_bvpo.launching.adapter_folders import max_rank

    adapter = Adapter(source.folder)
    rank = max_rank(adapter.rank)
    if model is not None:
        updates(adapter, model.shapes, str(model.folder))
    require_room(out.parent, adapter.file.stat().st_size, OUT)
    told = write_engine_adapter(adapter, out, (source.state.get("model") or {}).get("num_experts"))
    if model is None:
        told.append(f"its model is no folder on this machine ({source.trained_from}): the shapes were not compared")
    return "adapter", told, ["--enable-lora", "--max-lora-rank", str(rank)]


def _write_note(source, model, out: Path, form: str) -> None:
    """Where the export came from."""
    import megatron_bvpo

    note = {
        "form": form,
        "checkpoint": str(source.checkpoint),
        "iteration": source.state.get("iteration"),
        "model": str(model.folder) if model is not None else source.trained_from,
        "megatron_bvpo": megatron_bvpo.__version__,
    }
    (out / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
