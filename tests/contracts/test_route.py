"""The route from `swift` and `megatron` to BVPO, through the real console scripts in subprocesses.

A `sitecustomize` on PYTHONPATH puts small modules in the place of our pipeline and arguments, so that a run
ends where training would begin; RECORD=1 also stops ms-swift's launcher from starting anything, which leaves
its own line ``run sh: `…` ``. What is between, ms-swift and torchrun, is real.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OURS = "megatron_bvpo/cli.py"
TORCHRUN = ["NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]

STUB = """
import dataclasses, os, subprocess, sys, types

@dataclasses.dataclass
class BvpoArguments:
    rlhf_type: str = "bvpo"
    model: str = ""
    lr: float = 0.1
    bvpo_alpha: str = "auto"

def bvpo_main():
    from megatron_bvpo.errors import UserError
    rank = os.environ.get("RANK", "0")
    if os.environ.get("FAIL") == rank:
        raise UserError("no rejected answer.", file="pairs.jsonl", line=7, remedy="Add one.")
    if "FAIL" in os.environ:
        import time
        time.sleep(60)  # waits in a collective, as a rank does whose partner has gone
    print(f"BVPO rank {rank} of {os.environ.get('WORLD_SIZE', '1')}: {sys.argv[1:]}", flush=True)

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

module("megatron_bvpo.training.pipeline", bvpo_main=bvpo_main)
module("megatron_bvpo.training.arguments", BvpoArguments=BvpoArguments)
module("megatron_bvpo.rehearsal", install=lambda: print("stand-ins", flush=True))
if "RECORD" in os.environ:
    done = types.SimpleNamespace(returncode=0)
    real = subprocess.run
    subprocess.run = lambda args, **kw: done if args[0] == sys.executable else real(args, **kw)
