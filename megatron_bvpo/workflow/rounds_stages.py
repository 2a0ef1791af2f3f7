"""The stages of rounds: each is a command that goes on where it was, and leaves files that the next one reads.

    OUT/start/eval/               what the start scores
    OUT/round-1/samples/          answers of the start
               /pairs.jsonl, pairs_heldout.jsonl, pairs.report.md
               /run/              checkpoints and log; run/eval/ what the round's model scores
               /model/            the round's model as an engine loads it
    OUT/round-2/…                 answers of round 1's model, and so on
    OUT/compare.json, OUT/rounds.html

A round trains the adapter of the round before. With `reference: start` its reference is the base model, which is the
model without any adapter; with `last` it is that same adapter, frozen (--ref_adapters).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.evaluation.evaluation_run import ANSWERS
from megatron_bvpo.sampling.asking.job_file import ENGINE, as_flags
from megatron_bvpo.sampling.samples import JUDGEMENTS, SETTINGS
from megatron_bvpo.workflow.rounds_file import LAST, START, Asking, Rounds
from megatron_bvpo.workflow.stage_kinds import CHECKPOINT, asking, served, training, yaml_text
from megatron_bvpo.workflow.stages import Stage

COMPARED, PAGE = "compare.json", "rounds.html"


@dataclass(frozen=True)
class Policy:
    """A model that an engine serves.

    Attributes:
        name: `start`, `round-1`, …, by which it is asked for.
        folder: of its files.
        before: stages that must have ended before it can be served.
    """

    name: str
    folder: Path
    before: tuple[str, ...]

    @property
    def run(self) -> Path:
        """Its training run's folder."""
        return self.folder / "run"

    @property
    def evaluation(self) -> Path:
        """Below the run, where `bvpo report` looks for scores."""
        return (self.run if self.before else self.folder) / "eval"


def stages_of(rounds: Rounds) -> list[Stage]:
    """All stages, in order.

    Raises:
        UserError: a stage is to be submitted, and there is no script for it.
    """
    policy, policies, stages = Policy(START, rounds.out / START, ()), [], []
    for number in range(1, rounds.rounds + 1):
        policies.append(policy)
        after = Policy(f"round-{number}", rounds.out / f"round-{number}", (f"round-{number}/export",))
        stages += _round(rounds, number, policy, after)
        policy = after
    policies.append(policy)
    if rounds.evaluate:
        stages += [_evaluation(rounds, rounds.evaluate, policy) for policy in policies]
        stages.append(_comparison(rounds, policies))
    return [*stages, _page(rounds, policies)]


def _round(rounds: Rounds, number: int, policy: Policy, after: Policy) -> list[Stage]:
    """From a policy's answers to the next policy."""
    name, folder = after.name, after.folder
    samples, pairs = folder / "samples", folder / "pairs.jsonl"
    stages = [_sampling(rounds, number, policy, after, samples)]
    if rounds.judge:
        words = ("bvpo", "judge", str(samples), *rounds.judge)
        stages.append(Stage(f"{name}/judge", words, (f"{name}/sample",), kept=str(samples / JUDGEMENTS)))
    words = ("bvpo", "pairs", str(samples), "--out", str(pairs), *rounds.pairs, "--overwrite")
    judged = ("--judge", rounds.judge_name) if rounds.judge_name else ()
    stages.append(Stage(f"{name}/pairs", (*words, *judged), (stages[-1].name,)))
    stages.append(_training(rounds, policy, after, pairs))
    export = ["bvpo", "export", str(after.run / CHECKPOINT), "--out", str(folder / "model"), "--model", rounds.model]
    export += ["--merge"] if rounds.merge else []
    stages.append(Stage(f"{name}/export", tuple(export), (f"{name}/train",), whole=str(folder / "model")))
    return stages


def _sampling(rounds: Rounds, number: int, policy: Policy, after: Policy, samples: Path) -> Stage:
    settings = dict(rounds.sample.settings)
    settings["prompts"] = rounds.prompts(number)
    # Other draws where a round asks the same prompts.
    settings["seed"] = int(settings.get("seed") or 0) + number - 1
    settings.setdefault("tokenizer", rounds.model)
    job = {**settings, "out": str(samples), "model": policy.name, ENGINE: dict(rounds.sample.engine)}
    file = after.folder / "sample.yaml"
    return asking(
        f"{after.name}/sample",
        [str(file), *_served(rounds, policy)],
        policy.before,
        rounds.sample.place,
        rounds.train.ranks,  # an engine takes what training takes
        files={str(file): yaml_text(job)},
        reads=tuple(os.path.abspath(file) for file in rounds.prompts(number) if Path(file).exists()),  # a dry run
        kept=str(samples / SETTINGS),
    )


def _evaluation(rounds: Rounds, evaluate: Asking, policy: Policy) -> Stage:
    file = policy.folder / "evaluate.yaml"
    settings = {"tokenizer": rounds.model, **evaluate.settings}
    asked = {"model": policy.name, "out": str(policy.evaluation), **settings}
    suite = str(settings["suite"])
    return asking(
        f"{policy.name}/evaluate",
        [str(file), *_served(rounds, policy), "--", "bvpo", "eval", *as_flags(asked)],
        policy.before,
        evaluate.place,
        rounds.train.ranks,
        files={str(file): yaml_text({"model": rounds.model, ENGINE: dict(evaluate.engine)})},
        reads=(os.path.abspath(suite),) if Path(suite).is_file() else (),
        kept=str(policy.evaluation / ANSWERS),
    )


def _served(rounds: Rounds, policy: Policy) -> list[str]:
    """What an engine loads as this policy."""
    if not policy.before:
        return served(policy.name, rounds.model)
    rank = None if rounds.merge else rounds.lora_rank
    return served(policy.name, rounds.model, str(policy.folder / "model"), rank)


def _training(rounds: Rounds, policy: Policy, after: Policy, pairs: Path) -> Stage:
    train, run = rounds.train, after.run
    settings: dict[str, Any] = {**train.settings, "model": rounds.model, "dataset": str(pairs), "output_dir": str(run)}
    if rounds.heldout:
        settings["val_dataset"] = str(pairs.with_name(f"{pairs.stem}_heldout{pairs.suffix}"))
    if policy.before:
        settings["adapters"] = str(policy.run / CHECKPOINT)
        if rounds.reference == LAST:
            settings["ref_adapters"] = settings["adapters"]
    needs = (f"{after.name}/pairs", *policy.before)
    return training(f"{after.name}/train", after.folder / "train.yaml", settings, needs, train.place, train.ranks)


def _comparison(rounds: Rounds, policies: list[Policy]) -> Stage:
    words = [f"{policy.name}={policy.evaluation}" for policy in policies]
    command = ("bvpo", "compare", *words, "--baseline", START, "--json", str(rounds.out / COMPARED))
    # Named by the number of rounds: a file that asks for more of them later goes on.
    return Stage(f"compare/{rounds.rounds}", command, tuple(f"{policy.name}/evaluate" for policy in policies))


def _page(rounds: Rounds, policies: list[Policy]) -> Stage:
    runs = [str(policy.run if policy.before else policy.folder) for policy in policies]
    trained = (f"{policies[-1].name}/train",)
    runs, needs = (runs, (f"compare/{rounds.rounds}",)) if rounds.evaluate else (runs[1:], trained)
    return Stage(f"page/{rounds.rounds}", ("bvpo", "report", *runs, "--html", str(rounds.out / PAGE)), needs)
