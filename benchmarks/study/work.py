"""What a worker process does: make pairs, train and evaluate. Everything is a file, made whole once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TextIO

from benchmarks.study import bias, evaluation, pairs, training
from benchmarks.study.plan import CHOOSING_SEED, HELDOUT_SEED, Run, Size, untrained
from megatron_bvpo.errors import UserError
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

    def prepare(self) -> TextIO:
        """The model in its folder; what a killed start left behind goes. Returns the folder's lock, closed to let go.

        Raises:
            UserError: another start is at work in the folder, or it holds a study of another size.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another start is at work here", file=str(self.folder), remedy="wait for it") from None
        mark, size = self.folder / "size.json", json.dumps(vars(self.size))
        if mark.exists() and mark.read_text("utf-8") != size:
            remedy = "give another --work, or remove the folder"
            raise UserError("holds a study of another size", file=str(self.folder), remedy=remedy)
        shutil.rmtree(self.folder / "trained", ignore_errors=True)
        shutil.rmtree(self.model, ignore_errors=True)
        copy_reasoner(self.model)
        _put(mark, size)
        return lock

    # ---- jobs

    def make_pairs(self, seed: int) -> None:
        size, held_out = self.size, seed == HELDOUT_SEED
        prompts, split = (size.heldout_prompts, "heldout") if held_out else (size.prompts, "train")
        pairs.make_pairs(self.rows(seed).parent, self.model, seed, prompts, size.samples, split=split)

    def evaluate_base(self, seed: int) -> None:
        """The untrained model, as a run without steps."""
        run = untrained(seed)
        if not self.record(run.name).exists():
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
            self._keep(run, checkpoint)
            self._write(run, self._evaluated(run, checkpoint), of_run)
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
        how = {"split": "heldout", "adapter": adapter}
        fresh = pairs.make_pairs(folder, self.model, HELDOUT_SEED, size.heldout_prompts, size.samples, **how)
        found = bias.measure(self.model, adapter, self.rows(HELDOUT_SEED), fresh, folds=size.folds)
        _put(folder / "found.json", json.dumps({"run": run.name.rpartition("-")[0], "seed": run.seed, **found}))

    def look_again(self, run: Run) -> None:
        """At the held-out pairs' log-probabilities, and at answers of the likeliest tokens."""
        path = self.folder / "second-look" / f"{run.name}.json"
        if path.exists():
            return
        adapter = self.adapter(run) if run.steps else None
        greedy = evaluation.evaluate(
            self.model, adapter, evaluation.questions(self.size), repeats=1, seed=run.seed, temperature=0.0
        )
        sides = evaluation.side_log_probs(self.model, adapter, self.rows(HELDOUT_SEED))
        _put(path, json.dumps({"greedy": evaluation.as_json(greedy), "sides": sides}))

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
            repeats=self.size.repeats,
            seed=run.seed,
        )
        return evaluation.as_json(found)

    def _write(self, run: Run, answers: dict, of_run: dict, name: str = "") -> None:
        record = {"run": vars(run), "answers": answers, **of_run}
        _put(self.record(name or run.name), json.dumps(record))


def as_worker() -> None:
    """One core, and an end when the study is killed: a worker that trains on would meet the next start's."""
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        import psutil

        while os.getppid() == parent:
            time.sleep(1)
        for process in psutil.Process().children(recursive=True):  # the ranks
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
