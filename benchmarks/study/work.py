"""What a worker process does: make pairs, train and evaluate. Everything is a file, made whole once."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from benchmarks.study import bias, evaluation, pairs, training
from benchmarks.study.plan import CHOOSING_SEED, HELDOUT_SEED, Run, Size
from megatron_bvpo.rehearsal.reasoner import copy_reasoner

TP2_PP2 = "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2"


class Bench:
    """The folder of a study at work.

    Attributes:
        folder: `reasoner/`, `seed-N/rows.jsonl`, `runs/NAME.json`, `trained/`.
        size: how much of everything.
    """

    def __init__(self, folder: Path, size: Size):
        self.folder, self.size = folder, size

    @property
    def model(self) -> Path:
        return self.folder / "reasoner"

    def rows(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / "rows.jsonl"

    def record(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}.json"

    def prepare(self) -> None:
        """The model in its folder."""
        if not (self.model / "config.json").is_file():
            copy_reasoner(self.model)

    # ---- jobs

    def make_pairs(self, seed: int) -> None:
        prompts = self.size.heldout_prompts if seed == HELDOUT_SEED else self.size.prompts
        pairs.make_pairs(self.rows(seed).parent, self.model, seed, prompts, self.size.samples)

    def evaluate_base(self, seed: int) -> None:
        """The untrained model, as a run without steps."""
        run = Run("untrained", "", 0, seed, 0.0, 0)
        self._write(run, self._evaluated(run, None), {"steps": [], "argv": "", "seconds": 0.0})

    def train_and_evaluate(self, runs: list[Run]) -> None:
        """Those that have no record yet."""
        runs = [run for run in runs if not self.record(run.name).exists()]
        trained = self.folder / "trained" / f"worker-{os.getpid()}"
        for run in runs:
            started = time.monotonic()
            rows = self._rows_of(run)
            (folder,) = training.train([(run, rows)], self.model, trained)
            seconds = time.monotonic() - started
            of_run = {
                "steps": training.steps_of(folder),
                "argv": " ".join(training.argv_of(run, Path("reasoner"), rows.relative_to(self.folder))),
                "seconds": seconds,
            }
            checkpoint = folder / f"checkpoint-{run.steps}"
            self._write(run, self._evaluated(run, checkpoint), of_run)
            self._keep(run, checkpoint)
            shutil.rmtree(trained, ignore_errors=True)

    def train_under_layout(self, run: Run) -> None:
        """The same run once more on four ranks."""
        name = f"{run.name}-tp2pp2"
        if self.record(name).exists():
            return
        rows, trained = self._rows_of(run), self.folder / "trained" / name
        (folder,) = training.train([(run, rows)], self.model, trained, ranks=4, layout=TP2_PP2)
        of_run = {"steps": training.steps_of(folder), "argv": TP2_PP2, "seconds": 0.0}
        checkpoint = folder / f"checkpoint-{run.steps}"
        self._write(run, self._evaluated(run, checkpoint), of_run, name)
        shutil.rmtree(trained, ignore_errors=True)

    def measure_bias(self, run: Run) -> None:
        """b_t at what `run` has become (bias.py)."""
        folder = self.folder / "bias" / run.name
        if (folder / "found.json").exists():
            return
        adapter, size = self.adapter(run), self.size
        fresh = pairs.make_pairs(folder, self.model, 300 + run.seed, size.heldout_prompts, size.samples, adapter)
        found = bias.measure(self.model, adapter, self.rows(HELDOUT_SEED), fresh, folds=size.folds)
        _put(folder / "found.json", json.dumps({"run": run.name.rpartition("-")[0], "seed": run.seed, **found}))

    def adapter(self, run: Run) -> Path:
        """Where a run's adapter is kept."""
        return self.folder / "adapters" / run.name

    def _keep(self, run: Run, checkpoint: Path) -> None:
        kept = self.adapter(run)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(checkpoint / name, kept / name)

    def _rows_of(self, run: Run) -> Path:
        rows = self.rows(run.seed)
        if "expert" not in run.flags:
            return rows
        made = rows.with_name("right-answers.jsonl")
        if not made.exists():
            lines = []
            for row in map(json.loads, rows.read_text("utf-8").splitlines()):
                *before, answer = row["messages"]
                lines.append(json.dumps({"messages": before, "expert_response": answer["content"]}) + "\n")
            _put(made, "".join(lines))
        return made

    def _evaluated(self, run: Run, adapter: Path | None) -> dict[str, dict]:
        found = evaluation.evaluate(
            self.model,
            adapter,
            evaluation.questions(self.size, choosing=run.seed == CHOOSING_SEED),
            self.rows(HELDOUT_SEED),
            repeats=self.size.repeats,
            seed=run.seed,
        )
        return evaluation.as_json(found)

    def _write(self, run: Run, answers: dict, of_run: dict, name: str = "") -> None:
        record = {"run": vars(run), "answers": answers, **of_run}
        _put(self.record(name or run.name), json.dumps(record))


def one_thread() -> None:
    """A worker's share of the cores."""
    import torch

    torch.set_num_threads(1)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
