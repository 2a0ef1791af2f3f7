"""What `bvpo pairs` refuses, with nothing written; and what it goes on without."""

from __future__ import annotations

import json
import re

import pytest

from megatron_bvpo.sampling.samples import Judgement, Sample
from tests.unit.pairs_runs import folder_of, pairs_command, small
from tests.unit.sample_folders import answered, ask, write_folder


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    return pairs_command(tmp_path, monkeypatch, capsys)


UNJUDGED = {"judge": None}
BAD = {
    "no folder": (lambda p: None, ["s"], "s: no such folder; name a folder that bvpo sample filled"),
    "no samples' folder": (lambda p: (p / "s").mkdir(), ["s"], "s: no judge has judged these samples"),
    "not judged": (lambda p: small(p / "s", **UNJUDGED), ["s"], "s: no judge has judged these samples; bvpo judge s"),
    "another judge": (
        lambda p: small(p / "s"),
        ["s", "--judge", "exact"],
        "s: --judge: judge 'exact' has not judged this folder; there: math",
    ),
    "two judges": (
        lambda p: (small(p / "s"), small(p / "s", judge="exact")),
        ["s"],
        "--judge: which judge is meant[?] s: exact, math",
    ),
    "a judge that reads nothing": (
        lambda p: folder_of(p, answered("q1", 0, True, parsed=None), answered("q1", 1, False, parsed=None)),
        ["s"],
        "s: judge 'math' reads no answer out of any text",
    ),
    "a reward": (
        lambda p: write_folder(
            p / "s", [ask("q1")], [answered("q1", 0, True)[0]], [Judgement("q1", "thinking", 0, 3.0)]
        ),
        ["s"],
        "s: judge 'math' says of no sample whether it is right; take --policy best_worst",
    ),
    "no scores": (
        lambda p: folder_of(p, (answered("q1", 0, True)[0], Judgement("q1", "thinking", 0, None, True, "4"))),
        ["s", "--policy", "best_worst"],
        "s: --policy: judge 'math' gives no scores",
    ),
    "no log-probabilities": (
        lambda p: small(p / "s"),
        ["s", "--rejected", "likely"],
        "s: --rejected: no sample has a log-probability",
    ),
    "no samples yet": (
        lambda p: write_folder(p / "s", [ask("q1")], [], []),
        ["s"],
        "s: no samples yet; bvpo sample goes on where it was stopped",
    ),
    "all right": (
        lambda p: folder_of(p, answered("q1", 0, True), answered("q1", 1, True)),
        ["s"],
        r"s: no pair at all \(thinking: 1 all right\)",
    ),
    "a damaged shard": (
        lambda p: (small(p / "s") / "samples" / "000.parquet").write_bytes(b"PAR1"),
        ["s"],
        "s/samples/000.parquet: cannot be read",
    ),
    "twice": (lambda p: small(p / "s"), ["a=s", "b=s"], "s: the folder is given twice"),
    "one name": (
        lambda p: (small(p / "a" / "s"), small(p / "b" / "s")),
        ["a/s", "b/s"],
        "a/s: two folders are called 's'; give each a name of its own: NAME=a/s",
    ),
    "a report that cannot be made": (
        lambda p: small(p / "s"),
        ["s", "--report", "/proc/nowhere"],
        "/proc/nowhere: --report: cannot be made: No such file",
    ),
    "a report in a file": (
        lambda p: (small(p / "s"), (p / "r").write_text("x")),
        ["s", "--report", "r"],
        "r: --report: is no folder",
    ),
    "a table": (lambda p: small(p / "s"), ["s", "--heldout", ".5", "--heldout_out", "h.parquet"], "h.parquet: "),
    "too many to hold out": (lambda p: small(p / "s"), ["s", "--heldout", "7"], "--heldout: 7 prompts are to be held"),
    "nothing held out": (lambda p: small(p / "s"), ["s", "--heldout_out", "h.jsonl"], "--heldout_out: nothing is held"),
    "no pairs": (lambda p: small(p / "s"), ["s", "--max_pairs_per_prompt", "0"], "--max_pairs_per_prompt: is 0"),
    "a margin below 0": (lambda p: small(p / "s"), ["s", "--margin=-1"], "--margin: is -1.0; expected 0 or more"),
    "likely best": (
        lambda p: small(p / "s"),
        ["s", "--policy", "best_worst", "--rejected", "likely"],
        "--rejected: best_worst always rejects the lowest score",
    ),
    "no evaluation file": (lambda p: small(p / "s"), ["s", "--exclude", "b.txt"], "b.txt: --exclude: no such file"),
    "an evaluation file of another kind": (
        lambda p: (small(p / "s"), (p / "b.pdf").write_bytes(b"x")),
        ["s", "--exclude", "b.pdf"],
        "b.pdf: --exclude: expected one of .jsonl",
    ),
    "a broken evaluation file": (
        lambda p: (small(p / "s"), (p / "b.json").write_text('[{"question": ')),
        ["s", "--exclude", "b.json"],
        "b.json:1: broken JSON",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_once_and_nothing_is_written(case, make, tmp_path):
    prepare, argv, told = BAD[case]
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, said, err = make(*argv)
    assert code == 2 and not said and len(err.splitlines()) == 1
    assert re.match(f"megatron-bvpo: error: {told}", err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_there_is_not_lost(make, tmp_path):
    small(tmp_path / "s")
    (tmp_path / "pairs.jsonl").write_text('"mine"\n')
    code, rows, _, err = make("s")
    assert code == 2 and "pairs.jsonl: --out: is there already; add --overwrite" in err
    assert rows["pairs.jsonl"] == ["mine"]
    assert make("s", "--overwrite")[0] == 0
    before = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "s" / "judgements" / "math" / "000.parquet").write_bytes(b"PAR1")
    assert make("s", "--overwrite")[0] == 2 and (tmp_path / "pairs.jsonl").read_bytes() == before


def test_without_matplotlib_the_words_still_come(make, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    small(tmp_path / "s")
    code, rows, said, _ = make("s", picture=True)
    assert code == 0 and rows["pairs.jsonl"] and "No picture: matplotlib is missing" in said
    assert not (tmp_path / "pairs.report.png").exists()


def test_a_damaged_character_loses_its_sample_alone(make, tmp_path):
    folder = small(tmp_path / "s")
    (folder / "journal").mkdir()
    bad = Sample("q1", "thinking", 9, "<think>\nA \ud800.\n</think>\n\n4", 9)
    (folder / "journal" / "1.jsonl").write_text(json.dumps(bad._asdict()) + "\n")
    code, rows, said, _ = make("s")
    assert code == 0 and len(rows["pairs.jsonl"]) == 2 and "1 a character that is none" in said
