"""The tables of a study: CSV files, written anew whenever a run is done."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.study.evaluation import pairs_of, questions
from benchmarks.study.plan import CHOOSING_SEED
from benchmarks.study.work import Bench
from megatron_bvpo.data.whole_files import written_whole
from megatron_bvpo.rehearsal.reasoner import reasoner_folder
from megatron_bvpo.rehearsal.reasoner.tokens import MODES, prompt_text, read_tokenizer

OF_RUN = ("arm", "batch", "rate", "seed", "steps")


class Study:
    """What is known so far.

    Attributes:
        out: `runs.csv` (a line a run), `steps.csv` (a line a step), `answers.csv` (a line a run and mode: right
            answers, a digit a question), `questions.csv` (in the same order), `greedy.csv` (as answers.csv, likeliest
            tokens), `sides.csv` (log-probabilities of held-out pairs), `bias.csv` (bias.py), `pairs.csv` (a line a
            seed: rows, and mean tokens of a row's pairs, prompts included), `fresh.csv` (the same of second rounds).
            A run's seconds are those of its training.
    """

    def __init__(self, bench: Bench, out: Path):
        self.bench, self.out = bench, out

    def records(self) -> list[dict[str, Any]]:
        found = [(path.stem, json.loads(path.read_text("utf-8"))) for path in self._files("runs/*.json")]
        return [{"name": name, **record} for name, record in sorted(found)]

    def chosen_rates(self) -> dict[int, float]:
        """Batch → the rate whose trace-only run is right most often with thinking; the lower where two are alike."""
        best: dict[int, tuple[float, float]] = {}
        for record in self.records():
            run = record["run"]
            if run["seed"] == CHOOSING_SEED:
                score = (_share(record["answers"]["thinking"]), -run["rate"])
                best[run["batch"]] = max(best.get(run["batch"], score), score)
        return {batch: -rate for batch, (_, rate) in best.items()}

    def write(self) -> None:
        records = self.records()
        self.out.mkdir(parents=True, exist_ok=True)
        write_csv(self.out / "runs.csv", [_run_line(record) for record in records])
        write_csv(self.out / "steps.csv", [{"name": r["name"], **step} for r in records for step in r["steps"]])
        write_csv(self.out / "answers.csv", [line for r in records for line in _answer_lines(r["name"], r["answers"])])
        again = {path.stem: json.loads(path.read_text("utf-8")) for path in self._files("second-look/*.json")}
        greedy = [line for name, of in again.items() for line in _answer_lines(name, of["greedy"])]
        write_csv(self.out / "greedy.csv", greedy)
        sides = [{"name": n, "mode": m, **of} for n, found in again.items() for m, of in found["sides"].items()]
        write_csv(self.out / "sides.csv", sides)
        asked = enumerate(questions(self.bench.size))
        lines = [{"number": i, "family": p.family, "question": p.question, "answer": p.answer} for i, p in asked]
        write_csv(self.out / "questions.csv", lines)
        write_csv(self.out / "pairs.csv", [_pairs_line(path) for path in self._files("seed-*/rows.jsonl")])
        fresh = [(path, self.bench.rows(_seed_of(path))) for path in self._files("fresh/*/rows.jsonl")]
        write_csv(self.out / "fresh.csv", [_fresh_line(*paths) for paths in fresh])
        biases = [json.loads(path.read_text("utf-8")) for path in self._files("bias/*/found.json")]
        write_csv(self.out / "bias.csv", biases)

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self.bench.folder.glob(pattern))


def _answer_lines(name: str, answers: dict[str, dict]) -> list[dict[str, Any]]:
    return [
        {"name": name, "mode": mode, "repeats": of["repeats"], "right": of["right"]} for mode, of in answers.items()
    ]


def _share(answers: dict[str, Any]) -> float:
    return sum(map(int, answers["right"])) / len(answers["right"]) / answers["repeats"]


def _run_line(record: dict[str, Any]) -> dict[str, Any]:
    line = {"name": record["name"], **{name: record["run"][name] for name in OF_RUN}}
    for mode in MODES:
        answers = record["answers"][mode]
        line |= {f"{mode}_right": _share(answers)}
        line |= {f"{mode}_{name}": answers[name] for name in ("tokens", "unended")}
    return {**line, "seconds": round(record["seconds"], 1), "flags": record["argv"]}


def _pairs_line(path: Path) -> dict[str, Any]:
    return {"seed": _seed_of(path), **_numbers_of_pairs(path)}


def _fresh_line(path: Path, stale: Path) -> dict[str, Any]:
    """A second round's fresh pairs; `shared`: how many of their questions have pairs among the old ones."""
    questions, old = ({question for question, *_ in pairs_of(rows, "empty")} for rows in (path, stale))
    return {"name": path.parent.name, **_numbers_of_pairs(path), "shared": len(questions & old)}


def _seed_of(rows: Path) -> int:
    return int(rows.parent.name.rpartition("seed")[2].removeprefix("-"))


@cache
def _numbers_of_pairs(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    line: dict[str, Any] = {"rows": len(rows), "questions": len({row["prompt_id"] for row in rows})}
    tokenizer = read_tokenizer(reasoner_folder())
    for stream, mode in (("trace", "thinking"), ("empty", "empty")):
        texts = [prompt_text(q, mode) + answer for q, *sides in pairs_of(path, mode) for answer in sides]
        line[f"{stream}_tokens"] = sum(len(tokenizer.encode(text).ids) for text in texts) / len(rows)
    return line


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All columns that any row has; a table without rows is no file."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
