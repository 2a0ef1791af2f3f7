"""`bvpo report --html`: runs as one HTML file that needs nothing else.

Everything that comes from files goes through Jinja's escaping, in the text as in the data of the script. The colours,
the layout and the script are files of `page/`.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import megatron_bvpo
from megatron_bvpo.data.whole_files import written_whole
from megatron_bvpo.errors import UserError
from megatron_bvpo.reporting.differing_settings import NONE
from megatron_bvpo.reporting.run_files import Run
from megatron_bvpo.reporting.runs_table import runs_table
from megatron_bvpo.reporting.scores import ALL_PAIRS, Score, verdicts
from megatron_bvpo.reporting.series import CHARTS, drawn
from megatron_bvpo.reporting.spikes import RULE
from megatron_bvpo.streams import DEFAULT, TABLE

PARTS = Path(__file__).parent / "page"
# A mark for each colour, so that colours are not all that tells runs apart: circle, square, triangle, diamond, cross, …
SHAPES = (
    "M-5,0a5,5 0 1 0 10,0a5,5 0 1 0 -10,0Z",
    "M-4.5,-4.5h9v9h-9Z",
    "M0,-5.5L5.5,4.5h-11Z",
    "M0,-6L5.5,0L0,6L-5.5,0Z",
    "M-2,-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
    "M0,5.5L-5.5,-4.5h11Z",
    "M-2.7,-5.5h5.4L5.5,0L2.7,5.5h-5.4L-5.5,0Z",
    "M-5.5,-2h11v4h-11Z",
)
_MOST_SPIKES = 12  # steps that are named


def write_page(runs: Sequence[Run], target: Path) -> None:
    """Write the page of some runs.

    Raises:
        UserError: the file cannot be written.
    """
    require_page(target)
    text = page(runs, datetime.datetime.now())
    with written_whole(target) as file:
        file.write(text)


def require_page(target: Path) -> None:
    """Raise UserError where `--html` names what can be no page, before time is spent on it."""
    if target.is_dir():
        raise UserError("is a folder", file=str(target), field="--html", remedy=f"name a file: {target / 'runs.html'}")
    if target.suffix.lower() not in (".html", ".htm"):
        # Most likely a run's file, which would be lost.
        raise UserError("is no name of a page", file=str(target), field="--html", remedy="let it end in .html")
    if not target.parent.is_dir():
        raise UserError("there is no such folder", file=str(target.parent), field="--html", remedy="make it first")


def page(runs: Sequence[Run], now: datetime.datetime) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [{"name": r.name, "spikes": r.spikes, **drawn(r.training, r.evaluation)} for r in runs]
    return environment.get_template("page.html.j2").render(
        title=f"BVPO run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} BVPO runs",
        written=f"{now:%Y-%m-%d %H:%M}",
        version=megatron_bvpo.__version__,
        css=Markup((PARTS / "page.css").read_text(encoding="utf-8")),
        js=Markup("".join((PARTS / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))),
        shapes=SHAPES,
        streams=[s for s in TABLE if any(f"loss/{s}" in run["lines"] for run in shown)] or DEFAULT,
        runs=runs,
        table=runs_table(runs),
        notes=[(run.name, note) for run in runs for note in run.notes],
        scores=list(score_rows(runs)),
        verdicts=verdicts([(run.name, run.evaluations.last) for run in runs if run.evaluations.last]),
        all_pairs=len(runs) <= ALL_PAIRS,
        spikes=list(_spikes(runs)),
        spike_rule=RULE,
        reports=_reports(runs),
        sheets=[
            ("All settings", list(sheet([run.settings for run in runs]))),
            ("Versions", list(sheet([run.versions for run in runs]))),
        ],
        data={"runs": shown, "charts": CHARTS_FOR_SCRIPT, "shapes": SHAPES},
    )


CHARTS_FOR_SCRIPT = [
    {
        "key": chart.key,
        "title": chart.title,
        "stream": chart.stream,
        "judged": chart.judged,
        "unit_interval": chart.unit_interval,
        "band": chart.band,
        "curves": [{"key": c.key, "label": c.label, "dashed": c.dashed} for c in chart.curves],
    }
    for chart in CHARTS
]


def score_rows(runs: Sequence[Run]) -> Iterator[dict]:
    """Of each data set, the scores of all runs and modes on one axis, in per cent."""
    datasets = dict.fromkeys(score.dataset for run in runs for score in run.scores)
    for dataset in datasets:
        found = [(i, run, s) for i, run in enumerate(runs) for s in run.scores if s.dataset == dataset]
        modes = list(dict.fromkeys(s.mode for _, _, s in found))
        found.sort(key=lambda one: modes.index(one[2].mode))  # runs are compared within a mode
        ends = [value for _, _, s in found for value in (s.low, s.score, s.high) if math.isfinite(value)]
        low, high = 5 * math.floor(min(ends) / 5), 5 * math.ceil(max(ends) / 5)
        axis = (low, high) if low < high else (low - 5, high + 5)
        several = len({s.where for _, _, s in found}) > 1
        rows = [_score_row(i, f"{run.name}/{s.where}" if several else run.name, s, axis) for i, run, s in found]
        yield {"name": dataset, "low": axis[0], "high": axis[1], "rows": rows}


def _score_row(index: int, name: str, score: Score, axis: tuple[float, float]) -> dict:
    def place(value: float) -> float:
        return round(100 * min(max((value - axis[0]) / (axis[1] - axis[0]), 0), 1), 2)

    return {
        "index": index,
        "run": name,
        "mode": score.mode,
        "text": score.text,
        "interval": score.interval,
        "at": place(score.score),
        "left": place(score.low),
        "width": round(place(score.high) - place(score.low), 2),
        "asked": score.asked,
        "tokens": NONE if score.tokens is None else f"{score.tokens:,.0f}",
        "cut_off": f"{score.cut_off:.1f}",
        "unparsed": f"{score.unparsed:.1f}",
    }


def sheet(columns: Sequence[dict[str, str]]) -> Iterator[dict]:
    """Names and values of all runs side by side, those that differ first."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        values = [column.get(name, NONE) for column in columns]
        rows.append({"name": name, "cells": values, "differs": len(set(values)) > 1})
    yield from sorted(rows, key=lambda row: not row["differs"])


def _spikes(runs: Sequence[Run]) -> Iterator[dict]:
    for index, run in enumerate(runs):
        for key, steps in run.spikes.items():
            told = ", ".join(map(str, steps[:_MOST_SPIKES])) + (", …" if len(steps) > _MOST_SPIKES else "")
            yield {"index": index, "run": run.name, "key": key, "count": len(steps), "steps": told}


def _reports(runs: Sequence[Run]) -> list[dict]:
    """Each report once, with the runs that trained on its rows."""
    found: dict[str, dict] = {}
    for run in runs:
        for report in run.reports:
            entry = {"file": report.file, "text": report.text, "picture": report.picture, "runs": []}
            found.setdefault(report.file, entry)["runs"].append(run.name)
    return list(found.values())
