"""`bvpo compare`: what it prints and writes, and what it says of folders that are no evaluations."""

import json
import re
from dataclasses import asdict, replace

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.evaluation.compare_command import names
from megatron_bvpo.evaluation.scores_file import Missing, Score, Scores, table


def scores(right: int, of: int = 200, dataset: str = "math_500", metric: str = "acc", **settings) -> Scores:
    by_question = {f"q{i}": [float(i < right), 1.0] for i in range(of)}
    common = dict(metric=metric, repeats=2, tokens=812.4, cut_off=0.015, failed=0, by_question=by_question)
    modes = [("thinking", 0.0, None), ("empty", 0.25, 0.02)]
    both = [
        Score.of(dataset=dataset, title="MATH-500", mode=mode, unparsed=unparsed, thinks=thinks, **common)
        for mode, unparsed, thinks in modes
    ]
    return Scores("m", "math", {"max_tokens": 100, **settings}, both, [Missing("aime24", None, "no hub")])


@pytest.fixture
def runs(tmp_path):
    for name, right in (("before", 100), ("after", 140)):
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        scores_file.write(folder, scores(right))
    return tmp_path


def test_what_is_written_is_read(runs):
    assert scores_file.read(runs / "after" / "eval") == scores(140)
    assert scores_file.read(runs / "after" / "eval" / "scores.json") == scores(140)


def test_table():
    head, thinking, empty = table(scores(100).scores)
    assert head.split() == "dataset mode score 95 % interval n repeats tokens cut off unparsed thinks".split()
    assert thinking.split() == "MATH-500 thinking 75.0 71.4 to 78.3 200 2 812 1.5 % 0.0 % -".split()
    assert empty.split()[-4:] == ["25.0", "%", "2.0", "%"]


def test_sentences_and_numbers(runs, capsys):
    out = runs / "numbers.json"
    assert bvpo(["compare", str(runs / "before/eval"), str(runs / "after/eval"), "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("after beats before by 10.0 ± 2.8 on MATH-500 with thinking (200 questions, p < .001")
    assert "without thinking" in lines[1] and "corrected for 2 comparisons" in lines[1]
    rows = json.loads(out.read_text())
    assert [row["better"] for row in rows] == ["after", "after"]
    assert rows[0]["difference"] == pytest.approx(0.1) and rows[0]["sentence"] == lines[0]


def test_other_settings_and_what_is_missing_are_noted(runs, capsys):
    changed = replace(scores(140, max_tokens=200), scores=scores(140).scores[:1])
    scores_file.write(runs / "after/eval", changed)
    assert bvpo(["compare", f"A={runs}/before/eval", f"B={runs}/after/eval"]) == 0
    out = capsys.readouterr().out
    assert "note: A and B were asked differently: max_tokens 100 against 200" in out
    assert "note: B has no MATH-500 without thinking" in out


def test_another_judge_is_noted(runs, capsys):
    def judged(right: int, rubric: str) -> Scores:
        found = scores(right)
        return replace(found, scores=[replace(score, judge={"rubric": rubric}) for score in found.scores])

    scores_file.write(runs / "before/eval", judged(100, "a1"))
    scores_file.write(runs / "after/eval", judged(140, "b2"))
    assert bvpo(["compare", str(runs / "before/eval"), str(runs / "after/eval")]) == 0
    note = "note: before and after on MATH-500 with thinking: judged differently: rubric 'a1' against 'b2'"
    assert note in capsys.readouterr().out


def test_names(tmp_path):
    paths = [f"{tmp_path}/{run}/eval" for run in ("x/run1", "y/run1", "run2")]
    assert list(names(paths)) == ["x/run1", "y/run1", "run2"]
    assert list(names([f"{tmp_path}/a/eval/scores.json", f"{tmp_path}/b/eval"])) == ["a", "b"]
    assert list(names(["A=somewhere", "b/eval", "c/scores"])) == ["A", "eval", "scores"]


BAD = {
    "one evaluation": (["before/eval"], "two or more evaluations"),
    "twice the same": (["before/eval", "before/../before/eval"], "are the same folder"),
    "no such folder": (["before/eval", "nowhere"], "nowhere: does not exist"),
    "an evaluation that has not ended": (["before/eval", "before"], "no scores.json"),
    "no name": (["before/eval", "=after/eval"], "expected NAME=DIR"),
    "twice the same name": (["A=before/eval", "A=after/eval"], "two evaluations are named 'A'"),
    "an unknown baseline": (["before/eval", "after/eval", "--baseline", "C"], "'C' is none of before, after"),
    "no size": (["before/eval", "after/eval", "--size", "0"], "--size: must be above 0"),
    "no JSON": (["before/eval", "broken.json"], "broken.json: cannot be read"),
    "another file": (["before/eval", "other.json"], "is no file of scores"),
    "another version": (["before/eval", "version.json"], "has version 9, expected 1"),
    "a damaged file": (["before/eval", "damaged.json"], "damaged.json: is damaged"),
    "a score that is no number": (["before/eval", "texts.json"], "is damaged: .*score of math_500 is '75'"),
    "a judge that is none": (["before/eval", "judge.json"], "is damaged: .*judge of math_500 is 'x'"),
    "a mode that is none": (["before/eval", "mode.json"], "is damaged: .*mode is 3"),
    "nothing in common": (["before/eval", "aime.json"], "no dataset and mode with common questions"),
    "numbers over scores": (
        ["before/eval", "after/eval", "--json", "after/eval/scores.json"],
        "--json: an evaluation is named so",
    ),
    "no place for the numbers": (
        ["before/eval", "after/eval", "--json", "nowhere/x.json"],
        "--json: cannot be written",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    whole = {"version": 1, **asdict(scores(100))}
    files = {
        "other": [1],
        "version": whole | {"version": 9},
        "damaged": whole | {"scores": [whole["scores"][0] | {"by_question": {"q1": ["right"]}}]},
        "texts": whole | {"scores": [whole["scores"][0] | {"score": "75"}]},
        "judge": whole | {"scores": [whole["scores"][0] | {"judge": "x"}]},
        "mode": whole | {"scores": [whole["scores"][0] | {"mode": 3}]},
        "aime": {"version": 1, **asdict(scores(9, dataset="aime24"))},
    }
    for name, content in files.items():
        (runs / f"{name}.json").write_text(json.dumps(content))
    (runs / "broken.json").write_text('{"version": 1')
    argv, message = BAD[case]
    assert bvpo(["compare", *argv]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert re.search(message, line)


def test_another_metric_is_not_compared(runs, capsys):
    scores_file.write(runs / "after/eval", scores(140, metric="win_rate"))
    assert bvpo(["compare", str(runs / "before/eval"), str(runs / "after/eval")]) == 2
    assert "not compared, acc against win_rate" in capsys.readouterr().out
