"""A sweep file: the runs and stages that it becomes, what it will take, and mistakes in it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.sampling.asking.job_file import read_line
from megatron_bvpo.workflow import sweep_command
from megatron_bvpo.workflow.chain import run_chain
from megatron_bvpo.workflow.stages import Stage
from megatron_bvpo.workflow.sweep_costs import costs_told, run_costs
from megatron_bvpo.workflow.sweep_file import read_sweep
from megatron_bvpo.workflow.sweep_stages import FREE, FREE_OF_LORA, stages_of

ROOT = Path(__file__).resolve().parents[2]
RUN = {"rlhf_type": "bvpo", "model": "Qwen3-30B-A3B-Thinking-2507", "tuner_type": "lora", "lora_rank": 16, "lr": 1e-5}
RUN |= {"num_train_epochs": 1, "output_dir": "elsewhere", "max_length": 512, "global_batch_size": 4, "seed": 3}
RUN |= {"ENV": {"A": "1"}}
SWEEP = {
    "train": {"run": "run.yaml", "ranks": 2, "weight_decay": 0.1},
    "rows": {"DS1": ["a.jsonl"], "DS2": ["a.jsonl", "b.jsonl#3"]},
    "grid": {"rows": ["DS1", "DS2"], "lr": [1e-5, 2e-5], "beta": [0.1]},
    "runs": [{"rows": "DS1", "lora_rank": 64, "lora_alpha": 128}, {"name": "own", "rows": "DS1", "train_iters": 9}],
}
EVALUATE = {"suite": "suite.yaml", "max_tokens": 200, "engine": {"max_num_seqs": 8}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes sweep.yaml with changes (`a__b`: value; None takes it away), and returns its name."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"messages": []}\n' * 10)
    Path("b.jsonl").write_text('{"messages": []}\n' * 5)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    Path("suite.yaml").write_text("datasets: [{file: q.jsonl, judge: exact}]\n")
    Path("q.jsonl").write_text("{}\n")

    def write(**changes) -> str:
        values = json.loads(json.dumps(SWEEP))
        for key, value in changes.items():
            *above, last = key.split("__")
            place = values
            for name in above:
                place = place[name]
            if value is None:
                place.pop(last)
            else:
                place[last] = value
        Path("sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return "sweep.yaml"

    return write


def stages(file: str, out: str = "out") -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(read_sweep(file, out))}


def settings(stage: Stage) -> dict:
    (text,) = stage.files.values()
    return yaml.safe_load(text)


def test_the_runs(write, tmp_path):
    sweep = read_sweep(write(), "out")
    assert [run.name for run in sweep.runs] == [
        "DS1_lr-1e-05", "DS1_lr-2e-05", "DS2_lr-1e-05", "DS2_lr-2e-05", "DS1_lora_rank-64_lora_alpha-128", "own",
    ]  # fmt: skip
    found = stages("sweep.yaml")
    out = tmp_path / "out"
    run = found["train/DS2_lr-2e-05"]
    made = {"lr": 2e-5, "beta": 0.1, "weight_decay": 0.1, "dataset": ["a.jsonl", "b.jsonl#3"], "lora_rank": 16}
    assert made.items() <= settings(run).items() and settings(run)["ENV"] == {"A": "1"}
    assert settings(run)["output_dir"] == str(out / "runs/DS2_lr-2e-05") == run.env["BVPO_RUN_DIR"]
    assert settings(run)["bvpo_ref_cache"] == str(out / "references")
    assert run.command == ("bvpo", "supervise", "--", str(out / "runs/DS2_lr-2e-05.yaml")) and run.cores == 2
    assert run.reads == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    # A rival of the file's key takes its place, as on the command line.
    assert settings(found["train/own"])["train_iters"] == 9 and "num_train_epochs" not in settings(found["train/own"])
    # Nothing is shared but the two caches.
    folders = [settings(stage)["output_dir"] for stage in found.values()]
    assert len(set(folders)) == len(folders) == len(found)
    assert {stage.env["BVPO_DATA_CACHE"] for stage in found.values()} == {str(out / "data-cache")}


def test_one_fill_for_all_runs_on_the_same_rows_and_reference(write):
    found = stages(write())
    fills = [name for name in found if name.startswith("refs/")]
    assert len(fills) == 2 and {name[5:8] for name in fills} == {"DS1", "DS2"}
    by_rows = {name[5:8]: name for name in fills}
    for name, stage in found.items():
        if name.startswith("train/"):
            assert stage.after == (by_rows["DS2" if "DS2" in name else "DS1"],)
    made = settings(found[by_rows["DS1"]])
    assert made["bvpo_refs_only"] is True and made["num_train_epochs"] == 1 and made["max_length"] == 512
    assert not {"lr", "beta", "lora_rank", "seed", "weight_decay"} & made.keys()
    assert settings(found[by_rows["DS2"]])["seed"] == 3  # it draws the rows
    # So it does with held-out rows; what it splits off of the others is filled, too.
    for own, fills_of_seeds in (({"val_dataset": "b.jsonl#3"}, 2), ({"split_dataset_ratio": 0.2}, 1)):
        seeds = [{"name": f"s{seed}", "rows": "DS1", "seed": seed, **own} for seed in (1, 2)]
        others = stages(write(grid=None, runs=seeds))
        assert len({others[f"train/s{seed}"].after for seed in (1, 2)}) == fills_of_seeds
    write()
    # A run more on the same rows changes no stage of the others.
    more = stages(write(runs=[*SWEEP["runs"], {"name": "more", "rows": "DS1", "loss_type": "ipo"}]))
    assert {name: more[name] for name in found} == found and more.keys() - found.keys() == {"train/more"}
    # Another reference, other rows of the same file, or other lengths have a fill of their own.
    for own in ({"max_length": 256}, {"bvpo_alpha": 1}, {"bvpo_streams": "trace"}, {"model": "other"}):
        others = stages(write(runs=[{"name": "other", "rows": "DS1", **own}]))
        assert others["train/other"].after[0] not in fills, own
    ranks = [{"name": f"r{n}", "rows": "DS1", "lora_rank": n, "ref_adapters": "x"} for n in (8, 16)]
    others = stages(write(grid=None, runs=ranks))
    assert others["train/r8"].after != others["train/r16"].after  # the reference adapter has the run's own rank


def test_runs_without_a_reference_have_no_cache(write):
    runs = [{"name": "simpo", "rows": "DS1", "loss_type": "simpo"}, {"name": "kto", "rows": "DS1", "loss_type": "kto"}]
    found = stages(write(grid=None, runs=runs))
    assert list(found) == ["train/simpo", "train/kto"]
    assert not any("bvpo_ref_cache" in settings(stage) for stage in found.values())
    found = stages(write(reference_cache=False))
    assert not any(name.startswith("refs/") or "bvpo_ref_cache" in settings(stage) for name, stage in found.items())
    found = stages(write(reference_cache="shared"))
    assert {settings(stage)["bvpo_ref_cache"] for stage in found.values()} == {str(Path("shared").resolve())}


def test_every_key_that_no_reference_depends_on_is_one():
    free = {name for name in flag_names() if FREE.fullmatch(name)}
    assert {"lr", "lr_warmup_fraction", "beta", "save_steps", "adam_beta1", "bvpo_kappa"} <= free
    assert not free & {"model", "dataset", "max_length", "template", "torch_dtype", "bvpo_logp_impl", "bvpo_streams"}
    lora = {name for name in flag_names() if FREE_OF_LORA.fullmatch(name)}
    assert lora >= {"lora_rank", "target_modules"} and not lora & {"tuner_type", "adapters"}


def test_the_evaluation(write, tmp_path):
    Path("job.yaml").write_text("model: x\nengine: {tensor_parallel_size: 8, max_num_seqs: 4}\n")
    runs = [
        {"name": "plain", "rows": "DS1"},
        {"name": "router", "rows": "DS1", "target_modules": ["all-linear", "all-router"]},
        {"name": "whole", "rows": "DS1", "tuner_type": "full", "lora_rank": None},
        {"name": "beside", "rows": "DS1", "bvpo_new_layers_only": True},
    ]
    found = stages(write(grid=None, runs=runs, evaluate={**EVALUATE, "job": "job.yaml"}))
    asked = {}
    for name, stage in found.items():
        if name.startswith("eval/"):
            file = Path(stage.command[3])
            file.parent.mkdir(parents=True)
            file.write_text(stage.files[str(file)])
            asked[name] = read_line(list(stage.command[3:]))
    assert list(asked) == ["eval/base", "eval/plain", "eval/router", "eval/whole", "eval/beside"]
    runs_folder = tmp_path / "out/runs"
    assert found["eval/base"].after == () and found["eval/plain"].after == ("export/plain",)
    assert not any("--merge" in found[f"export/{name}"].command for name in ("plain", "whole", "beside"))
    assert "--merge" in found["export/router"].command
    assert found["export/plain"].whole == str(runs_folder / "plain/model")
    assert asked["eval/plain"].engine == {
        "tensor_parallel_size": 8, "max_num_seqs": 8, "enable_lora": True, "max_lora_rank": "16",
        "lora_modules": f"plain={runs_folder}/plain/model",
    }  # fmt: skip
    assert [asked[f"eval/{name}"].model for name in ("base", "plain", "router", "whole", "beside")] == [
        RUN["model"], RUN["model"], *(f"{runs_folder}/{name}/model" for name in ("router", "whole", "beside")),
    ]  # fmt: skip
    assert asked["eval/router"].out == f"{runs_folder}/router/eval" and asked["eval/router"].name == "router"
    assert found["eval/plain"].reads == ("suite.yaml",)
    assert "eval/base" not in stages(write(evaluate={**EVALUATE, "base": False}))


def test_the_evaluation_runs(write, tmp_path, monkeypatch, capsys):
    """With the tests' own server in the engine's place, and what would be trained and exported there already."""
    rows = [{"prompt": f"What is {i}?", "answer": str(i % 3)} for i in range(8)]
    Path("ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("suite.yaml").write_text(yaml.safe_dump({"datasets": [{"file": "ours.jsonl", "judge": "exact"}]}))
    told = json.dumps({"key": "KEY", "model": "NAME"})
    told = told.replace("KEY", "'$VLLM_API_KEY'").replace("NAME", "'$BVPO_ENGINE_NAME'")
    server = f"exec {sys.executable} {ROOT}/tests/unit/openai_server.py $BVPO_ENGINE_PORT {tmp_path}/asked.log '{told}'"
    monkeypatch.setenv("BVPO_ENGINE_COMMAND", server)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    evaluate = {**EVALUATE, "thinking_switch": "enable_thinking", "modes": ["thinking"], "merge": True}
    file = write(grid=None, runs=[{"name": "own", "rows": "DS1"}], evaluate=evaluate)
    sweep = read_sweep(file, "out")
    (sweep.out / "runs/own/model").mkdir(parents=True)
    chosen = [stage for stage in stages_of(sweep) if stage.name.startswith(("export/", "eval/"))]
    names = {stage.name for stage in chosen}
    chosen = [replace(stage, after=tuple(names & set(stage.after))) for stage in chosen]
    assert run_chain(chosen, sweep.out).exit_code == 0, capsys.readouterr().out
    assert "is there" in (sweep.out / "stages/export/own/log.txt").read_text()
    sweep_command.summarise(sweep)
    said = capsys.readouterr().out
    assert "own" in said and "base" in said and said.splitlines()[-1] == f"Page: {sweep.out}/sweep.html"
    assert (sweep.out / "compare.txt").read_text() in said
    assert bvpo(["sweep", file, "--out", "out"]) == 2
    assert f"train.model: there is no folder {RUN['model']}; name the folder" in capsys.readouterr().err


def test_what_is_served_of_a_run_that_names_no_tuner(write):
    """ms-swift trains all weights then, and an adapter's settings further where one is given."""
    Path("given").mkdir()
    Path("given/adapter_config.json").write_text('{"r": 60}')
    plain = {key: value for key, value in RUN.items() if not key.startswith(("tuner", "lora"))}
    Path("run.yaml").write_text(yaml.safe_dump(plain))
    runs = [{"name": "whole", "rows": "DS1"}, {"name": "further", "rows": "DS1", "adapters": "given"}]
    found = stages(write(grid=None, runs=runs, evaluate={**EVALUATE, "base": False}))
    whole, further = (found[f"eval/{name}"].command for name in ("whole", "further"))
    assert "--engine.enable_lora" not in whole and whole[whole.index("--engine.model") + 1].endswith("whole/model")
    assert further[further.index("--engine.max_lora_rank") + 1] == "64"