"""


@pytest.fixture
def call(tmp_path):
    """Run a console script with the stubs; `env` is added to a clean environment."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB, encoding="utf-8")

    def run(*command: str, **env: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("BVPO_")}
        clean |= {"PYTHONPATH": str(tmp_path / "stub"), "CUDA_VISIBLE_DEVICES": "", **env}
        script = [str(BIN / command[0])] if (BIN / command[0]).exists() else [command[0]]
        return subprocess.run(
            [*script, *command[1:]], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    return run


RUN_ALL = """
import contextlib, io, json, os, runpy, sys
if sys.argv[2] == "without":
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "RouteFinder"]
environ, lines = dict(os.environ), []
for command, env in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(environ | env)
    script = os.path.join(os.path.dirname(sys.executable), command[0])
    sys.argv, said = [script, *command[1:]], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    lines.append(said.getvalue())
print("RESULT" + json.dumps(lines))
"""


@pytest.fixture
def launches(call):
    """What the launchers would run for many (command, environment), one argument list each.

    The console scripts run one after another in one process: loading ms-swift takes seconds.
    """

    def run(cases: list[tuple[list[str], dict[str, str]]], hook: str = "with") -> list[list[str]]:
        result = call(sys.executable, "-c", RUN_ALL, json.dumps(cases), hook, RECORD="1")
        assert "RESULT" in result.stdout, result.stderr
        lines = json.loads(result.stdout.partition("RESULT")[2])
        found = [re.search(r"run sh: `(.*)`", line) for line in lines]
        assert all(found), lines
        return [match[1].split() for match in found]

    return run


def write_yaml(folder: Path, **keys) -> str:
    path = folder / "run.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    return str(path)


REHEARSE = {"BVPO_REHEARSAL": "1"}


def test_each_spelling_starts_our_file_with_the_other_flags(launches):
    cases = [
        ["swift", "rlhf", "--rlhf_type", "bvpo", "--megatron", "--model", "m"],
        ["swift", "rlhf", "--megatron", "true", "--rlhf_type", "bvpo", "--model", "m"],
        ["swift", "rlhf", "--megatron=true", "--rlhf_type", "bvpo", "--model", "m"],
        ["swift", "rlhf", "--rlhf_type", "bvpo", "--model", "m"],
        ["megatron", "rlhf", "--rlhf_type", "bvpo", "--model", "m"],
        ["megatron", "rlhf", "--rlhf_type", "bvpo", "--model", "m", "--megatron"],
    ]
    for sh in launches([(command, REHEARSE) for command in cases]):
        assert sh[1].endswith(OURS)
        assert sh[2:] == ["--rlhf_type", "bvpo", "--model", "m"]


def test_the_module_launches_as_megatron_does(call):
    command = [sys.executable, "-m", "megatron_bvpo.cli", "rlhf", "--rlhf_type", "bvpo", "--model", "m"]
    result = call(*command, RECORD="1", NPROC_PER_NODE="2", **REHEARSE)
    assert "torch.distributed.run --nproc_per_node 2" in result.stdout, result.stderr
    assert f"{OURS} --rlhf_type bvpo --model m`" in result.stdout


def test_yaml_with_the_same_keys_and_its_env_block(launches, tmp_path):
    keys = {"rlhf_type": "bvpo", "megatron": True, "model": "m", "bvpo_alpha": 0.5}
    path = write_yaml(tmp_path, **keys, ENV={"BVPO_REHEARSAL": 1, "NPROC_PER_NODE": 2})
    for sh in launches([(["swift", "rlhf", path], {}), (["megatron", "rlhf", path], {})]):
        assert sh[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        assert sh[5].endswith(OURS)
        assert sh[6:] == ["--rlhf_type", "bvpo", "--model", "m", "--bvpo_alpha", "0.5"]


def test_the_command_line_wins_over_the_files_rival_key(call, tmp_path):
    """ms-swift would train the epoch."""
    path = write_yaml(tmp_path, rlhf_type="bvpo", model="m", num_train_epochs=1)
    result = call("swift", "rlhf", path, "--train_iters", "10", RECORD="1", **REHEARSE)
    assert f"{OURS} --rlhf_type bvpo --model m --train_iters 10`" in result.stdout, result.stderr
    assert f"megatron-bvpo: --train_iters replaces num_train_epochs of {path}." in result.stdout
    path = write_yaml(tmp_path, rlhf_type="bvpo", model="m", num_train_epochs=1, train_iters=10)
    result = call("swift", "rlhf", path, RECORD="1", **REHEARSE)
    assert result.returncode == 2 and "train_iters: is 10, and num_train_epochs 1 would win" in last_line(result)


@pytest.mark.parametrize("name, value", [("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "eight"), ("NNODES", "0")])
def test_a_number_of_ranks_that_is_none_is_told(call, name, value):
    result = call("swift", "rlhf", "--rlhf_type", "bvpo", "--model", "m", RECORD="1", **REHEARSE, **{name: value})
    assert result.returncode == 2 and f"error: {name}: is {value!r}; expected a whole number" in last_line(result)


def test_torchrun_gets_the_variables_that_ms_swift_hands_on(launches):
    values = dict(zip(TORCHRUN, ["8", "4", "3", "10.0.0.1", "29511"], strict=True))
    ours, stock = launches(
        [
            (["swift", "rlhf", "--rlhf_type", "bvpo"], REHEARSE | values),
            (["megatron", "rlhf", "--rlhf_type", "dpo"], values),
        ]
    )
    at = next(i for i, argument in enumerate(ours) if argument.endswith(OURS))
    assert ours[:at] == stock[:at]
    for name, value in values.items():
        assert ours[ours.index(f"--{name.lower()}") + 1] == value


def test_two_ranks_really_reach_bvpo(call):
    result = call("swift", "rlhf", "--rlhf_type", "bvpo", "--megatron", "--model", "m", NPROC_PER_NODE="2", **REHEARSE)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        assert f"BVPO rank {rank} of 2: ['--rlhf_type', 'bvpo', '--model', 'm']" in result.stdout
    assert result.stdout.count("stand-ins") == 2


STOCK = [
    ("swift", "sft", "--model", "m"),
    ("swift", "rlhf", "--rlhf_type", "dpo", "--model", "m"),
    ("swift", "rlhf", "--rlhf_type", "kto", "--megatron_extra_kwargs", "{}"),
    ("megatron", "rlhf", "--rlhf_type", "dpo", "--model", "m"),
    ("megatron", "sft", "--model", "m"),
]


def test_other_commands_start_what_they_start_without_us(launches):
    cases = [(list(command), env) for command in STOCK for env in ({}, {"NPROC_PER_NODE": "2"})]
    with_us = launches(cases)
    assert with_us == launches(cases, "without")
    assert not any(argument.endswith(OURS) for sh in with_us for argument in sh)


def test_megatron_takes_ms_swifts_own_types_to_its_own_pipeline(launches, tmp_path):
    cases, path = [], write_yaml(tmp_path, megatron=True, rlhf_type="kto", model="m")
    for rlhf_type in ("dpo", "kto", "grpo", "gkd", "rm"):
        flags = ["--rlhf_type", rlhf_type, "--model", "m"]
        cases += [["megatron", "rlhf", *flags], ["swift", "rlhf", "--megatron", *flags]]
    cases += [["megatron", "rlhf", "--rlhf_type", "kto", "--model", "m"], ["swift", "rlhf", path]]
    shs = launches([(command, {}) for command in cases])
    for stock, routed in zip(shs[::2], shs[1::2], strict=True):
        assert routed == stock and stock[1].endswith("swift/cli/_megatron/rlhf.py")


def test_megatron_false_is_the_ordinary_command(launches):
    flags = ["--rlhf_type", "dpo", "--model", "m"]
    cases = [(["swift", "rlhf", *flags], {}), (["swift", "rlhf", "--megatron", "false", *flags], {})]
    ordinary, false = launches(cases)
    assert ordinary == false and ordinary[1].endswith("swift/cli/rlhf.py")


def test_the_mappings_stay_ms_swifts_own(call):
    code = (
        "import ast, inspect, swift.cli.main as a, swift.cli._megatron.main as b\n"
        "for module in (a, b):\n"
        "    tree = ast.parse(inspect.getsource(module))\n"
        "    node = next(n for n in tree.body if isinstance(n, ast.AnnAssign))\n"
        "    assert ast.literal_eval(node.value) == module.ROUTE_MAPPING\n"
        "assert a.cli_main.__wrapped__.__module__ == 'swift.cli.main'\n"
    )
    result = call(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.rstrip().splitlines()[-1]


def test_without_a_gpu_one_line_says_how_to_rehearse(call):
    result = call("swift", "rlhf", "--rlhf_type", "bvpo", "--megatron", NPROC_PER_NODE="4")
    assert result.returncode == 2
    assert "run sh" not in result.stdout and "Traceback" not in result.stderr
    assert last_line(result) == (
        "megatron-bvpo: error: no CUDA device is visible (CUDA_VISIBLE_DEVICES=''). "
        "To rehearse the same run on CPU ranks, put BVPO_REHEARSAL=1 NPROC_PER_NODE=4 before the command."
    )


def test_bvpo_refuses_the_other_backend_and_ray():
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching.route import choose

    with pytest.raises(UserError, match="BVPO runs on the Megatron backend only"):
        choose(["--rlhf_type", "bvpo", "--megatron", "False"], False, False)
    with pytest.raises(UserError, match="BVPO starts through torchrun only"):
        choose(["--use_ray", "--rlhf_type", "bvpo"], True, False)


SECRET = "hf_never_to_be_printed"


@pytest.mark.parametrize(
    ("keys", "env", "named"),
    [
        ({"hub_token": SECRET}, {}, "hub_token: a secret in a flag or YAML file"),
        ({"ENV": {"WANDB_API_KEY": SECRET}}, {}, "ENV.WANDB_API_KEY: a secret in the run's file"),
        # ms-swift warns of a variable that is set twice, with both values, while it reads the file.
        ({"ENV": {"MY_CREDENTIALS": "a file"}}, {"MY_CREDENTIALS": SECRET}, "ENV.MY_CREDENTIALS: set in the environ"),
    ],
)
def test_a_secret_in_the_file_is_refused_before_anything_prints_it(call, tmp_path, keys, env, named):
    path = write_yaml(tmp_path, rlhf_type="bvpo", megatron=True, model="m", **keys)
    result = call("swift", "rlhf", path, NPROC_PER_NODE="2", **REHEARSE, **env)
    assert result.returncode == 2 and "run sh" not in result.stdout
    assert last_line(result).startswith(f"megatron-bvpo: error: {path}: {named}")
    assert SECRET not in result.stdout + result.stderr


def test_files_of_other_types_are_left_to_ms_swift(launches, tmp_path):
    path = write_yaml(tmp_path, rlhf_type="dpo", model="m", hub_token=SECRET)
    cases = [(["swift", "rlhf", path], {})]
    assert launches(cases) == launches(cases, "without")


def test_a_file_that_cannot_be_read_is_told_where_it_is_about_bvpo(tmp_path):
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching.route import check_before_unrolling as check

    broken = tmp_path / "run.yaml"
    broken.write_text("rlhf_type: bvpo\nhub_token: @" + SECRET)
    with pytest.raises(UserError, match=r"run\.yaml:2: is no valid YAML") as caught:
        check([str(broken)])
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        check([str(tmp_path / "gone.yaml"), "--rlhf_type", "bvpo"])
    broken.write_text("rlhf_type: dpo\nhub_token: @" + SECRET)
    for argv in ([str(broken)], [str(tmp_path / "gone.yaml")], [], ["stray"]):
        check(argv)  # ms-swift's own words
    check(["-h", "--rlhf_type", "bvpo"])
    broken = tmp_path / "run.json"
    broken.write_text('{\n\t"rlhf_type": "bvpo",\n\t"hub_token": ' + SECRET)
    with pytest.raises(UserError, match=r"run\.json:3: is no valid JSON"):
        check([str(broken)])


def test_settings_of_the_plugin_are_refused_beside_the_route(call):
    result = call("swift", "rlhf", "--rlhf_type", "bvpo", BVPO_ALPHA="0.3", **REHEARSE)
    assert result.returncode == 2 and "run sh" not in result.stdout
    assert re.search("BVPO_ALPHA: set in the environment.*use --bvpo_alpha", last_line(result))


def test_a_wrong_flag_on_every_rank_is_told_once_and_torchrun_stays_silent(call):
    command = ["swift", "rlhf", "--rlhf_type", "bvpo", "--bvpo_alfa", "1"]
    result = call(*command, NPROC_PER_NODE="2", **REHEARSE)
    assert result.returncode == 2
    assert last_line(result) == "megatron-bvpo: error: --bvpo_alfa: no such flag; did you mean --bvpo_alpha?"
    assert result.stderr.count("megatron-bvpo: error") == 1 and "Traceback" not in result.stderr


def test_mistakes_in_flags_name_the_flag_and_the_nearest():
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching.flags import check_flags

    @dataclasses.dataclass
    class Arguments:
        rlhf_type: Literal["dpo", "bvpo"] = "bvpo"
        lr: float = 0.1
        bvpo_alpha: str = "auto"
        ignore_args_error: bool = False

    check_flags(Arguments, ["--lr", "1", "--bvpo-alpha=0.5"])
    check_flags(Arguments, ["--wrong", "1", "--ignore_args_error", "true"])
    for flags, message in [
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--rlhf_type", "bpo"], "--rlhf_type: invalid choice: 'bpo' (choose from 'dpo', 'bvpo')"),
        (["--bvpo-alfa=1"], "--bvpo-alfa: no such flag; did you mean --bvpo_alpha?"),
        (
            ["--lerning_rate", "1"],
            "--lerning_rate: no such flag; the Megatron backend's is --lr",
        ),
        (["--q_x", "1", "--z_y"], "--q_x: no such flag; --z_y: no such flag"),
        (["stray"], "'stray' belongs to no flag. Flags start with two dashes."),
    ]:
        with pytest.raises(UserError) as caught:
            check_flags(Arguments, flags)
        assert str(caught.value) == message


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_run_and_is_the_last_line(call):
    result = call("swift", "rlhf", "--rlhf_type", "bvpo", NPROC_PER_NODE="2", FAIL="1", **REHEARSE)
    assert result.returncode == 2
    assert last_line(result) == "megatron-bvpo: error: pairs.jsonl:7: no rejected answer. Add one."


@pytest.mark.slow
def test_torchrun_itself_can_start_our_file(call):
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(ROOT / OURS),
        "--rlhf_type",
        "bvpo",
    ]
    result = call(sys.executable, *command, FAIL="0", **REHEARSE)
    assert result.returncode != 0
    assert "megatron-bvpo: error: pairs.jsonl:7" in result.stderr


PLUGIN = ROOT / "plugins" / "megatron_bvpo_plugin.py"
IMPORT_PLUGIN = (
    "import runpy, sys, types; plugin, sys.argv[1:] = sys.argv[1], sys.argv[2:]\n"
    "if '--fake_megatron' in sys.argv: sys.modules['swift.megatron'] = types.ModuleType('swift.megatron')\n"
    "pipeline = sys.modules['megatron_bvpo.training.pipeline']\n"
    "pipeline.activate_plugin = lambda settings: print('settings', settings)\n"
    "runpy.run_path(plugin)"
)


def test_the_plugin_hands_its_settings_to_the_pipeline(call):
    flags = ["--rlhf_type", "dpo", "--fake_megatron"]
    result = call(sys.executable, "-c", IMPORT_PLUGIN, str(PLUGIN), *flags, BVPO_ALPHA="0.3", BVPO_EMPTY="require")
    assert result.stdout == "settings {'bvpo_alpha': 0.3, 'bvpo_empty': 'require'}\n", result.stderr


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--rlhf_type", "dpo"], {}, "found --rlhf_type dpo without the Megatron backend"),
        (["--rlhf_type", "kto", "--fake_megatron"], {}, "found --rlhf_type kto with the Megatron backend"),
        (["--rlhf_type", "bvpo", "--fake_megatron"], {}, "which needs no plugin"),
        (["--fake_megatron"], {"BVPO_ALFA": "1"}, "BVPO_ALFA: no such setting. Did you mean BVPO_ALPHA?"),
    ],
)
def test_the_plugin_refuses_a_run_that_would_not_be_bvpo(call, flags, env, message):
    result = call(sys.executable, "-c", IMPORT_PLUGIN, str(PLUGIN), *flags, **env)
    assert result.returncode == 1 and message in last_line(result)


def test_the_plugin_alone_finds_a_checkout_beside_it(call, tmp_path):
    """Without site-packages nothing of ours is importable; the refusal is ours, so the package was found."""
    (tmp_path / "mounted").mkdir()
    alone = tmp_path / "mounted" / PLUGIN.name
    alone.write_text(PLUGIN.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mounted" / "checkout").symlink_to(ROOT)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    assert "the BVPO plugin needs Megatron's DPO" in call(sys.executable, "-S", "-c", code, str(alone)).stderr
    (tmp_path / "mounted" / "checkout").unlink()
    assert "Set BVPO_ROOT" in call(sys.executable, "-S", "-c", code, str(alone)).stderr
