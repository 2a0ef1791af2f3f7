"""The command `bvpo plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import error_output
from megatron_bvpo.launching.flag_names import unknown_keys
from megatron_bvpo.planning.checks import check_run
from megatron_bvpo.planning.costs import step_costs
from megatron_bvpo.planning.layout import Cluster, check_with_neighbours, groups_of
from megatron_bvpo.planning.memory import Lengths, all_stages, host_bytes, longest_trace, micro_batch
from megatron_bvpo.planning.model_shapes import UnplannedModelError, model_shape
from megatron_bvpo.planning.reading import read_settings, read_values
from megatron_bvpo.planning.report import Plan, as_json, as_text
from megatron_bvpo.planning.row_lengths import row_lengths
from megatron_bvpo.planning.sampling_costs import job_from, report, sampling_costs
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.planning.suggest import fewer_recomputed, suggestions
from megatron_bvpo.planning.waiting import predict
from megatron_bvpo.sampling.asking.job_file import is_job_file, read_job

NOT_PLANNED = 3  # exit code: a run of this model may work, and the plan cannot say


def add_command(commands) -> None:
    """Register `plan` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "plan",
        help="memory, layout and time of a run, before any GPU is asked for",
        description="Read a run's YAML file and the model's config.json; print what every pipeline stage needs. "
        "Exit code 0: it fits; 1: it does not; 2: it cannot work at all; 3: the plan does not know the model. "
        "Of a sampling job (configs/sampling_*.yaml) it estimates tokens and hours.",
    )
    parser.add_argument("config", help="a YAML file for `swift rlhf` or launch/sample.sbatch, as in configs/")
    parser.add_argument("--nodes", type=_positive, default=1, help="machines (default 1)")
    parser.add_argument("--gpus", type=_positive, default=8, help="GPUs of each (default 8)")
    parser.add_argument(
        "--gpu-memory", type=_at_least(0, True), default=80.0, metavar="GIB", help="memory of a GPU (default 80)"
    )
    parser.add_argument("--model", help="instead of the file's: a folder with config.json, or a known model's name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the file")
    parser.add_argument("--trace-length", type=_positive, help="longest trace in tokens (default: max_length)")
    parser.add_argument("--empty-length", type=_positive, help="longest empty-trace sequence (default: 1024)")
    parser.add_argument(
        "--imbalance",
        type=_at_least(1),
        default=1.0,
        help="tokens of the busiest expert rank over the mean (default 1)",
    )
    parser.add_argument(
        "--rows", metavar="FILE", help="a data file: how long replicas wait for each other's rows, and packs for them"
    )
    parser.add_argument("--prompts", type=_positive, metavar="N", help="of a sampling job: how many (default: 10000)")
    parser.add_argument("--suggest", action="store_true", help="search the layouts, best first")
    parser.add_argument("--json", action="store_true", help="print numbers for scripts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except UnplannedModelError as error:
        error_output.write(error)
        return NOT_PLANNED


def _run(args: argparse.Namespace) -> int:
    if is_job_file(args.config):
        return _run_sampling(args)
    for line in unknown_keys(read_values(args.config)):
        print(f"megatron-bvpo: warning: {args.config}: {line}", file=sys.stderr)
    cluster = Cluster(args.nodes, args.gpus, args.gpu_memory)
    plan = make_plan(
        args.config,
        cluster,
        model=args.model,
        overrides=_overrides(args.set),
        trace=args.trace_length,
        empty=args.empty_length,
        imbalance=args.imbalance,
        rows=args.rows,
        # A search starts from any layout, one that does not work too.
        lenient=args.suggest,
    )
    table = None
    if args.suggest:
        works = isinstance(plan, Plan)
        settings, shape, lengths = (plan.run, plan.shape, plan.lengths) if works else plan[:3]
        table = suggestions(shape, settings, cluster, lengths, imbalance=args.imbalance)
        if not works:
            plan = _plan_of_first(args.config, table, cluster, shape, lengths, args.imbalance, plan[3])
    print(json.dumps(as_json(plan, table), indent=2) if args.json else as_text(plan, table))
    return 0 if plan.fits else 1


def _run_sampling(args: argparse.Namespace) -> int:
    values, engine = read_job(args.config)
    cluster = Cluster(args.nodes, args.gpus, args.gpu_memory)
    try:
        shape = model_shape(str(args.model or values.get("model") or ""), beside=Path(args.config).parent)
        job = job_from(values, engine, args.prompts, args.trace_length)
        costs = sampling_costs(shape, job, cluster)
    except UserError as e:
        e.file = e.file or args.config
        raise
    if args.json:
        print(json.dumps({"job": dataclasses.asdict(job), "costs": dataclasses.asdict(costs)}, indent=2))
    else:
        print(report(shape, job, costs, cluster))
    return 0 if costs.room is not None else 1


def make_plan(
    config: str,
    cluster: Cluster,
    *,
    model: str | None = None,
    overrides: dict[str, Any] | None = None,
    trace: int | None = None,
    empty: int | None = None,
    imbalance: float = 1.0,
    rows: str | None = None,
    lenient: bool = False,
):
    """The plan of a YAML file.

    Returns:
        A Plan. With `lenient`, for a layout that does not work, (settings, shape, lengths, reason) instead of an error.

    Raises:
        UserError: the file, the model or the layout cannot work.
    """
    settings = read_settings(config, overrides)
    name = model or settings.model
    if not name:
        raise UserError("is missing", file=config, field="model", remedy="add model: NAME, or give --model")
    shape = model_shape(name, beside=Path(config).parent)
    check_run(settings, config)
    if settings.bvpo_new_layers_only and not shape.new_layers:
        raise UserError(
            f"is true, and {name} has no layers that are known to be new",
            file=config,
            field="bvpo_new_layers_only",
            remedy="make the model with bvpo expand, and name its folder",
        )
    lengths = Lengths.of(settings, trace=trace, empty=empty)
    measured = row_lengths(rows, name, settings) if rows else None
    try:
        check_with_neighbours(settings, shape, cluster)
    except UserError as e:
        if lenient and e.field != "max_length":  # another layout does not mend a length
            return settings, shape, lengths, f"{config} as it is cannot work: {e.field}: {e.message}"
        raise UserError(e.message, file=config, field=e.field, remedy=e.remedy) from None
    return _plan(config, cluster, settings, shape, lengths, imbalance, measured)


def _plan(
    config, cluster: Cluster, settings: RunSettings, shape, lengths: Lengths, imbalance: float, rows=None
) -> Plan:
    groups = groups_of(settings, cluster.ranks)
    costs = step_costs(shape, settings, cluster, lengths)
    longest = longest_trace(shape, settings, cluster, lengths, imbalance)
    # What a pack may hold is what a micro-batch of the longest row holds.
    pack = longest if settings.packing else int(micro_batch(settings, Lengths(longest, lengths.empty)).tokens)
    return Plan(
        config=config,
        shape=shape,
        run=settings,
        cluster=cluster,
        groups=groups,
        lengths=lengths,
        imbalance=imbalance,
        stages=all_stages(shape, settings, cluster.ranks, lengths, imbalance),
        costs=costs,
        longest=longest,
        host=host_bytes(shape, settings, cluster.ranks),
        waiting=predict(groups, costs.micro_batches, rows, pack),
        fewer=fewer_recomputed(shape, settings, cluster, lengths, imbalance),
    )


def _plan_of_first(
    config: str, table: list, cluster: Cluster, shape, lengths: Lengths, imbalance: float, reason: str
) -> Plan:
    if not table:
        raise UserError(
            f"no layout of {cluster.ranks} ranks passes the rules with this batch",
            file=config,
            field="global_batch_size",
            remedy=f"use a multiple of micro_batch_size × {cluster.ranks}",
        )
    found = _plan(config, cluster, table[0].run, shape, lengths, imbalance)
    note = f"{reason}. This is the plan with the first suggested layout."
    return dataclasses.replace(found, note=note)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return number


def _at_least(low: float, open_: bool = False):
    """A parser of finite numbers of `low` or more (`open_`: more than it)."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < low or (open_ and number == low):
            raise argparse.ArgumentTypeError(f"{text!r} is no number {'above' if open_ else 'of at least'} {low:g}")
        return number

    return parse


def _overrides(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; raises UserError for anything else, or for a key that the plan does not read."""
    known = {f.name for f in dataclasses.fields(RunSettings)}
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise UserError(
                f"{pair!r} is no KEY=VALUE with a key that decides the plan",
                field="--set",
                remedy="for example --set micro_batch_size=2",
            )
        found[key] = None if value.lower() in ("none", "null") else value
    return found
