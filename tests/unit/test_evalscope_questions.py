"""evalscope's questions, prompts and scorers through `bvpo eval`: known answers give known scores.

Needs evalscope (extra `evalscope`), which launch/test.sh installs and the images of containers/ lack. The data are
local files of the benchmarks' own columns.
"""

import json
import os
from pathlib import Path

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.evaluation import scores_file
from tests.unit.judge_server import JudgeServerInAThread
from tests.unit.openai_server import Served, answer_of

pytest.importorskip("evalscope", reason="evalscope is not installed: pip install 'megatron-bvpo[eval]'")
os.environ["HF_HUB_OFFLINE"] = "1"

MATH = [
    {"problem": f"What is {i}?", "answer": str(i % 3), "level": i % 5 + 1, "unique_id": f"u{i}", "solution": "s"}
    for i in range(4)
]
AIME = [{"problem": f"Find {i}.", "answer": str(i % 3)} for i in range(3)]
ALPACA = [{"instruction": f"Say {i}", "output": f"Baseline {i}", "generator": "g", "dataset": "d"} for i in range(2)]


def write(folder: Path, datasets: dict[str, tuple[str, list[dict]]], subset: str = "default") -> str:
    """Local copies as a hub lays them out: README.md names subsets and splits."""
    for name, (split, rows) in datasets.items():
        (folder / name).mkdir()
        files = json.dumps([{"split": split, "path": f"{split}.jsonl"}])
        (folder / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {subset}\n  data_files: {files}\n---\n"
        )
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(json.dumps({"datasets": [{"evalscope": n, "path": n} for n in datasets]}))
    return str(folder / "suite.yaml")


def evaluate(server, suite: str, out: Path, *more: str) -> int:
    words = ["--server", server.address, "--model", "m", "--suite", suite, "--out", str(out), "--max_tokens", "64"]
    return bvpo(["eval", *words, "--repeats", "2", "--thinking_switch", "enable_thinking", *more])


def test_known_scores_repeats_cut_off_and_unparsed(tmp_path):
    suite = write(tmp_path, {"math_500": ("test", MATH), "aime24": ("test", AIME)})
    with Served(say={"What is 3?": "I do not know."}, cut="What is 2?") as server:
        assert evaluate(server, suite, tmp_path / "out") == 0
        asked = list(server.requests)
        assert evaluate(server, suite, tmp_path / "out") == 0
        assert len(server.requests) == len(asked) == (4 + 3) * 2 * 2
    found = scores_file.read(tmp_path / "out")
    for name, title, rows in (("math_500", "MATH-500", MATH), ("aime24", "AIME-2024", AIME)):
        for mode in ("thinking", "empty"):
            score = found.of(name, mode)
            right = sum(_right(body, rows, mode == "thinking") for body in asked)
            assert (score.title, score.metric, score.questions, score.repeats) == (title, "accuracy", len(rows), 2)
            assert score.score == pytest.approx(right / len(rows) / 2)
            assert score.cut_off == score.unparsed == (0.25 if name == "math_500" else 0)
    # evalscope's own prompt.
    assert asked[0]["messages"][0]["content"].endswith("put your final answer within \\boxed{}.")


def _right(body: dict, rows: list[dict], thinking: bool) -> bool:
    if body["chat_template_kwargs"]["enable_thinking"] != thinking:
        return False
    row = next((row for row in rows if row["problem"] in body["messages"][-1]["content"]), None)
    return row is not None and row["problem"] != "What is 3?" and row["answer"] in answer_of(body, thinking)[1]


def test_what_is_judged_needs_a_judge_and_gets_its_verdict(tmp_path, capsys):
    suite = write(tmp_path, {"alpaca_eval": ("eval", ALPACA)}, subset="alpaca_eval_gpt4_baseline")

    def says(path, body):
        verdict = json.dumps({"verdict": "M" if "Say 1" in body["messages"][-1]["content"] else "m"})
        return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "judge",
                     "choices": [{"index": 0, "message": {"role": "assistant", "content": verdict},
                                  "finish_reason": "stop"}]}  # fmt: skip

    with Served() as server, JudgeServerInAThread(says, [{"id": "judge"}]) as judge:
        assert evaluate(server, suite, tmp_path / "out", "--modes", "empty") == 4
        assert "missing: alpaca_eval: it is judged by a model: give --judge_server" in capsys.readouterr().out
        more = ["--modes", "empty", "--judge_server", judge.url, "--judge_model", "judge"]
        assert evaluate(server, suite, tmp_path / "out", *more) == 0
        assert len(judge.requests) == 4
        assert evaluate(server, suite, tmp_path / "out", *more) == 0
        assert len(judge.requests) == 4
    score = scores_file.read(tmp_path / "out").of("alpaca_eval", "empty")
    assert (score.score, score.metric, score.answers) == (0.5, "win_rate by judge", 4)


def test_a_local_copy_is_read_from_where_it_is(tmp_path):
    """Not from the cache of another one whose folder has the same name."""
    asked = []
    for name, rows in (("a", AIME), ("b", [{"problem": "Find all.", "answer": "7"}])):
        (tmp_path / name).mkdir()
        suite = write(tmp_path / name, {"aime24": ("test", rows)})
        with Served() as server:
            assert evaluate(server, suite, tmp_path / name / "out", "--modes", "empty") == 0
            asked.append({body["messages"][-1]["content"] for body in server.requests})
    assert len(asked[0]) == 3 and len(asked[1]) == 1


def test_what_cannot_be_had_is_named(tmp_path, capsys):
    suite = write(tmp_path, {"math_500": ("test", MATH), "no_such": ("test", AIME), "aime24": ("other", AIME)})
    with Served() as server:
        assert evaluate(server, suite, tmp_path / "out", "--modes", "empty") == 4
    found = scores_file.read(tmp_path / "out")
    assert [m.dataset for m in found.missing] == ["no_such", "aime24"] and found.of("math_500", "empty")
    out = capsys.readouterr().out
    assert "missing: no_such: cannot be loaded" in out and "missing: aime24: cannot be loaded from" in out