def test_on_slurm(write):
    found = stages(
        write(
            slurm={"partition": "gpu"},
            train={"run": "run.yaml", "slurm": {"nodes": 4, "gpus_per_node": 8}, "global_batch_size": 32},
            evaluate={**EVALUATE, "slurm": {"nodes": 1}},
        )
    )
    train, asked = found["train/own"], found["eval/own"]
    assert train.slurm.flags == ("--partition", "gpu", "--nodes", "4", "--gpus-per-node", "8")
    assert Path(train.slurm.script).name == "slurm.sbatch"
    assert train.command == (str(Path("out/runs/own.yaml").resolve()),)
    assert train.env["BVPO_RUN_DIR"].endswith("out/runs/own") and "NPROC_PER_NODE" not in train.env
    assert Path(asked.slurm.script).name == "sample.sbatch" and found["export/own"].slurm is None
    assert asked.command[0] == str(Path("out/runs/own/evaluate.yaml").resolve())


def test_what_it_will_take(write):
    """Steps by hand: 10 rows in batches of 4 are 3, 13 rows 4; hours by the plan's own seconds a step."""
    sweep = read_sweep(write(), "out")
    costs = {run.name: run_costs(sweep, run) for run in sweep.runs}
    assert [costs[name].steps for name in ("DS1_lr-1e-05", "DS2_lr-1e-05", "own")] == [3, 4, 9]
    one = costs["own"]
    assert all(0 < saved < hours for saved, hours in zip(one.saved, one.hours, strict=True))
    told = costs_told(sweep)
    assert len(told) == 8 and told[-1].startswith("the shared references are paid 2 time(s), which saves ")
    # Seven passes over DS1's and DS2's rows in place of one each: steps 3+3+3+9 and 4+4 against 3 and 4.
    slow = one.saved[1] * (18 - 3 + 8 - 4)
    assert float(told[-1].split(" to ")[1].split()[0]) == pytest.approx(slow, rel=0.1)
    Path("run.yaml").write_text(yaml.safe_dump(RUN | {"model": "nobody/knows"}))
    told = costs_told(read_sweep("sweep.yaml", "out"))
    assert "own: not planned: " in told[-2] and "without 6 run(s)" in told[-1]


