"""The route from `swift` and `megatron` to BVPO, through the real console scripts in subprocesses.

A run ends where training would begin (conftest.py). What is between, ms-swift and torchrun, is real.
"""

import sys

import pytest

from tests.contracts.console import OURS, REHEARSE, TORCHRUN, last_line, write_yaml


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
