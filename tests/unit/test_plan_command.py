"""The command `bvpo plan`: what it prints, its exit codes, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bvpo import cli
from megatron_bvpo.planning import memory
from megatron_bvpo.planning.settings import RunSettings

ROOT = Path(__file__).resolve().parents[2]
MOE = "Qwen3-30B-A3B-Thinking-2507"
LORA = dict(tuner_type="lora", lora_rank=16, lora_dropout=0, max_length=4096)


def config_file(tmp_path, **values) -> str:
    file = tmp_path / "run.yaml"
    lines = {"rlhf_type": "bvpo", "model": f"Qwen/{MOE}", "expert_model_parallel_size": 8, **LORA, **values}
    file.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    return str(file)


def test_the_command_prints_and_says_whether_it_fits(tmp_path, capsys):
    assert cli.bvpo(["plan", config_file(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\nfits, tightly: " in out and "stage 0" in out and "30.5 B parameters" in out
    assert cli.bvpo(["plan", config_file(tmp_path), "--gpu-memory", "10"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_no_two_columns_run_together(tmp_path, capsys):
    """Where the numbers are as wide as they get: 94 layers and more than 100 GiB a GPU."""
    argv = [
        "plan",
        config_file(tmp_path, expert_model_parallel_size=1),
        "--model",
        "Qwen/Qwen3-235B-A22B-Thinking-2507",
    ]
    assert cli.bvpo([*argv, "--suggest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("GiB a GPU"))
    columns = re.split(" {2,}", lines[head])[1:]
    number, layers, *cells = lines[head + 1].removeprefix("stage").split()
    assert (number, layers) == ("0", "94") and len(cells) == len(columns)
    assert float(cells[0]) > 100 and all(re.fullmatch(r"\d+\.\d+", cell) for cell in cells)


def test_the_command_as_json(tmp_path, capsys):
    argv = ["plan", config_file(tmp_path), "--json", "--suggest", "--nodes", "2", "--set", "global_batch_size=64"]
    assert cli.bvpo(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["groups"]["dp"] == 16
    assert found["stages"][0]["total"] < 80 * memory.GIB
    assert found["suggestions"][0]["keys"]["tensor_model_parallel_size"] >= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.yaml"], "nothing.yaml: cannot be read: No such file"),
        (["CONFIG", "--gpus", "3"], "run.yaml: expert_model_parallel_size: .*Nearest layouts that work"),
        (["CONFIG", "--set", "lr=1"], "no KEY=VALUE"),
        (["CONFIG", "--set", "micro_batch_size=two"], "micro_batch_size: is 'two'; expected a whole number"),
        (["CONFIG", "--set", "recompute_granularity=full"], "needs uniform or block"),
        (["CONFIG", "--set", "target_modules=everything"], "'everything' is none of"),
        (["CONFIG", "--set", "optimizer_cpu_offload=true"], "is True without use_precision_aware_optimizer"),
        (["CONFIG", "--set", "use_precision_aware_optimizer=true"], "never tested with probes; fix the weights"),
        (["CONFIG", "--set", "virtual_pipeline_model_parallel_size=2"], "needs a pipeline, and PP is 1"),
        (["CONFIG", "--set", "max_length=300000"], "max_length: 300000 tokens are more than .* use at most 262144 $"),
        (["CONFIG", "--set", "max_length=300000", "--suggest"], "max_length: 300000 tokens are more than"),
        (["CONFIG", "--set", "bvpo_alpha=abc"], "bvpo_alpha: alpha is 'abc'"),
        *[
            (["CONFIG", "--set", f"{key}=0"], f"{key}: is 0; expected 1 or more")
            for key in ("micro_batch_size", "tensor_model_parallel_size", "context_parallel_size", "lora_rank")
        ],
        (["CONFIG", "--set", "pipeline_model_parallel_size=-1", "--suggest"], "size: is -1; expected 1 or more"),
        (["CONFIG", "--set", "expert_tensor_parallel_size=0"], "expected 1 or more"),
        (["CONFIG", "--set", "bvpo_probe_interval=0"], "bvpo_probe_interval: is 0"),
        (["CONFIG", "--set", "freeze_parameters_regex=("], "'\\(' is no regular expression"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, message, tmp_path, capsys):
    argv = [config_file(tmp_path) if a == "CONFIG" else a for a in argv]
    assert cli.bvpo(["plan", *argv]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err.replace("\n", " ")), err
    assert "Traceback" not in err


def test_a_model_that_is_not_planned_has_an_exit_code_of_its_own(tmp_path, capsys):
    """Preflight stops a run for 2, and must not for this."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    for model, said in (("nobody/none", "is no folder with a config.json"), (str(tmp_path), "is 'mamba', which")):
        assert cli.bvpo(["plan", config_file(tmp_path), "--model", model]) == 3
        err = capsys.readouterr().err
        assert err.startswith("megatron-bvpo: error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "0"], "--gpu-memory: '0' is no number above 0"),
        (["--gpu-memory", "nan"], "'nan' is no number above 0"),
        (["--imbalance", "-3"], "--imbalance: '-3' is no number of at least 1"),
        (["--nodes", "two"], "--nodes: 'two' is no whole number of 1 or more"),
    ],
)
def test_options_out_of_range(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.bvpo(["plan", config_file(tmp_path), *options])
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("value", ['"many"', "0", "[1]", "2.5", "true"])
def test_sizes_that_are_no_numbers(value, tmp_path, capsys):
    shape = json.loads((ROOT / f"megatron_bvpo/planning/shapes/{MOE}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**shape, "hidden_size": json.loads(value)}))
    assert cli.bvpo(["plan", config_file(tmp_path), "--model", str(tmp_path)]) == 2
    assert "config.json: hidden_size: hidden_size is" in capsys.readouterr().err


def test_a_misspelt_key_is_told_with_the_one_meant(tmp_path, capsys):
    file = config_file(tmp_path, max_lenght=5, learning_rate=1, save_steps=5, ENV="{}", qqqqqqqq=1)
    assert cli.bvpo(["plan", file]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("run.yaml: ")[2].partition(":")[0] for line in lines] == [
        "max_lenght",
        "learning_rate",
        "qqqqqqqq",
    ]
    assert lines[0].endswith("did you mean max_length?") and lines[1].endswith("the Megatron backend's is lr")
    assert "mean" not in lines[2]


def test_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"\x80\x81\xff\x00")
    assert cli.bvpo(["plan", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml: is no text" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "model: x\n"])
def test_files_that_are_no_run(text, tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert cli.bvpo(["plan", str(file)]) == 2
    assert "bad.yaml" in capsys.readouterr().err


def test_the_search_starts_from_a_layout_that_does_not_work(tmp_path, capsys):
    assert cli.bvpo(["plan", config_file(tmp_path, expert_model_parallel_size=3), "--suggest"]) == 0
    out = capsys.readouterr().out
    assert re.match(".*run.yaml as it is cannot work: expert_model_parallel_size: .* the first suggested layout", out)
    assert cli.bvpo(["plan", config_file(tmp_path), "--suggest"]) == 0
    assert "first suggested layout" not in capsys.readouterr().out


def test_pasted_keys_give_the_suggested_layout(tmp_path, capsys):
    """Into a file with keys of another layout, as YAML lets the last of equal keys win."""
    other = dict(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
        expert_tensor_parallel_size=2,
    )
    file = config_file(tmp_path, **other)
    cli.bvpo(["plan", file, "--suggest", "--json"])
    best = json.loads(capsys.readouterr().out)["suggestions"][0]
    cli.bvpo(["plan", file, "--suggest"])
    pasted = capsys.readouterr().out.partition(f"Keys of {best['layout']}:\n")[2]
    Path(file).write_text(Path(file).read_text() + pasted)
    assert cli.bvpo(["plan", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(s["total"] for s in found["stages"]) == best["bytes"]
    keys = {f.name for f in dataclasses.fields(RunSettings)}
    layout = {k for k in keys if re.search("_parallel|_pipeline_|recompute_(?!modules)|_vp_stage", k)}
    assert set(best["keys"]) == layout - {"pipeline_model_parallel_layout"}


def test_a_plan_is_quick_and_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from megatron_bvpo.cli import bvpo; code = bvpo(sys.argv[1:]); "
        "heavy = {'torch', 'megatron', 'swift', 'transformers', 'mcore_bridge'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", config_file(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # a second on an idle machine
