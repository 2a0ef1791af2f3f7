"""The table of runs: scores with intervals, the settings that differ, and what was learnt on held-out rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_bvpo.reporting.differing_settings import NONE, columns, short_paths, shown
from megatron_bvpo.reporting.run_files import Run
from megatron_bvpo.reporting.run_log import STREAMS
from megatron_bvpo.reporting.series import last


@dataclass(frozen=True)
class Column:
    """A head of the table; `group` stands above it and its neighbours of the same group."""

    group: str
    title: str
    help: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell. `sort`: a number, or a text, or "" for none, which sorts last; `more`: an interval, in small print."""

    text: str
    sort: str = ""
    more: str = ""
    help: str = ""

    @property
    def short(self) -> bool:
        """Whether it stays on one line."""
        return len(self.text) + len(self.more) <= 32


@dataclass(frozen=True)
class Row:
    index: int
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[Row]
    left_out: list[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Groups with the number of their columns."""
        return [(group, len(list(of))) for group, of in groupby(self.columns, key=lambda column: column.group)]


PATHS = ("dataset", "val_dataset", "model", "ref_model", "adapters", "ref_adapters")
RIGHTLY = "that are preferred rightly"
# Title, metric, digits, what it is.
_HELD_OUT = (
    ("loss", "loss", 3, "mixed loss on held-out rows, last evaluation"),
    *(
        column
        for name, prefix in STREAMS
        for column in (
            (f"{name} accuracy", f"{prefix}rewards/accuracies", 3, f"share of held-out {name} pairs {RIGHTLY}"),
            (f"{name} margin", f"{prefix}rewards/margins", 3, f"mean reward margin of held-out {name} pairs"),
        )
    ),
    ("expert nll", "expert/nll_loss", 3, "negative log-likelihood of a held-out demonstration's token"),
)


def runs_table(runs: Sequence[Run]) -> Table:
    """A row a run, in the order given."""
    heads = [Column("", "run")]
    columns_of_cells = [[Cell(run.name, run.name, help=run.place) for run in runs]]

    def add(head: Column, cells: list[Cell]) -> None:
        heads.append(head)
        columns_of_cells.append(cells)

    for dataset, mode in dict.fromkeys((s.dataset, s.mode) for run in runs for s in run.scores):
        head = Column("scores, %", f"{dataset}, {mode}", "with its 95 % interval")
        add(head, [_score(run, dataset, mode) for run in runs])
    names, left_out = columns([run.settings for run in runs])
    for name in names:
        add(Column("settings", name, f"--{name}"), _setting(runs, name))
    for title, key, digits, what in _HELD_OUT:
        cells = [_number(last(run.evaluation, key, "eval_"), digits) for run in runs]
        if any(cell.sort for cell in cells):
            add(Column("held out", title, what), cells)
    for head, cells in _training(runs):
        add(head, cells)
    rows = [Row(index, list(cells)) for index, cells in enumerate(zip(*columns_of_cells, strict=True))]
    return Table(heads, rows, left_out)


def _training(runs: Sequence[Run]):
    alphas = [_number(last(run.training, "alpha"), 2) for run in runs]
    if any(cell.sort for cell in alphas):
        yield Column("training", "α", "weight of the trace gradient at the last step"), alphas
    cells = []
    for run in runs:
        number = sum(map(len, run.spikes.values()))
        told = "; ".join(f"{key}: {len(steps)}" for key, steps in run.spikes.items())
        cells.append(Cell(str(number), str(number), help=told) if run.trained else Cell(NONE))
    yield Column("training", "spikes", "of losses and gradient norm; the rule is below"), cells
    steps = []
    for run in runs:
        done, planned = run.steps
        told = f"{done} of {planned}" if planned else str(done)
        steps.append(Cell(told, str(done)) if run.trained else Cell(NONE))
    yield Column("training", "steps", "optimizer steps"), steps


def _score(run: Run, dataset: str, mode: str) -> Cell:
    # Of several evaluations of one run the last one counts here; all are in the section of scores.
    found = [score for score in run.scores if (score.dataset, score.mode) == (dataset, mode)]
    if not found:
        return Cell(NONE)
    score = found[-1]
    return Cell(score.text, f"{score.score:g}", score.interval, f"{score.asked} questions")


def _number(value: float | None, digits: int) -> Cell:
    if value is None:
        return Cell(NONE)
    text = f"{value:.{digits}f}"
    return Cell(text.replace("-", "−") if float(text) else text.lstrip("-"), f"{value:.6g}")


def _setting(runs: Sequence[Run], name: str) -> list[Cell]:
    texts = [shown(run.settings, name) for run in runs]
    short = short_paths(texts) if name in PATHS else texts
    return [
        Cell(short_text, "" if text == NONE else short_text, help=text if short_text != text else "")
        for text, short_text in zip(texts, short, strict=True)
    ]
