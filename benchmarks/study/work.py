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
from benchmarks.study.plan import CHOOSING_SEED, HELDOUT_SEED, OTHER_LAYOUT, Run, Size, untrained
from megatron_bvpo.data.whole_files import written_whole
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
            self._write(run, self._evaluated(run, None), {"steps": [], "argv": "", "seconds": 0.0}, run.name)

    def train_and_evaluate(self, run: Run) -> None:
        """On one rank; its gradients are recorded, its adapter is kept."""
        self._train(run, run.name)

    def train_under_layout(self, run: Run) -> None:
        """The same run once more on four ranks."""
        self._train(run, run.name + OTHER_LAYOUT, ranks=4, layout=TP2_PP2)

    def _train(self, run: Run, name: str, *, ranks: int = 1, layout: str = "") -> None:
        if self.record(name).exists():
            return
        rows, trained = self._rows_of(run), self.folder / "trained" / name
        started = time.monotonic()
        folder = training.train(run, rows, self.folder, trained, ranks=ranks, layout=layout)
        argv = [*training.argv_of(run, rows.relative_to(self.folder)), *layout.split()]
        of_run = {
            "steps": training.steps_of(folder),
            "argv": " ".join(argv),
            "seconds": time.monotonic() - started,
        }
        checkpoint = folder / f"checkpoint-{run.steps}"
        if ranks == 1:
            self._keep(run, checkpoint)
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
        return self.folder / training.adapter(run.name)

    def _keep(self, run: Run, checkpoint: Path) -> None:
        kept = self.adapter(run)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(checkpoint / name, kept / name)

    def _rows_of(self, run: Run) -> Path:
        rows = self.rows(run.seed)
        if run.arm == "again-fresh":
            return self._fresh_rows(run)
        return self._with_demonstrations(rows) if "expert" in run.flags else rows

    def _fresh_rows(self, run: Run) -> Path:
        """The same questions, answered by what `run` begins with."""
        policy, size = self.folder / training.adapter(run.after), self.size
        folder = self.folder / "fresh" / run.name
        return pairs.make_pairs(folder, self.model, run.seed, size.prompts, size.samples, adapter=policy)

    def _with_demonstrations(self, rows: Path) -> Path:
        made = rows.with_name("demonstrations.jsonl")
        if not made.exists():
            lines = map(json.loads, rows.read_text("utf-8").splitlines())
            shown = ({**row, "expert_response": row["messages"][-1]["content"]} for row in lines)
            _put(made, "".join(json.dumps(row) + "\n" for row in shown))
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

    def _write(self, run: Run, answers: dict, of_run: dict, name: str) -> None:
        record = {"run": vars(run), "answers": answers, **of_run}
        _put(self.record(name), json.dumps(record))


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
    with written_whole(path) as file:
        file.write(text)
