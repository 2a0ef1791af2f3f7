"""Rounds and sweeps that something is wrong with: told in a line with file, line and key, before anything starts.

The tables are files that once ended in a stack trace, were accepted and failed hours later, or had poor words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cli import bvpo
from tests.unit.test_rounds import ROUNDS
from tests.unit.test_rounds import RUN as ROUNDS_RUN
from tests.unit.test_sweep import EVALUATE, SWEEP
from tests.unit.test_sweep import RUN as SWEEP_RUN


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"messages": []}\n' * 10)
    Path("b.jsonl").write_text('{"messages": []}\n' * 5)
    Path("q.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    Path("suite.yaml").write_text("datasets: [{file: q.jsonl, judge: exact}]\n")
    Path("gone.yaml").write_text("datasets: [{file: gone.jsonl, judge: exact}]\n")
    Path("a-file").touch()
    for number in (1, 2):
        Path(f"prompts-{number}.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    for folder in ("base", "empty"):
        Path(folder).mkdir()


def written(kind: str, changes: dict) -> str:
    """A file with changes: `a.b`: value; None takes a key away."""
    values, run = (SWEEP, SWEEP_RUN) if kind == "sweep" else (ROUNDS, ROUNDS_RUN)
    values = json.loads(json.dumps(values))
    for key, value in changes.items():
        *above, last = key.split(".")
        place = run if above[:1] == ["RUN"] else values
        run = run | {last: value} if place is run else run
        if place is values:
            for name in above:
                place = place.setdefault(name, {})
            place[last] = value
            if value is None:
                del place[last]
    Path("run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    Path(f"{kind}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return f"{kind}.yaml"


def told(kind: str, changes: dict, capsys, *words: str) -> tuple[str, str]:
    """(the line of the file that is named, what is said of it)."""
    file = written(kind, changes)
    out = [] if {"out", "--out"} & {*changes, *words} else ["--out", "made"]
    assert bvpo([kind, file, "--dry-run", *out, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-bvpo: error: ") and said.count("\n") == 1, said
    named, line, rest = said.removeprefix("megatron-bvpo: error: ").split(":", 2)
    return Path(named).read_text().splitlines()[int(line) - 1].strip(" -"), rest.strip()


ENGINE = {"max_num_seqs": 8}
SWEEPS = [
    # stack traces
    ({"train.lora_rank": "abc", "evaluate": EVALUATE}, "lora_rank: abc", "train.lora_rank: is 'abc'; expected a whole"),
    ({"out": 3}, "out: 3", "out: is 3; expected a name or a folder"),
    ({"out": ["x"]}, "out:", "out: is ['x']; expected a name or a folder"),
    ({"train.num_train_epochs": "x"}, "num_train_epochs: x", "train.num_train_epochs: is 'x'; expected a whole number"),
    ({"train.train_iters": "x"}, "train_iters: x", "train.train_iters: is 'x'; expected a whole number"),
    ({"train.split_dataset_ratio": "z"}, "split_dataset_ratio: z", "train.split_dataset_ratio: is 'z'; expected a"),
    ({"train.slurm": {"nodes": "four"}}, "nodes: four", "train.slurm.nodes: is 'four'; expected how many, such as 4"),
    ({"slurm": {"nodes": 0}, "train.slurm": {"qos": "x"}}, "nodes: 0", "slurm.nodes: is 0; expected how many"),
    ({"train.slurm": {"gpus_per_node": "x"}}, "gpus_per_node: x", "train.slurm.gpus_per_node: is 'x'; expected how"),
    # accepted
    ({"train.lr": "fast"}, "lr: fast", "train.lr: is 'fast'; expected a number"),
    ({"train.lr": [1e-5, 2e-5]}, "lr:", "train.lr: is [1e-05, 2e-05]; expected a number"),
    ({"grid.lr": [1e-5, "fast"]}, "lr:", "grid.lr: is 'fast'; expected a number"),
    ({"runs": [{"rows": "DS1", "lr": -1}]}, "lr: -1", "runs.0.lr: is -1.0; expected a number in [0, inf)"),
    ({"RUN.lr": "fast", "grid.lr": None}, "lr: fast", "lr: is 'fast'; expected a number"),
    ({"RUN.num_train_epochs": None}, "num_train_epochs: null", "num_train_epochs: is missing, and so is train_iters"),
    ({"train.tuner_type": "loras"}, "tuner_type: loras", "train.tuner_type: is 'loras'; expected one of lora, full"),
    ({"train.model": ["x"]}, "model:", "train.model: is ['x']; expected one value"),
    ({"train.target_modules": {"a": 1}}, "target_modules:", "train.target_modules: is {'a': 1}; expected a value"),
    ({"train.val_dataset": "gone.jsonl"}, "val_dataset: gone.jsonl", "train.val_dataset: gone.jsonl: no such file"),
    ({"train.bvpo_alpha": 7}, "bvpo_alpha: 7", "train.bvpo_alpha: alpha is '7'; expected a number in [0, 1], or auto"),
    ({"train.slurm": {"nodes": 1, "gpus_per_node": 8}}, "global_batch_size: 4", "global batch 4 is not a multiple of"),
    ({"reference_cache": "a-file"}, "reference_cache: a-file", "a-file is no folder; name another one, or write false"),
    ({"out": "a-file/x"}, "out: a-file/x", "a-file, which is no folder; name another one"),
    ({"rows.D": []}, "D: []", "rows.D: names no file; write [a.jsonl, b.jsonl#2000]"),
    ({"rows.D": ["a.jsonl#0"]}, "D:", "rows.D: takes 0 rows of a.jsonl"),
    ({"rows.D": ["empty"]}, "D:", "rows.D: empty: the folder is empty"),
    ({"runs": 0}, "runs: 0", "runs: is no list"),
    ({"train.run": 5}, "run: 5", "train.run: is 5; expected a file"),
    ({"evaluate": {**EVALUATE, "job": 5}}, "job: 5", "evaluate.job: is 5; expected a file"),
    ({"evaluate": {**EVALUATE, "job": "no.yaml"}}, "job: no.yaml", "evaluate.job: no.yaml: cannot be read"),
    ({"evaluate": {**EVALUATE, "suite": "maths"}}, "suite: maths", "no suite 'maths', and no file; there are math,"),
    ({"evaluate": {**EVALUATE, "suite": "gone.yaml"}}, "suite: gone.yaml", "gone: there is no gone.jsonl"),
    ({"evaluate": {**EVALUATE, "max_tokens": 0}}, "max_tokens: 0", "evaluate.max_tokens: must be 1 or more, found 0"),
    ({"evaluate": {**EVALUATE, "engine": {"max_num_seqs": "x"}}}, "max_num_seqs: x", "engine.max_num_seqs: is 'x'"),
    # words
    ({"train.lora_rank": 600, "evaluate": EVALUATE}, "evaluate:", "evaluate.merge: DS1_lr-1e-05: vLLM takes"),
    ({"train.lora_rank": 600, "evaluate": EVALUATE}, "evaluate:", "and this is one of 600; write `merge: true`"),
    ({"runs": [{"name": "x" * 101, "rows": "DS1"}]}, f"name: {'x' * 101}", "has 101 characters, and 100 are the most"),
]  # fmt: skip
MANY = {"sample.prompts": ["prompts-{round}.jsonl", "a.jsonl"], "pairs.heldout": 20}
BOTH_WORST = {"pairs.policy": "best_worst", "pairs.rejected": "likely"}
ROUNDS_FILES = [
    # stack traces
    ({"out": 3}, "out: 3", "out: is 3; expected a name or a folder"),
    ({"train.slurm": {"nodes": [1]}}, "nodes:", "train.slurm.nodes: is [1]; expected one value"),
    ({"sample.slurm": {"nodes": "four"}}, "nodes: four", "sample.slurm.nodes: is 'four'; expected how many"),
    ({"judge.name": "a/b"}, "name: a/b", "judge.name: 'a/b' cannot name a judge"),
    ({"sample.seed": [1]}, "seed:", "sample.seed: is [1]; expected one value"),
    # accepted
    ({"judge.with": "nosuchjudge"}, "with: nosuchjudge", "judge.with: no judge 'nosuchjudge'; there are math, exact,"),
    ({"judge.with": "reward:node1"}, "with: reward:node1", "expected an address such as reward:http://host:8000"),
    ({"judge.with": "no.such:score"}, "with: no.such:score", "judge.with: no.such:score: there is no module no.such"),
    ({"judge.concurrency": 0}, "concurrency: 0", "judge.concurrency: must be 1 or more, found 0"),
    ({"sample.judge": "nosuch"}, "judge: nosuch", "sample.judge: no judge 'nosuch'"),
    ({"sample.judge": "exact", "sample.judge_workers": -1}, "judge_workers: -1", "must be 0 or more, found -1"),
    ({"pairs.heldout": 1.5}, "heldout: 1.5", "pairs.heldout: expected a share between 0 and 1, or a number of prompts"),
    ({"pairs.heldout": "x"}, "heldout: x", "pairs.heldout: expected a share between 0 and 1, or a number of prompts"),
    (MANY, "heldout: 20", "pairs.heldout: is 20 of the prompts that have a pair"),
    (BOTH_WORST, "rejected: likely", "pairs.rejected: best_worst always rejects the lowest score"),
    ({"pairs.margin": -1}, "margin: -1", "pairs.margin: is -1.0; expected 0 or more"),
    ({"evaluate.suite": "maths"}, "suite: maths", "evaluate.suite: no suite 'maths', and no file; there are math,"),
    ({"evaluate.data": "x"}, "data: x", "evaluate.data: expected NAME=PATH, found 'x'"),
    ({"train.lr": "fast"}, "lr: fast", "train.lr: is 'fast'; expected a number"),
    ({"train.bvpo_alpha": 7}, "bvpo_alpha: 7", "train.bvpo_alpha: alpha is '7'; expected a number in [0, 1], or auto"),
    ({"RUN.lora_rank": "abc"}, "lora_rank: abc", "lora_rank: is 'abc'; expected a whole number"),
    ({"train.ranks": 3}, "train:", "train.global_batch_size: global batch 16 is not a multiple of"),
    ({"train.run": 5}, "run: 5", "train.run: is 5; expected a file"),
    ({"sample.job": "no.yaml"}, "job: no.yaml", "sample.job: no.yaml: cannot be read"),
    ({"sample.prompts": {"a": 1}}, "prompts:", "sample.prompts: is {'a': 1}; expected files"),
    ({"sample.prompts": []}, "prompts: []", "sample.prompts: is []; expected files"),
    ({"sample.top_p": 3}, "top_p: 3", "sample.top_p: must be above 0 and at most 1"),
    ({"sample.extra_body": "{"}, "extra_body: '{'", "sample.extra_body: no JSON"),
    ({"sample.engine.tensor_parallel_size": "x"}, "tensor_parallel_size: x", "sample.engine.tensor_parallel_size: is"),
    ({"out": "a-file"}, "out: a-file", "out: a-file is no folder; name another one"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "at", "said"), SWEEPS)
def test_a_sweep(changes, at, said, capsys):
    line, rest = told("sweep", changes, capsys)
    assert said in rest and line == at


@pytest.mark.parametrize(("changes", "at", "said"), ROUNDS_FILES)
def test_rounds(changes, at, said, capsys):
    line, rest = told("rounds", changes, capsys)
    assert said in rest and line == at


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"judge.with": "llm:http://x", "judge.rubric": "gone.txt"}, "rubric: gone.txt"),
        ({"sample.tokenizer": "gone"}, "tokenizer: gone"),
        ({"pairs.exclude": ["q.jsonl", "gone.jsonl"]}, "exclude:"),
        ({"evaluate.tokenizer": "gone"}, "tokenizer: gone"),
    ],
)
def test_what_is_not_there_at_the_start(changes, at, capsys):
    assert bvpo(["rounds", written("rounds", changes), "--out", "made"]) == 2
    _, line, rest = capsys.readouterr().err.removeprefix("megatron-bvpo: error: ").split(":", 2)
    assert Path("rounds.yaml").read_text().splitlines()[int(line) - 1].strip() == at and "there is no gone" in rest
    assert not Path("made").exists()


def test_another_chain_s_folder_is_no_place(capsys):
    Path("old").mkdir()
    Path("old/chain.json").touch()
    for kind in ("rounds", "sweep"):
        line, rest = told(kind, {"out": "old/new"}, capsys)
        assert line == "out: old/new" and "which is another sweep's or rounds' folder" in rest


@pytest.mark.parametrize(
    "changes",
    [
        {"judge.name": 5},  # a name of digits
        {"judge.with": "mine:score"},  # of the current folder, where judges look
        {"train.lora_rank": "16", "train.lr": "1e-5", "pairs.heldout": 0.1},
        {"sample.prompts": "a.jsonl", "pairs.heldout": 0.1},  # the same prompts again: a share
        {"sample.prompts": "a.jsonl", "pairs.heldout": 20, "rounds": 1},
        {"train.slurm": {"nodes": "2-4", "gpus-per-node": "h100:8"}},
    ],
)
def test_what_is_right_stays_right(changes, monkeypatch, capsys):
    Path("mine.py").write_text("def score(text): return 1\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    assert bvpo(["rounds", written("rounds", changes), "--dry-run", "--out", "made"]) == 0, capsys.readouterr().err


def test_a_list_within_itself():
    from megatron_bvpo.workflow.yaml_lines import key_lines

    Path("odd.yaml").write_text("a: &a [1, *a]\nb: 2\n")
    assert key_lines("odd.yaml") == {"a": 1, "a.0": 1, "a.1": 1, "b": 2}
