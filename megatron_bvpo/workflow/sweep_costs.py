"""What a sweep will take, by the arithmetic of `bvpo plan`, and what the shared references save of it. Estimates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.costs import step_costs
from megatron_bvpo.planning.layout import Cluster
from megatron_bvpo.planning.memory import Lengths
from megatron_bvpo.planning.model_shapes import model_shape
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.workflow.data_files import count_of, data_file, listed
from megatron_bvpo.workflow.sweep_file import Run, Sweep
from megatron_bvpo.workflow.sweep_stages import fill_settings, uses_cache


@dataclass(frozen=True)
class RunCosts:
    """Of one run.

    Attributes:
        steps: optimizer steps; None where nobody can say yet.
        epoch: steps in which each row comes once; None likewise.
        hours: (fast, slow) GPU hours of a step with its reference forward.
        policy: the same without it.
    """

    steps: int | None
    epoch: int | None
    hours: tuple[float, float]
    policy: tuple[float, float]

    @property
    def saved(self) -> tuple[float, float]:
        """GPU hours a step."""
        return (self.hours[0] - self.policy[0], self.hours[1] - self.policy[1])


def costs_told(sweep: Sweep) -> list[str]:
    """A line a run and one for all; what cannot be planned is told, too."""
    lines, total, without, unknown = [], [0.0, 0.0], [0.0, 0.0], 0
    fills: dict[str, tuple[float, float]] = {}
    for run in sweep.runs:
        try:
            costs = run_costs(sweep, run)
        except UserError as error:
            lines.append(f"{run.name}: not planned: {error}")
            unknown += 1
            continue
        cached = uses_cache(sweep, run)
        a_step = costs.policy if cached else costs.hours
        if costs.steps is None:
            lines.append(
                f"{run.name}: {_range([100 * h for h in a_step])} GPU hours for 100 steps; how many: not known"
            )
            unknown += 1
            continue
        lines.append(f"{run.name}: {costs.steps} steps, {_range([costs.steps * h for h in a_step])} GPU hours")
        for i in (0, 1):
            total[i] += costs.steps * a_step[i]
            without[i] += costs.steps * costs.hours[i]
        if cached and costs.epoch is not None:
            fills[str(sorted(fill_settings(run).items(), key=str))] = tuple(costs.epoch * h for h in costs.saved)
    for i in (0, 1):
        total[i] += sum(fill[i] for fill in fills.values())
    rest = f", without {unknown} run(s) that could not be planned" if unknown else ""
    how = f"an estimate by bvpo plan with every sequence at its longest{rest}"
    lines.append(f"together {_range(total)} GPU hours of training, {how}")
    if fills:
        saved = [max(0.0, without[i] - total[i]) for i in (0, 1)]
        lines.append(
            f"the shared references are paid {len(fills)} time(s), which saves {_range(saved)} GPU hours of them"
        )
    return lines


def run_costs(sweep: Sweep, run: Run) -> RunCosts:
    """Raises UserError for a run that cannot work, or that the plan does not know."""
    settings = settings_from(dict(run.settings), file=sweep.file)
    model = run.settings.get("model")
    if not model:
        raise UserError("is missing", file=sweep.file, field="model", remedy="add model: NAME")
    shape, cluster, lengths = model_shape(str(model)), _cluster(sweep), Lengths.of(settings)
    hours = []
    for cache in (None, "known"):
        known = dataclasses.replace(settings, bvpo_ref_cache=cache)
        seconds = step_costs(shape, known, cluster, lengths).seconds
        hours.append(tuple(s * cluster.ranks / 3600 for s in seconds))
    epoch = _epoch(run, settings)
    given = run.settings.get("train_iters")
    epochs = float(run.settings.get("num_train_epochs") or 1)
    steps = int(given) if given else None if epoch is None else math.ceil(epoch * epochs)
    return RunCosts(steps, epoch, *hours)


def _cluster(sweep: Sweep) -> Cluster:
    slurm = sweep.place.slurm
    if slurm is None:
        return Cluster(1, sweep.ranks)
    gpus = slurm.get("gpus_per_node") or 8
    return Cluster(int(slurm.get("nodes") or 1), int(str(gpus).rpartition(":")[2]))


def _epoch(run: Run, settings: RunSettings) -> int | None:
    """Steps of one epoch, each row at its longest: as many rows a pack as then fit."""
    rows = 0
    for entry in listed(run.settings.get("dataset")):
        if (count := count_of(entry)) is not None:
            rows += count
        elif (path := data_file(entry)) is not None:
            rows += sum(1 for _ in itertools.islice(read_rows(path), 10_000_000))
        else:
            return None
    held_out = 0 if run.settings.get("val_dataset") else float(run.settings.get("split_dataset_ratio") or 0)
    rows -= int(rows * held_out)
    a_pack = 1
    if settings.packing:
        lengths = Lengths.of(settings)
        longest = sum(
            lengths.empty if s == "empty" else lengths.trace for s in settings.streams for _ in settings.sides(s)
        )
        a_pack = max(1, (settings.packing_length or settings.max_length or 0) // max(1, longest))
    return math.ceil(rows / a_pack / settings.global_batch_size)


def _range(hours) -> str:
    fast, slow = hours
    digits = 0 if slow >= 100 else 1 if slow >= 1 else 3
    return f"{fast:,.{digits}f} to {slow:,.{digits}f}"
