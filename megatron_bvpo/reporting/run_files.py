"""What a run left in its folder and beside its rows, read once. What is not there or cannot be read becomes a note."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.secret_masks import masked
from megatron_bvpo.reporting.differing_settings import plain_settings, unique_names
from megatron_bvpo.reporting.run_log import LOG, read_log, require_log
from megatron_bvpo.reporting.run_versions import FILE as VERSIONS
from megatron_bvpo.reporting.scores import Evaluations, Score, read_scores, scores_below
from megatron_bvpo.reporting.series import found_spikes

ARGUMENTS = "args.json"
_LARGEST_REPORT, _LARGEST_PICTURE = 200_000, 2_000_000  # bytes; a page is sent to somebody


@dataclass(frozen=True)
class DataReport:
    """What `bvpo pairs` wrote beside a file of rows: its text, and its picture as a data: address, if there is one."""

    file: str
    text: str
    picture: str = ""


@dataclass
class Run:
    """One run.

    Attributes:
        name: unique among the runs of a page.
        training, evaluation: lines of `read_log`.
        settings: flag → text, secrets masked; empty where args.json is missing.
        versions: package → version; what is known of them.
        evaluations: those below the folder.
        reports: of its rows.
        notes: what could not be read, a sentence each.
    """

    name: str
    folder: Path
    training: list[dict]
    evaluation: list[dict]
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    evaluations: Evaluations = field(default_factory=Evaluations)
    reports: list[DataReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> list[Score]:
        return self.evaluations.scores

    @property
    def trained(self) -> bool:
        return bool(self.training or self.evaluation or self.settings)

    @cached_property
    def spikes(self) -> dict[str, list[int]]:
        """Metric → steps that are spikes."""
        return found_spikes(self.training)

    @property
    def place(self) -> str:
        return masked(str(self.folder))

    @property
    def steps(self) -> tuple[int, int | None]:
        """The last logged step, and how many there were to be, if the log tells."""
        if not self.training:
            return 0, None
        line = max(self.training, key=lambda line: line["step"])
        planned = str(line.get("iteration", "")).partition("/")[2]
        return line["step"], int(planned) if planned.isdigit() else None


def require_run(folder: Path) -> Path:
    """`folder` if it is a run's, or that of a model that was evaluated and not trained: it has scores, and no log in or
    below it.

    Raises:
        UserError: it is neither.
    """
    try:
        return require_log(folder)
    except UserError as error:
        if "did you mean" in error.remedy or not any(scores_below(folder)):
            raise
    return folder


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, in the order given; a folder that is named twice is one run.

    Raises:
        UserError: a folder that is neither a run's nor an evaluated model's.
    """
    distinct = list({require_run(folder).resolve(): None for folder in folders})
    return [_read(name, folder) for name, folder in zip(unique_names(distinct), distinct, strict=True)]


def _read(name: str, folder: Path) -> Run:
    if not (folder / LOG).is_file():
        run = Run(masked(name), folder, [], [], evaluations=read_scores(folder))
        run.notes += ["was evaluated, and not trained here.", *map(masked, run.evaluations.notes)]
        return run
    run = Run(masked(name), folder, *read_log(folder))
    if not run.training:
        run.notes.append("logging.jsonl has no step yet.")
    arguments = _json_object(folder / ARGUMENTS, run.notes, "its settings are not known")
    run.settings = plain_settings(arguments)
    versions = _json_object(folder / VERSIONS, [], "")  # runs of before it was written have none: no note
    known = {"ms-swift": arguments["swift_version"]} if arguments.get("swift_version") else {}
    run.versions = {str(package): str(version) for package, version in {**known, **versions}.items()}
    run.evaluations = read_scores(folder)
    run.notes += map(masked, run.evaluations.notes)
    run.reports = list(_data_reports([*_listed(arguments, "dataset"), *_listed(arguments, "val_dataset")]))
    return run


def _json_object(file: Path, notes: list[str], otherwise: str) -> dict:
    """The object in a file; {} and a note where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = "holds no JSON object"
    except FileNotFoundError:
        problem = "is not there"
    except (OSError, ValueError):
        problem = "cannot be read"
    notes.append(f"{file.name} {problem}: {otherwise}.")
    return {}


def _listed(arguments: dict, name: str) -> list[str]:
    found = arguments.get(name)
    return [str(item) for item in (found if isinstance(found, list) else [found] if found else [])]


def _data_reports(datasets: Iterable[str]) -> Iterator[DataReport]:
    """Reports beside the files of `--dataset`; `pairs.jsonl#500` is `pairs.jsonl`, and hub names have none."""
    for spec in dict.fromkeys(re.sub(r"#\d+$", "", spec) for spec in datasets):
        file = Path(spec)
        text = file.with_name(f"{file.stem}.report.md") if file.name else file
        try:
            if file.name and text.is_file():
                told = text.read_bytes()[:_LARGEST_REPORT].decode("utf-8", errors="replace")
                # The picture is shown below the text, so the line that links to it says nothing here.
                told = re.sub(r"\n*!\[[^\]]*\]\([^)]*\)\s*$", "\n", told)
                yield DataReport(masked(str(file)), masked(told), _picture(text.with_suffix(".png")))
        except OSError:
            continue


def _picture(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > _LARGEST_PICTURE:
        return ""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