def test_the_command_shows_and_starts_nothing(write, capsys):
    assert bvpo(["sweep", write(), "--out", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "train/own: not begun\n    NPROC_PER_NODE=2 " in said and "together " in said
    assert bvpo(["sweep", "sweep.yaml", "--out", "out", "--graph", "graph.mmd"]) == 0
    assert "[train/own]" in Path("graph.mmd").read_text() and not Path("out").exists()
    assert bvpo(["sweep", "sweep.yaml", "--out", "out", "--cores", "1"]) == 2
    assert "--cores: is 1, and refs/DS1-" in capsys.readouterr().err


def test_runs_that_failed_are_left_out_of_the_summary(write, monkeypatch, capsys):
    sweep = read_sweep(write(evaluate=EVALUATE), "out")
    asked = []
    monkeypatch.setattr(sweep_command, "_bvpo", lambda *words: asked.append(words) or "so\n")
    sweep_command.summarise(sweep)
    assert asked == []
    for name in ("base", "own", "DS1_lr-1e-05"):
        (sweep.out / "runs" / name / "eval").mkdir(parents=True)
        (sweep.out / "runs" / name / "eval/scores.json").touch()
    (sweep.out / "runs/DS2_lr-1e-05").mkdir()
    (sweep.out / "runs/DS2_lr-1e-05/logging.jsonl").touch()
    sweep_command.summarise(sweep)
    names = [word.partition("=")[0] for word in asked[0][1:-2]]
    assert names == ["base", "DS1_lr-1e-05", "own"] and asked[0][-2:] == ("--baseline", "base")
    assert [Path(word).name for word in asked[1][1:-2]] == ["base", "DS1_lr-1e-05", "DS2_lr-1e-05", "own"]
    assert (sweep.out / "compare.txt").read_text() == "so\n" and "Page: " in capsys.readouterr().out
    # Neither the comparison nor the page of another time is shown for one that could not be made.
    (sweep.out / "sweep.html").touch()
    monkeypatch.setattr(sweep_command, "_bvpo", lambda *words: None)
    sweep_command.summarise(sweep)
    assert (sweep.out / "compare.txt").read_text() == capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "at", "told"),
    [
        ({"grids": {}}, "grids", "grids: is no part of a sweep file; write grid"),
        (
            {"train": None},
            None,
            "train: is missing; add `train:` with its flags below it; configs/sweep_003.yaml has one",
        ),
        ({"train__run": "gone.yaml"}, "run", "train.run: gone.yaml: cannot be read: No such file or directory"),
        ({"train__output_dir": "x"}, "output_dir", "train.output_dir: is given by the sweep; leave it out"),
        ({"train__ranks": 0}, "ranks", "train.ranks: is 0; expected a whole number of 1 or more"),
        (
            {"grid__learning_rate": [1]},
            "learning_rate",
            "grid.learning_rate: no such key, so it changes nothing here and",
        ),
        ({"grid__lr": 1e-5}, "lr", "grid.lr: is 1e-05; expected a list of values; write lr: [1e-05]"),
        ({"grid__lr": [1e-5, 1e-5]}, "grid", "grid: 'DS1_lr-1e-05' is the name of two runs; give the run another"),
        ({"grid__rows": ["DS4"]}, "rows", "grid.rows: there is no mix 'DS4', of DS1, DS2; add it below `rows:`"),
        ({"grid__dataset": [["a.jsonl"]]}, "grid", "has rows and dataset; leave one out"),
        ({"grid__output_dir": ["x"]}, "output_dir", "grid.output_dir: is given by the sweep"),
        ({"runs": {"a": 1}}, "runs", "runs: is no list; write `- {name: a, lr: 1.0e-5}` a line"),
        ({"runs": [{"name": "a", "rows": "DS1", "lora_rang": 8}]}, "lora_rang", "did you mean lora_rank?"),
        ({"runs": [{"name": "a/b", "rows": "DS1"}]}, "- name", "'a/b' is no name of letters, digits and ._=+-"),
        ({"runs": [{"name": "base", "rows": "DS1"}]}, "- name", "'base' is the base model's name"),
        ({"runs": [{"name": "a"}]}, "- name", "has no rows, and the run file names no dataset; add `rows: NAME`"),
        ({"runs": [{"name": "a", "rows": "DS1", "train_iters": 1, "num_train_epochs": 1}]}, "train_iters", "would win"),
        ({"runs": None, "grid": None}, None, "runs: is missing, and so is grid; add `grid: {lr: [1.0e-5, 2.0e-5]}`"),
        ({"rows__DS1": ["gone.jsonl"]}, "DS1", "rows.DS1: gone.jsonl: no such file"),
        ({"rows": ["a.jsonl"]}, "rows", "rows: is no mapping"),
        ({"reference_cache": 3}, "reference_cache", "reference_cache: is 3; expected a folder, or false"),
        ({"evaluate": {"suite": "suite.yaml", "max_tokens": 9}}, "evaluate", "has no engine that would be asked"),
        (
            {"evaluate": {**EVALUATE, "max_token": 3}},
            "max_token",
            "evaluate.max_token: is no flag of bvpo eval; write max",
        ),
        ({"evaluate": {**EVALUATE, "out": "x"}}, "out", "evaluate.out: is given by the sweep; leave it out"),
        ({"evaluate": {**EVALUATE, "merge": "no"}}, "merge", "evaluate.merge: is 'no'; expected true or false"),
    ],
)
def test_a_mistake_is_told_with_its_place(write, changes, at, told):
    """`at`: the key on the line that is named."""
    with pytest.raises(UserError) as caught:
        read_sweep(write(**changes), "out")
    error, lines = caught.value, Path("sweep.yaml").read_text().splitlines()
    named = None if error.line is None else lines[error.line - 1].strip().partition(":")[0]
    assert told in str(error) and error.file == "sweep.yaml" and named in (at, None if at is None else f"- {at}")


