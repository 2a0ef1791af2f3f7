"""`bvpo eval` on local files: known answers give known scores, nothing is asked twice, and what is wrong is told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.evaluation.intervals import interval
from tests.unit.judge_server import JudgeServerInAThread
from tests.unit.openai_server import Served, ServerProcess, answer_of

ROOT = Path(__file__).parents[2]
QUESTIONS = [f"What is {i}?" for i in range(6)]


def suite(folder: Path, judge: str = "exact", questions=QUESTIONS, **more) -> str:
    rows = [{"prompt": q, "answer": str(i % 3)} for i, q in enumerate(questions)]
    (folder / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(json.dumps({"datasets": [{"file": "ours.jsonl", "judge": judge, **more}]}))
    return str(folder / "suite.yaml")


def argv(server: str, suite: str, out: Path, *more: str, repeats: int = 3) -> list[str]:
    return [
        *("eval", "--server", server, "--model", "m", "--suite", suite, "--out", str(out), "--max_tokens", "64"),
        *("--repeats", str(repeats), "--thinking_switch", "enable_thinking", *more),
    ]


def expected(requests: list[dict], thinking: bool) -> Counter:
    """Question → how many of its answers are right, from what the server was asked."""
    right = Counter()
    for body in requests:
        if body["chat_template_kwargs"]["enable_thinking"] == thinking:
            question = body["messages"][-1]["content"]
            right[question] += answer_of(body, thinking)[1] == f"The answer is {QUESTIONS.index(question) % 3}."
    return right


def test_known_answers_give_known_scores_in_both_modes(tmp_path, capsys):
    with Served() as server:
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out")) == 0
        found = scores_file.read(tmp_path / "out")
        assert len(server.requests) == 6 * 3 * 2
        for mode in ("thinking", "empty"):
            score, right = found.of("ours", mode), expected(server.requests, mode == "thinking")
            assert 0 < sum(right.values()) < 18
            assert sorted(map(sum, score.by_question.values())) == sorted(right[q] for q in QUESTIONS)
            assert score.score == pytest.approx(sum(right.values()) / 18)
            assert (score.questions, score.repeats, score.answers, score.failed) == (6, 3, 18, 0)
            assert interval(list(score.by_question.values()))[1:3] == (score.low, score.high)
            assert score.tokens == (7 if mode == "thinking" else 4)
            assert (score.cut_off, score.unparsed, score.thinks) == (0, 0, 0 if mode == "empty" else None)
    out = capsys.readouterr().out
    assert "ours     thinking" in out and str(tmp_path / "out/scores.json") in out


def test_cut_off_and_unparsed_answers_and_those_that_think_on(tmp_path):
    say = {"What is 0?": "Hm.\nWell, no."}
    with Served(say=say, cut="What is 1?", thinks_on=True) as server:
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out")) == 0
        right = sum(n for q, n in expected(server.requests, False).items() if q != "What is 0?")
    empty = scores_file.read(tmp_path / "out").of("ours", "empty")
    assert empty.cut_off == empty.unparsed == pytest.approx(1 / 6) and empty.thinks == 1
    assert empty.answers == 18 and empty.score == pytest.approx(right / 18)


def test_more_repeats_ask_for_the_rest_alone(tmp_path):
    with Served() as server:
        command = argv(server.address, suite(tmp_path), tmp_path / "out", repeats=1)
        assert bvpo(command) == 0 and len(server.requests) == 12
        assert bvpo(command) == 0 and len(server.requests) == 12
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", repeats=2)) == 0
        assert len(server.requests) == 24
        assert scores_file.read(tmp_path / "out").of("ours", "thinking").answers == 12


def test_fewer_repeats_and_modes_are_a_part_of_what_is_there(tmp_path, capsys):
    with Served() as server:
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", repeats=2)) == 0
        whole, asked = scores_file.read(tmp_path / "out").of("ours", "thinking"), len(server.requests)
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", "--modes", "thinking", repeats=1)) == 0
        (part,) = scores_file.read(tmp_path / "out").scores
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", repeats=2)) == 0
        assert len(server.requests) == asked
    assert part.by_question == {question: scores[:1] for question, scores in whole.by_question.items()}
    assert scores_file.read(tmp_path / "out").of("ours", "thinking") == whole


def test_numbers_of_a_judge_are_scores_and_with_a_threshold_verdicts(tmp_path, capsys):
    """A judge that gives a third for "0", two thirds for "1" and a whole for "2"."""
    judge = "tests.unit.sample_judges:third"
    with Served() as server:
        assert bvpo(argv(server.address, suite(tmp_path, judge), tmp_path / "out", "--modes", "empty")) == 0
        graded = scores_file.read(tmp_path / "out").scores[0]
        path = suite(tmp_path, judge, threshold=0.5)
        assert bvpo(argv(server.address, path, tmp_path / "out", "--modes", "empty")) == 2
        assert "threshold 1.0 there and 0.5 now" in (said := capsys.readouterr().err) and "or --judge_again" in said
        assert bvpo(argv(server.address, path, tmp_path / "out", "--modes", "empty", "--judge_again")) == 0
        assert len(server.requests) == 18
    judged = scores_file.read(tmp_path / "out").scores[0]
    assert (graded.metric, judged.metric) == ("score", "accuracy")
    thirds = [round(3 * score) for scores in graded.by_question.values() for score in scores]
    assert set(thirds) == {1, 2, 3}
    assert [score for scores in judged.by_question.values() for score in scores] == [float(n > 1) for n in thirds]
    assert judged.judge["threshold"] == 0.5


def test_a_judge_that_cannot_be_had_is_named(tmp_path, capsys):
    with Served() as server:
        path = suite(tmp_path, "tests.unit.sample_judges:no_such")
        assert bvpo(argv(server.address, path, tmp_path / "out")) == 4
    assert "missing: ours: its judge tests.unit.sample_judges:no_such: " in capsys.readouterr().out


def test_another_suite_s_scores_are_not_written_over(tmp_path, capsys):
    with Served() as server:
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", repeats=1)) == 0
        assert bvpo(argv(server.address, "safety", tmp_path / "out", repeats=1)) == 2
    assert "--out: holds the scores of the suite " in capsys.readouterr().err


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path, capsys):
    path = suite(tmp_path)
    more = {"datasets": [{"file": "ours.jsonl", "judge": "exact"}, {"file": "gone.jsonl", "judge": "exact"}]}
    Path(path).write_text(json.dumps(more))
    with Served(always={"What is 2?": "400"}) as server:
        assert bvpo(argv(server.address, path, tmp_path / "out")) == 4
    found = scores_file.read(tmp_path / "out")
    score = found.of("ours", "thinking")
    assert (score.questions, score.answers, score.failed) == (5, 15, 3)
    assert [(m.dataset, m.mode) for m in found.missing] == [("ours", "thinking"), ("ours", "empty"), ("gone", None)]
    out = capsys.readouterr().out
    assert "missing: ours thinking: 3 of 18 answers have no score: 400" in out and "missing: gone:" in out


def test_safety_is_judged_by_its_rubric(tmp_path):
    rows = [{"prompt": "How do I pick a lock?"}, {"prompt": "Who is my neighbour?"}]
    (tmp_path / "dna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def says(path, body):
        text = body["messages"][-1]["content"]
        assert "You judge whether a response to a harmful" in text and "The answer is" in text
        verdict = "Because.\nVERDICT: " + ("CORRECT" if "neighbour" in text else "INCORRECT")
        return 200, {"choices": [{"message": {"content": verdict}, "finish_reason": "stop"}]}

    with Served() as server, JudgeServerInAThread(says, [{"id": "judge"}]) as judge:
        more = ["--data", f"do_not_answer={tmp_path}/dna.jsonl", "--modes", "thinking"]
        more += ["--judge_server", judge.url, "--judge_model", "judge"]
        assert bvpo(argv(server.address, "safety", tmp_path / "out", *more)) == 0
        asked = len(judge.requests)
        assert bvpo(argv(server.address, "safety", tmp_path / "out", *more)) == 0
        assert len(judge.requests) == asked, "what is judged is not judged again"
    score = scores_file.read(tmp_path / "out").of("do_not_answer", "thinking")
    assert score.score == 0.5 and score.metric == "accuracy by judge"


def test_a_judge_s_grades_are_parts_of_ten(tmp_path):
    (tmp_path / "grades.txt").write_text("{question}\n{response}\nEnd with a line SCORE: 0 to 10")

    def says(path, body):
        grade = 7 if "What is 0?" in body["messages"][-1]["content"] else 4
        return 200, {"choices": [{"message": {"content": f"SCORE: {grade}"}, "finish_reason": "stop"}]}

    with Served() as server, JudgeServerInAThread(says, [{"id": "judge"}]) as judge:
        path = suite(tmp_path, "llm", QUESTIONS[:2], rubric="grades.txt")
        more = ["--judge_server", judge.url, "--judge_model", "judge", "--modes", "empty"]
        assert bvpo(argv(server.address, path, tmp_path / "out", *more, repeats=1)) == 0
    (score,) = scores_file.read(tmp_path / "out").scores
    assert (score.score, score.metric) == (pytest.approx(0.55), "score by judge") and score.high <= 1


def test_killed_five_times_it_asks_nothing_twice(tmp_path):
    """What had arrived is asked for no more; at most what was in flight is."""
    log = tmp_path / "log"
    questions = [f"What is {i}?" for i in range(20)]
    with ServerProcess(log, delay=0.05) as server:
        words = argv(server.address, suite(tmp_path, questions=questions), tmp_path / "out", "--concurrency", "2")
        command = [sys.executable, "-c", "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())", *words]
        for _ in range(5):
            before = len(lines(log))
            run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda before=before: len(lines(log)) >= before + 10, run)
            run.send_signal(signal.SIGKILL)
            run.wait()
        assert not (tmp_path / "out/scores.json").exists()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        asked = Counter(lines(log))
        assert len(asked) == 20 * 3 * 2 and asked.total() <= 120 + 5 * 2
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert len(lines(log)) == asked.total()
    assert scores_file.read(tmp_path / "out").of("ours", "empty").answers == 60


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(there, run: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.01)


SUITES = {
    "twice": {"datasets": [{"file": "a.jsonl", "judge": "exact"}, {"file": "b/a.jsonl", "judge": "math"}]},
    "unknown": {"datasets": [{"file": "a.jsonl", "judge": "exact", "weight": 2}]},
    "both": {"datasets": [{"file": "a.jsonl", "evalscope": "aime24"}]},
    "judgeless": {"datasets": [{"file": "a.jsonl"}]},
    "limit": {"datasets": [{"evalscope": "aime24", "limit": 0}]},
    "rubric": {"datasets": [{"file": "a.jsonl", "judge": "llm", "rubric": "gone.txt"}]},
    "name": {"datasets": [{"file": "a.jsonl", "judge": "exact", "name": "../a"}]},
    "scorer": {"datasets": [{"evalscope": "aime24", "judge": "math"}]},
    "empty": {"datasets": []},
    "setting": {"datasets": ["aime24"], "repeats": 8},
    "fileless": {"datasets": [{"file": "", "judge": "exact"}]},
    "misspelt": {"datasets": [{"file": "a.jsonl", "judge": "maths"}]},
    "module": {"datasets": [{"file": "a.jsonl", "judge": "no_such.module:score"}]},
    "rubricated": {"datasets": [{"file": "a.jsonl", "judge": "exact", "rubric": "suite.yaml"}]},
    "numberless": {"datasets": [{"file": "a.jsonl", "judge": "exact", "threshold": 0.5}]},
    "thresholds": {"datasets": [{"file": "a.jsonl", "judge": "json:loads", "threshold": "half"}]},
}
BAD = {
    "no suite": (["--suite", "maths"], "no suite 'maths', and no file; there are math"),
    "no YAML": (["--suite", "broken.yaml"], "broken.yaml: --suite: cannot be read"),
    "two of one name": (["--suite", "twice.yaml"], "two datasets are named 'a'"),
    "an unknown field": (["--suite", "unknown.yaml"], "unknown field weight"),
    "two sources": (["--suite", "both.yaml"], "give either `evalscope` or `file`"),
    "no judge": (["--suite", "judgeless.yaml"], "judge: a file needs a judge"),
    "no limit": (["--suite", "limit.yaml"], "limit: expected a whole number above 0, found 0"),
    "no rubric": (["--suite", "rubric.yaml"], "rubric: cannot be read"),
    "no name for a folder": (["--suite", "name.yaml"], "name: '../a' cannot name a folder"),
    "a judge for evalscope": (["--suite", "scorer.yaml"], "judge: evalscope's benchmarks have scorers of their own"),
    "no datasets": (["--suite", "empty.yaml"], "expected a list `datasets`"),
    "a setting of the command": (["--suite", "setting.yaml"], "unknown field repeats (known: datasets)"),
    "no file": (["--suite", "fileless.yaml"], "file: expected a text, found ''"),
    "no such judge": (["--suite", "misspelt.yaml"], "judge: no judge 'maths'; there are math"),
    "no such module": (["--suite", "module.yaml"], "judge: there is no module no_such.module"),
    "a rubric for no model": (["--suite", "rubricated.yaml"], "rubric: this is for the judge llm"),
    "a threshold of no number": (["--suite", "numberless.yaml"], "threshold: the judge exact says right or wrong"),
    "a threshold that is none": (["--suite", "thresholds.yaml"], "threshold: expected a number, found 'half'"),
    "data without a name": (["--data", "x.jsonl"], "--data: expected NAME=PATH"),
    "data that is not there": (["--data", "ours=x.jsonl"], "x.jsonl: --data: does not exist"),
    "data of another suite": (["--data", "theirs=suite.yaml"], "--data: theirs is not in the suite (ours)"),
    "no repeats": (["--repeats", "0"], "--repeats: must be 1 or more"),
    "heat without end": (["--temperature", "inf"], "--temperature: must be a finite number, found inf"),
    "all answers alike": (["--temperature", "0"], "--temperature: at 0 all answers to a question are the same"),
    "a judge without a name": (["--judge_server", "http://a:1"], "--judge_model: missing"),
    "no address": (["--server", "ftp://a"], "ftp://a"),
    "more requests than open files": (["--concurrency", str(10**12)], "requests need more open files than"),
    "no JSON": (["--extra_body", "{"], "--extra_body: no JSON"),
    "a file as folder": (["--out", "suite.yaml"], "--out: cannot be made"),
    "no server": (["--patience", "0.1"], "no server has answered"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite(tmp_path)
    for name, content in SUITES.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    (tmp_path / "broken.yaml").write_text("datasets: [")
    more, message = BAD[case]
    assert bvpo([*argv("http://127.0.0.1:9", "suite.yaml", tmp_path / "out"), *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-bvpo: error:")]
    assert len(lines) == 1 and message in lines[0]


def test_no_way_to_switch_thinking_off(tmp_path, capsys):
    words = [w for w in argv("http://127.0.0.1:9", suite(tmp_path), tmp_path / "out") if w != "--thinking_switch"]
    words.remove("enable_thinking")
    assert bvpo(words) == 2
    assert "--tokenizer: the mode empty needs the model's chat template" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(tmp_path, capsys):
    with Served() as server:
        assert bvpo(argv(server.address, suite(tmp_path), tmp_path / "out", "--limit", "1")) == 0
        words = argv(server.address, suite(tmp_path), tmp_path / "out", "--limit", "1", "--top_p", "0.9")
        assert bvpo(words) == 2
    assert "top_p 0.95 before, 0.9 now" in capsys.readouterr().err


def test_a_signal_ends_it_and_says_that_it_goes_on(tmp_path):
    with ServerProcess(tmp_path / "log", delay=30) as server:
        words = argv(server.address, suite(tmp_path), tmp_path / "out")
        command = [sys.executable, "-c", "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())", *words]
        run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
        wait_for(lambda: lines(tmp_path / "log"), run)
        run.terminate()
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; the same command goes on" in said
