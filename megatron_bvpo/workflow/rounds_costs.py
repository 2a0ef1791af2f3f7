"""GPU hours of rounds by the formulas of `bvpo plan`: estimates, from assumed shares of a GPU's peaks and lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.costs import step_costs
from megatron_bvpo.planning.layout import Cluster, check_with_neighbours
from megatron_bvpo.planning.memory import Lengths
from megatron_bvpo.planning.model_shapes import ModelShape, model_shape
from megatron_bvpo.planning.sampling_costs import job_from, sampling_costs
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.workflow.rounds_file import Asking, Place, Rounds

NODE_GPUS, MEMORY = 8, 80.0  # of a submitted stage whose file does not say; GiB of an H100
ANSWERS = 1000  # of an evaluation whose questions nobody has counted


@dataclass(frozen=True)
class Estimate:
    """Of one stage.

    Attributes:
        gpus: that it holds.
        hours: (fast, slow).
        of: what was counted.
    """

    gpus: int
    hours: tuple[float, float]
    of: str

    @property
    def gpu_hours(self) -> tuple[float, float]:
        return self.hours[0] * self.gpus, self.hours[1] * self.gpus

    def line(self, title: str) -> str:
        hours, gpu_hours = (f"{low:,.1f} to {high:,.1f}" for low, high in (self.hours, self.gpu_hours))
        return f"  {title}: {hours} hours on {self.gpus} GPUs, {gpu_hours} GPU hours ({self.of})"


def estimates(rounds: Rounds) -> list[str]:
    """Lines for a person; a stage that the plan does not know is named with the reason."""
    lines = ["An estimate, by bvpo plan's formulas and assumptions (docs/plan.md); nobody has measured it:"]
    whole = [0.0, 0.0]
    for title, times, estimate in (
        ("sampling, a round", rounds.rounds, sampling_of_round),
        ("training, a round", rounds.rounds, training_of_round),
        ("evaluation, a model", rounds.rounds + 1, evaluation_of_model),
    ):
        try:
            found = estimate(rounds)
        except UserError as error:
            lines.append(f"  {title}: none ({error})")
            continue
        if found is None:
            continue
        lines.append(found.line(title))
        if not found.of.startswith("each"):
            whole = [sum_ + times * hours for sum_, hours in zip(whole, found.gpu_hours, strict=True)]
    return [*lines, f"  {rounds.rounds} rounds, what was counted: {whole[0]:,.0f} to {whole[1]:,.0f} GPU hours"]


def sampling_of_round(rounds: Rounds) -> Estimate:
    """Of a round's prompts, all of their samples."""
    prompts = _prompts(rounds)
    return _asking(rounds, rounds.sample, dict(rounds.sample.settings), prompts, f"{prompts:,} prompts")


def evaluation_of_model(rounds: Rounds) -> Estimate | None:
    """Of a suite's questions where they are local files, else of a thousand answers in each mode."""
    if rounds.evaluate is None:
        return None
    settings = dict(rounds.evaluate.settings)
    questions, repeats = _questions(str(settings["suite"])), int(settings.get("repeats") or 1)
    values = {key: settings[key] for key in ("modes", "max_tokens", "concurrency") if key in settings}
    if questions is None:
        return _asking(rounds, rounds.evaluate, {**values, "samples": 1}, ANSWERS, f"each {ANSWERS:,} answers a mode")
    questions = min(questions, int(settings.get("limit") or questions))
    told = f"{questions:,} questions × {repeats}"
    return _asking(rounds, rounds.evaluate, {**values, "samples": repeats}, questions, told)


def training_of_round(rounds: Rounds) -> Estimate:
    """Of train_iters steps, or of as many as one pair of every prompt makes."""
    train = rounds.train
    run, shape = settings_of(rounds), _shape(rounds)
    cluster = _cluster(train.place, train.ranks)
    check_with_neighbours(run, shape, cluster)
    if steps := train.settings.get("train_iters"):
        told = f"{steps} steps"
    else:
        rows = _prompts(rounds) * int(_flag(rounds.pairs, "--max_pairs_per_prompt") or 1)
        batch = int(train.settings.get("global_batch_size") or 16)
        steps = math.ceil(rows * float(train.settings.get("num_train_epochs") or 1) / batch)
        told = f"{steps} steps, were there a pair of every prompt, each as long as the file allows"
    seconds = step_costs(shape, run, cluster, Lengths.of(run)).seconds
    return Estimate(cluster.ranks, tuple(int(steps) * second / 3600 for second in seconds), told)


def settings_of(rounds: Rounds) -> RunSettings:
    """What the plan reads of the training's keys."""
    from megatron_bvpo.planning.reading import settings_from

    return settings_from({**rounds.train.settings, "model": rounds.model}, file=rounds.file)


def _asking(rounds: Rounds, asking: Asking, values: dict, prompts: int, told: str) -> Estimate:
    cluster = _cluster(asking.place, rounds.train.ranks)
    job = job_from({**values, "model": rounds.model}, dict(asking.engine), prompts, None)
    found = sampling_costs(_shape(rounds), job, cluster)
    if found.room is None:
        raise UserError("the weights do not fit", field="engine.tensor_parallel_size")
    return Estimate(cluster.ranks, found.hours, told)


def _shape(rounds: Rounds) -> ModelShape:
    return model_shape(rounds.model, beside=Path(rounds.file).parent)


def _cluster(place: Place, ranks: int) -> Cluster:
    slurm = place.slurm
    if slurm is None:
        return Cluster(1, ranks, MEMORY)
    return Cluster(int(slurm.get("nodes") or 1), int(slurm.get("gpus_per_node") or NODE_GPUS), MEMORY)


def _prompts(rounds: Rounds) -> int:
    """Lines of the first round's files; the sampling's limit, and its assumption where they are no text."""
    from megatron_bvpo.planning.sampling_costs import PROMPTS

    found = sum(_lines(name) or PROMPTS for name in rounds.prompts(1))
    return min(found, int(rounds.sample.settings.get("limit") or found))


def _questions(suite: str) -> int | None:
    """Of a suite's file with local files alone; None where it names sets of a hub."""
    if not Path(suite).is_file():
        return None
    from megatron_bvpo.launching.run_file import read_keys

    total = 0
    for dataset in read_keys(suite).get("datasets") or []:
        lines = _lines(str(dataset.get("file"))) if isinstance(dataset, dict) else None
        if lines is None:
            return None
        total += min(lines, int(dataset.get("limit") or lines))
    return total


def _lines(name: str) -> int | None:
    file = Path(name)
    if file.suffix not in (".jsonl", ".json", ".csv") or not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _flag(words: tuple[str, ...], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None