def test_mistakes_of_other_places(write, tmp_path, capsys):
    write()
    Path("bad.yaml").write_text("train:\n  run: run.yaml\n grid: {}\n")
    Path("rank.yaml").write_text(Path(write(train__lora_rank=600, evaluate=EVALUATE)).read_text())
    write()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/chain.json").touch()
    for words, told in (
        (["bad.yaml"], "bad.yaml:3: is no valid YAML"),
        (["gone.yaml"], "gone.yaml: cannot be read: No such file"),
        (
            ["sweep.yaml", "--out", "old/runs/new"],
            f"{tmp_path}/old/runs/new: --out: lies in {tmp_path}/old, which is another",
        ),
        (["rank.yaml"], "evaluate.merge: DS1_lr-1e-05: vLLM takes adapters of rank 512 at most"),
    ):
        assert bvpo(["sweep", *words, "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said


def test_the_sweep_of_003_is_the_table_s(tmp_path, monkeypatch):
    """Its rows: #, data, rank, alpha, lr, β, router."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for i in (1, 2, 3):
        Path(f"ds{i}.jsonl").write_text("{}\n" * 10_000)
    sweep = read_sweep("configs/sweep_003.yaml")
    table = """59 DS1 16 32 5e-5 .1 -
64 DS2 16 32 5e-5 .1 -
65 DS1 16 32 5e-5 .1 router
66 DS1 64 128 5e-5 .1 -
67 DS3 16 32 5e-5 .1 -
68 DS3 16 32 1e-6 .01 -
69 DS2 16 32 1e-6 .01 -
70 DS3 16 32 2e-5 .075 -"""
    for run, line in zip(sweep.runs, table.splitlines(), strict=True):
        name, rows, rank, alpha, lr, beta, router = line.split()
        made = run.settings
        assert (run.name, run.rows, made["lora_rank"], made["lora_alpha"]) == (name, rows, int(rank), int(alpha))
        assert (made["lr"], made["beta"]) == (float(lr), float(beta))
        assert made["target_modules"] == ("all-linear" if router == "-" else ["all-linear", "all-router"])
    found = stages_of(sweep)
    assert sum(stage.name.startswith("refs/") for stage in found) == 3 and len(found) == 3 + 3 * 8 + 1
    head = Path("configs/sweep_003.yaml").read_text()
    assert all(f"#   {line}\n" in head for line in costs_told(sweep)[-2:])
