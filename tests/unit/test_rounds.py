"""A rounds file: the stages that it becomes, what each is given, and mistakes in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.rehearsal.loop_files import prepare
from megatron_bvpo.sampling.asking.job_file import read_line
from megatron_bvpo.workflow.chain import Outcome
from megatron_bvpo.workflow.records import State
from megatron_bvpo.workflow.rounds_command import verdict
from megatron_bvpo.workflow.rounds_file import read_rounds, require_files
from megatron_bvpo.workflow.rounds_stages import Policy, stages_of

ROOT = Path(__file__).resolve().parents[2]
RUN = {"tuner_type": "lora", "lora_rank": 12, "lr": 1e-5, "num_train_epochs": 1, "split_dataset_ratio": 0.02}
RUN |= {"dataset": "other.jsonl", "output_dir": "elsewhere", "max_length": 512}
ROUNDS = {
    "rounds": 2,
    "model": "base",
    "sample": {
        "prompts": "prompts-{round}.jsonl",
        "max_tokens": 100,
        "seed": 5,
        "samples": 4,
        "engine": {"max_num_seqs": 8},
    },
    "judge": {"with": "exact"},
    "pairs": {"heldout": 0.1},
    "train": {"run": "run.yaml", "ranks": 4, "train_iters": 7},
    "evaluate": {"suite": "suite.yaml", "max_tokens": 200, "engine": {"max_num_seqs": 16}},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rounds.yaml with changes (`a.b`: value, `a.b`: None takes it away), and returns its name."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        Path(f"prompts-{number}.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    Path("suite.yaml").write_text("datasets: [{file: q.jsonl, judge: exact}]\n")
    Path("q.jsonl").write_text("{}\n")
    Path("base").mkdir()

    def write(**changes) -> str:
        values = json.loads(json.dumps(ROUNDS))
        for key, value in changes.items():
            *above, last = key.split("__")
            place = values
            for name in above:
                place = place.setdefault(name, {})
            if value is None:
                place.pop(last)
            else:
                place[last] = value
        Path("rounds.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return "rounds.yaml"

    return write


def stages(file: str) -> dict:
    return {stage.name: stage for stage in stages_of(read_rounds(file, "out"))}


def settings(stage, name: str) -> dict:
    """Of a YAML file that the stage writes."""
    (text,) = (text for path, text in stage.files.items() if path.endswith(name))
    return yaml.safe_load(text)


def test_the_stages_and_what_waits_for_what(write):
    found = stages(write())
    assert {name: stage.after for name, stage in found.items()} == {
        "start/evaluate": (),
        "round-1/sample": (),
        "round-1/judge": ("round-1/sample",),
        "round-1/pairs": ("round-1/judge",),
        "round-1/train": ("round-1/pairs",),
        "round-1/export": ("round-1/train",),
        "round-1/evaluate": ("round-1/export",),
        "round-2/sample": ("round-1/export",),
        "round-2/judge": ("round-2/sample",),
        "round-2/pairs": ("round-2/judge",),
        "round-2/train": ("round-2/pairs", "round-1/export"),
        "round-2/export": ("round-2/train",),
        "round-2/evaluate": ("round-2/export",),
        "compare/2": ("start/evaluate", "round-1/evaluate", "round-2/evaluate"),
        "page/2": ("compare/2",),
    }
    # One machine has engine and training one after the other.
    assert {name for name, stage in found.items() if stage.cores == 4} == {
        name for name in found if name.endswith(("sample", "train", "evaluate"))
    }


def test_each_round_asks_the_policy_of_the_round_before(write, tmp_path):
    found, out = stages(write()), tmp_path / "out"
    for number, model in ((1, "start"), (2, "round-1")):
        stage = found[f"round-{number}/sample"]
        asked = settings(stage, "sample.yaml")
        assert asked == {
            "prompts": [f"prompts-{number}.jsonl"],
            "max_tokens": 100,
            "seed": 4 + number,
            "samples": 4,
            "tokenizer": "base",
            "out": str(out / f"round-{number}" / "samples"),
            "model": model,
            "engine": {"max_num_seqs": 8},
        }
        # The same words with the same file, as what starts the engine reads them.
        file = out / f"round-{number}" / "sample.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(stage.files[str(file)])
        line = read_line(list(stage.command[3:]))
        assert line.model == "base" and line.client == ["sample", str(file)]
        adapter = {} if number == 1 else {"enable_lora": True, "max_lora_rank": "16"}
        adapter |= {} if number == 1 else {"lora_modules": f"round-1={out}/round-1/model"}
        name = {"served_model_name": "start"} if number == 1 else {}
        assert line.engine == {"max_num_seqs": 8, **adapter, **name}


def test_a_merged_model_is_served_by_its_name(write, tmp_path):
    found = stages(write(export={"merge": True}))
    model = f"{tmp_path}/out/round-1/model"
    assert found["round-2/sample"].command[4:] == ("--engine.model", model, "--engine.served_model_name", "round-1")
    assert "--merge" in found["round-1/export"].command and found["round-1/export"].whole == model


@pytest.mark.parametrize("reference", ["start", "last"])
def test_the_second_round_trains_the_first_one_s_adapter(write, tmp_path, reference):
    found, out = stages(write(reference=reference)), tmp_path / "out"
    first, second = (settings(found[f"round-{n}/train"], "train.yaml") for n in (1, 2))
    expected = {
        **{key: RUN[key] for key in ("tuner_type", "lora_rank", "lr", "max_length")},  # epochs give way to train_iters
        "train_iters": 7,
        "model": "base",
        "dataset": str(out / "round-1" / "pairs.jsonl"),
        "val_dataset": str(out / "round-1" / "pairs_heldout.jsonl"),
        "output_dir": str(out / "round-1" / "run"),
    }
    assert first == expected
    adapter = str(out / "round-1" / "run" / "last-checkpoint")
    more = {"adapters": adapter} | ({"ref_adapters": adapter} if reference == "last" else {})
    assert second == {key: str(value).replace("round-1", "round-2") if "round-1" in str(value) else value
                      for key, value in expected.items()} | more  # fmt: skip


def test_an_evaluation_lies_where_the_page_looks_for_it(write, tmp_path):
    found, out = stages(write()), tmp_path / "out"
    words = found["round-2/evaluate"].command
    assert f"{out}/round-2/run/eval" in words and "round-2" in words and words[words.index("--") + 1] == "bvpo"
    assert settings(found["round-2/evaluate"], "evaluate.yaml")["engine"] == {"max_num_seqs": 16}
    assert found["compare/2"].command[2:5] == (
        f"start={out}/start/eval",
        f"round-1={out}/round-1/run/eval",
        f"round-2={out}/round-2/run/eval",
    )
    assert found["page/2"].command[2:5] == (f"{out}/start", f"{out}/round-1/run", f"{out}/round-2/run")


def test_without_evaluation_and_with_a_judge_in_the_sampling(write, tmp_path):
    found = stages(write(evaluate=None, judge=None, sample__judge="exact", rounds=1))
    assert list(found) == ["round-1/sample", "round-1/pairs", "round-1/train", "round-1/export", "page/1"]
    assert found["round-1/pairs"].after == ("round-1/sample",) and "--judge" not in found["round-1/pairs"].command
    assert found["page/1"].command[2] == f"{tmp_path}/out/round-1/run" and found["page/1"].after == ("round-1/train",)


def test_what_is_submitted(write):
    changes = {"slurm": {"partition": "gpu"}, "sample__slurm": {"nodes": 4, "gpus_per_node": 8, "exclusive": True}}
    found = stages(write(**changes, train__slurm={"nodes": 8}))
    sample, train = found["round-1/sample"], found["round-1/train"]
    assert sample.slurm.script == str(ROOT / "launch" / "sample.sbatch") and sample.command[0].endswith("sample.yaml")
    assert sample.slurm.flags == ("--partition", "gpu", "--nodes", "4", "--gpus-per-node", "8", "--exclusive")
    assert train.slurm.script == str(ROOT / "launch" / "slurm.sbatch") and train.slurm.flags[-2:] == ("--nodes", "8")
    assert found["round-1/evaluate"].slurm is None and train.env == {}


def test_a_round_more_leaves_the_others_as_they_were(write, tmp_path):
    """So that a folder of two rounds goes on to a third one."""
    two, three = stages(write()), stages(write(rounds=3))
    assert [name for name in three if name not in two] == [
        *(f"round-3/{kind}" for kind in ("sample", "judge", "pairs", "train", "export", "evaluate")),
        "compare/3",
        "page/3",
    ]
    Path("prompts-3.jsonl").write_text("{}")
    for name in two.keys() & three.keys():
        assert two[name].what(tmp_path) == three[name].what(tmp_path)


def test_a_job_s_file_is_read_under_the_section(write):
    Path("job.yaml").write_text(yaml.safe_dump({
        "prompts": "gone.jsonl", "out": "x", "model": "y", "max_tokens": 9, "top_p": 0.5, "judge": "exact",
        "tokenizer": "t", "engine": {"max_num_seqs": 3, "tensor_parallel_size": 8},
    }))  # fmt: skip
    file = write(sample__job="job.yaml", train__lora_rank=8)
    text = Path(file).read_text().replace("max_tokens: 100", "max_tokens: 100\n  tokenizer:\n  judge:")
    Path(file).write_text(text.replace("lora_rank: 8", "lora_rank:"))  # nothing takes a key away
    found = stages(file)
    asked = settings(found["round-1/sample"], "sample.yaml")
    assert (asked["max_tokens"], asked["top_p"], asked["model"]) == (100, 0.5, "start")
    assert asked["tokenizer"] == "base" and "judge" not in asked
    assert "lora_rank" not in settings(found["round-1/train"], "train.yaml")
    assert asked["engine"] == {"max_num_seqs": 8, "tensor_parallel_size": 8}


def test_a_run_s_file_lies_beside_the_rounds_file(write, tmp_path, monkeypatch):
    write(evaluate=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settings(stages("../rounds.yaml")["round-1/train"], "train.yaml")["lora_rank"] == RUN["lora_rank"]


def test_policies_lie_where_the_chain_puts_them():
    start, first = Policy("start", Path("o/start"), ()), Policy("round-1", Path("o/round-1"), ("round-1/export",))
    assert (start.evaluation, first.evaluation) == (Path("o/start/eval"), Path("o/round-1/run/eval"))


@pytest.mark.parametrize(
    ("changes", "at", "told"),
    [
        ({"rouns": 2}, "rouns", "rouns: is no part of a rounds file; write rounds"),
        ({"rounds": 0}, "rounds", "rounds: is 0; expected a whole number of 1 or more"),
        ({"rounds": None}, None, "rounds: is missing; add `rounds: …`"),
        ({"model": None}, None, "model: is missing"),
        ({"reference": "first"}, "reference", "reference: is 'first'; expected start or last"),
        ({"sample__max_token": 3}, "max_token", "sample.max_token: is no flag of bvpo sample; write max_tokens"),
        ({"sample__samples": "many"}, "samples", "sample.samples: invalid int value: 'many'"),
        ({"sample__out": "x"}, "out", "sample.out: is given by the rounds; leave it out"),
        (
            {"sample__engine": {"lora_modules": "x"}},
            "lora_modules",
            "sample.engine.lora_modules: is given by the rounds",
        ),
        ({"sample__prompts": "gone-{round}.jsonl"}, "prompts", "sample.prompts: there is no gone-1.jsonl, for round 1"),
        ({"model": "owner/name"}, "model", "model: there is no folder owner/name; name the folder where it lies"),
        ({"sample": None}, None, "sample: is missing; add `sample:` with its flags below it"),
        ({"judge": None}, None, "judge: is missing, and sample judges nothing; add `judge: {with: math}`"),
        ({"judge": {"name": "x"}}, "judge", "judge: has no `with`"),
        ({"pairs__out": "x"}, "out", "pairs.out: is given by the rounds"),
        ({"pairs__policy": "best"}, "policy", "pairs.policy: invalid choice: 'best'"),
        ({"train__run": None}, "train", "train: has no `run`; add `run: configs/FILE.yaml`"),
        ({"train__learning_rates": 1}, "learning_rates", "train.learning_rates: no such key"),
        ({"train__dataset": "x"}, "dataset", "train.dataset: is given by the rounds"),
        ({"train__tuner_type": "full"}, "train", "train: run.yaml is no LoRA run"),
        ({"train__bvpo_new_layers_only": True}, "train", "train: run.yaml trains whole layers beside its adapter"),
        ({"train__lora_rank": 600}, "lora_rank", "train.lora_rank: vLLM takes adapters of rank 512 at most"),
        ({"train__ranks": "four"}, "ranks", "train.ranks: is 'four'; expected a whole number"),
        ({"train__slurm": "gpu"}, "slurm", "train.slurm: is no mapping"),
        ({"train__slurm": False}, "slurm", "train.slurm: is no mapping"),
        ({"slurm": 0}, "slurm", "slurm: is no mapping"),
        ({"sample__engine": 0}, "engine", "sample.engine: is no mapping"),
        ({"evaluate": 0}, "evaluate", "evaluate: is no mapping"),
        ({"export": False}, "export", "export: is no mapping"),
        ({"export": {"merged": True}}, "export", "export: knows `merge`, true or false, and nothing else"),
        ({"evaluate__suite": None}, "evaluate", "the following arguments are required: --suite"),
        ({"evaluate__model": "x"}, "model", "evaluate.model: is given by the rounds"),
    ],
)
def test_a_mistake_is_told_with_its_place(write, changes, at, told):
    """`at`: the key on the line that is named."""
    with pytest.raises(UserError) as caught:
        require_files(read_rounds(write(**changes), "out"))
    error, lines = caught.value, Path("rounds.yaml").read_text().splitlines()
    named = None if error.line is None else lines[error.line - 1].strip().partition(":")[0]
    assert error.file == "rounds.yaml" and named == at and told in str(error), str(error)


def test_a_mistake_ends_the_command_with_a_line(write, capsys):
    assert bvpo(["rounds", write(rounds="two")]) == 2
    assert capsys.readouterr().err == (
        "megatron-bvpo: error: rounds.yaml:1: rounds: is 'two'; expected a whole number of 1 or more\n"
    )


def test_the_verdict_is_of_the_rounds_that_were_asked_for(write):
    """Not of fewer, which an earlier start has compared."""
    rounds = read_rounds(write(), "out")
    rounds.out.mkdir()
    (rounds.out / "compare.json").write_text('[{"sentence": "better"}]')
    (rounds.out / "rounds.html").touch()
    done = Outcome({"compare/2": State.DONE, "page/2": State.DONE})
    assert verdict(rounds, done) == ["better", f"Page: {rounds.out}/rounds.html"]
    assert verdict(rounds, Outcome({"compare/2": State.WAITING, "page/2": State.FAILED})) == []
    alone = read_rounds(write(evaluate=None), "out")
    assert verdict(alone, Outcome({"page/2": State.DONE})) == [f"Page: {rounds.out}/rounds.html"]


def test_the_rehearsal_s_files_stay_as_they_are(tmp_path):
    """A killed controller's stage may be loading the model while the script starts again."""
    prepare(tmp_path, 3, 2)
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "reasoner").iterdir()}
    prepare(tmp_path, 4, 2)
    assert before == {file: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "reasoner").iterdir()}
    weights = tmp_path / "reasoner" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    prepare(tmp_path, 4, 2)
    assert weights.read_bytes() == whole
    names = ["prompts-1.jsonl", "prompts-2.jsonl", "questions.jsonl", "questions.yaml", "reasoner"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_no_launch_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("BVPO_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="sample.sbatch: slurm: is not there; set BVPO_ROOT to a checkout"):
        stages(write(sample__slurm={"nodes": 1}))
