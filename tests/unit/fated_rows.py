"""Rows whose fate is known from how they were made, and files of all kinds that hold them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import parquet

from tests.unit.data_runs import DataOnly, load

MAX_LENGTH = 64
LONG = "hm " * 100


# --- rows whose fate is known ---


def think(trace, answer):
    return f"<think>\n{trace}\n</think>\n\n{answer}"


def ask(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@dataclass(frozen=True)
class Fate:
    """What becomes of a row: which pairs are trained, or why it is lost."""

    trace: bool = True
    empty: bool = True
    reason: str = ""
    too_long: bool = False
    alone: bool = False  # it came without a trace pair


GOOD, BAD = think("a", "4"), think("b", "5")
BOTH, TRACE_ONLY = Fate(), Fate(empty=False)
TOO_LONG = Fate(False, False, too_long=True)


def lost(reason):
    return Fate(False, False, reason)


# kind: (makes a row of a prompt, its fate)
KINDS = {
    "plain": (lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD}, BOTH),
    "own answers": (
        lambda q: {
            "messages": ask(q, GOOD),
            "rejected_response": BAD,
            "empty_response": "2024-01-01",
            "empty_rejected_response": "2024-01-02",
        },
        BOTH,
    ),
    "rejected conversation": (lambda q: {"messages": ask(q, GOOD), "rejected_messages": ask(q, BAD)}, BOTH),
    "rejected list": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": [{"from": "gpt", "value": BAD}]},
        BOTH,
    ),
    "two conversations": (lambda q: {"chosen": ask(q, GOOD), "rejected": ask(q, BAD)}, BOTH),
    "query": (lambda q: {"query": q, "response": GOOD, "rejected_response": BAD}, BOTH),
    "sides": (lambda q: {"prompt": q, "chosen": GOOD, "rejected": BAD}, BOTH),
    "loss switches": (
        lambda q: {
            "messages": [ask(q, "")[0], {"role": "assistant", "content": GOOD, "loss": True}],
            "rejected_messages": ask(q, BAD),
        },
        BOTH,
    ),
    "odd columns": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "margin": "N/A", "images": "", "id": q},
        BOTH,
    ),
    "other types of odd columns": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "margin": 0.3, "id": 7},
        BOTH,
    ),
    "one own answer": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "empty_response": "4"},
        Fate(empty=False, reason="empty_rejected_response: missing, the other empty answer is there"),
    ),
    "long own answer": (
        lambda q: {
            "messages": ask(q, GOOD),
            "rejected_response": BAD,
            "empty_response": LONG,
            "empty_rejected_response": "5",
        },
        Fate(empty=False, too_long=True),
    ),
    "long trace": (
        lambda q: {"messages": ask(q, think(LONG, "4")), "rejected_response": BAD},
        Fate(trace=False, too_long=True),
    ),
    "empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": "4", "empty_rejected_response": "5"},
        Fate(trace=False, alone=True),
    ),
    "query and empty pair": (
        lambda q: {"query": q, "empty_response": "4", "empty_rejected_response": "5"},
        Fate(trace=False, alone=True),
    ),
    "long empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": LONG, "empty_rejected_response": "5"},
        TOO_LONG,
    ),
    "half an empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": "4"},
        lost("empty_rejected_response: missing, the other empty answer is there"),
    ),
    "long prompt": (lambda q: {"messages": ask(q + LONG, GOOD), "rejected_response": BAD}, TOO_LONG),
    "no rejected side": (lambda q: {"messages": ask(q, GOOD)}, lost("rejected_response: missing")),
    "equal": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": GOOD},
        lost("rejected_response: the same text as the chosen response"),
    ),
    "no trace": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": "5"},
        lost("rejected_response: no trace, neither <think> nor </think>"),
    ),
    "unknown columns": (lambda q: {"good": GOOD, "note": q}, lost("columns: no messages and no pair of responses")),
    "another prompt": (
        lambda q: {"messages": ask(q, GOOD), "rejected_messages": ask("else", BAD)},
        lost("rejected_messages: another prompt than in messages"),
    ),
}


@dataclass
class Rows:
    """Rows with their fates, by prompt."""

    rows: list[dict] = field(default_factory=list)
    fates: dict[str, Fate] = field(default_factory=dict)

    def __init__(self, kinds):
        self.rows, self.fates = [], {}
        for i, kind in enumerate(kinds):
            make, fate = KINDS[kind]
            self.rows.append(make(f"q{i}"))
            self.fates[f"q{i}"] = fate

    def count(self, stream):
        return sum(getattr(fate, stream) for fate in self.fates.values())

    @property
    def trained(self):
        return {prompt for prompt, fate in self.fates.items() if fate.trace or fate.empty}

    @property
    def alone(self):
        return sum(fate.alone for fate in self.fates.values())

    @property
    def dropped(self):
        """Rows that are lost to the row checks, by reason."""
        return Counter(fate.reason for fate in self.fates.values() if fate.reason and not (fate.trace or fate.empty))

    @property
    def too_long(self):
        return sum(fate.too_long and not (fate.trace or fate.empty) for fate in self.fates.values())

    def too_long_alone(self, stream):
        """Rows that lose this stream's pair to their length and keep the other one."""
        return sum(
            fate.too_long and (fate.trace or fate.empty) and not getattr(fate, stream) for fate in self.fates.values()
        )


# --- files and their loading ---


def as_text(value):
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def write_csv(path, rows):
    columns = sorted({name for row in rows for name in row})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([as_text(row.get(name)) for name in columns] for row in rows)


def write_parquet(path, rows):
    """Lists of messages as such, all else as text: a column of a table has one type."""
    lists = ("messages", "rejected_messages", "chosen")
    rows = [
        {k: v if k in lists and isinstance(v, list) else None if v is None else as_text(v) for k, v in row.items()}
        for row in rows
    ]
    columns = sorted({name for row in rows for name in row})
    for row in rows:
        if isinstance(row.get("chosen"), str):
            row["chosen_response"], row["rejected_response"] = row.pop("chosen"), row.pop("rejected")
    columns = sorted({name for row in rows for name in row})
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    parquet.write_table(table, path)


WRITERS = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": write_csv,
    "parquet": write_parquet,
}


def write(folder, ending, rows):
    """One file, several, or a folder of two: the `--dataset` entries."""
    if ending == "folder":
        (folder / "data").mkdir()
        half = len(rows) // 2 or 1
        for name, part in (("train-1.jsonl", rows[:half]), ("train-2.jsonl", rows[half:])):
            if part:
                WRITERS["jsonl"](folder / "data" / name, part)
        return [str(folder / "data")]
    if ending == "files":
        entries = []
        for i, ending in enumerate(("jsonl", "parquet", "csv")):
            if part := rows[i::3]:
                WRITERS[ending](folder / f"{i}.{ending}", part)
                entries.append(str(folder / f"{i}.{ending}"))
        return entries
    WRITERS[ending](folder / f"rows.{ending}", rows)
    return [str(folder / f"rows.{ending}")]


MODES = {
    "ahead": {},
    "stream": {"streaming": True},
    "lazy": {"lazy_tokenize": True},
    "packing": {"packing": True, "packing_length": 4 * MAX_LENGTH},
}


def run(template, entries, mode="ahead", **more):
    """What the data stage makes of `--dataset` entries."""
    template.packing = template.padding_free = False
    return load(DataOnly(dataset=entries, max_length=MAX_LENGTH, **MODES[mode], **more), template)
