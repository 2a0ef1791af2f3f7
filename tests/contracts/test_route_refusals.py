"""What the route refuses, in one line and before anything is started or printed; and who tells an error of a rank."""

import dataclasses
import re
import sys
from typing import Literal

import pytest

from tests.contracts.console import OURS, REHEARSE, ROOT, last_line, write_yaml


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
