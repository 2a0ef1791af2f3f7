"""`bvpo doctor --report`: what is in the file, and that no secret is, wherever it was planted."""

from __future__ import annotations

import pytest

from megatron_bvpo import cli
from megatron_bvpo.cluster.support_report import head_and_tail, run_logs
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import RunFile
from megatron_bvpo.launching.secret_masks import MASK, known_secrets, masked

# One for each place, none of a form that gives it away.
IN_ENV, IN_FLAG, IN_YAML, IN_YAML_ENV, IN_LOG, IN_URL, IN_QUERY, OTHER = (
    f"{place}-Pl4nted" for place in "inenv inflag inyaml inyamlenv inlog inurl inquery other".split()
)


@pytest.fixture
def report(tmp_path, monkeypatch) -> str:
    """The report of a run that had a secret in every place, each with a second, unnamed appearance in a log."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"rlhf_type: bvpo\nmodel: Qwen/Qwen3-30B-A3B-Thinking-2507\ntuner_type: lora\nmax_length: 4096\n"
        f"hub_token: {IN_YAML}\nlr: 1.0e-5\n"
        f"swanlab_token: >-\n  {OTHER}\nENV:\n  WANDB_API_KEY: {IN_YAML_ENV}\n  NCCL_DEBUG: INFO\n"
    )
    folder = tmp_path / "run"
    rank = folder / "logs" / "slurm-7-0" / "000-node0" / "abc" / "attempt_0" / "0"
    rank.mkdir(parents=True)
    secrets = (IN_ENV, IN_YAML, IN_YAML_ENV, OTHER)
    (rank / "stderr.log").write_text(
        f"run sh: torchrun cli.py --hub_token {IN_FLAG} --model x ['--hub-token', '{IN_FLAG}']\n"
        f'args: hub_token=\'{IN_LOG}\', lr=1e-05\n{{"api_key": "{IN_LOG}"}}\nAuthorization: Bearer {IN_LOG}\n'
        f"http://user:{IN_URL}@proxy:3128/ and https://hub/x?token={IN_QUERY}&n=1\n"
        + "".join(f"nothing names it: {secret}\n" for secret in secrets)
        + "training data: 512 tokens a sequence: mean 118\n"
        + "".join(f"line {i}\n" for i in range(500))
        + "Traceback (most recent call last):\nRuntimeError: the first error\n"
    )
    monkeypatch.setenv("MY_SERVICE_TOKEN", IN_ENV)
    monkeypatch.setenv("NCCL_AUTH_SECRET", IN_ENV)
    monkeypatch.setenv("BVPO_REHEARSAL", "1")
    monkeypatch.setenv("NOBODYS_BUSINESS", "a private word")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    (tmp_path / "slurm.log").write_text(f"export HF_TOKEN={IN_LOG}\n")
    file = tmp_path / "sent.txt"
    argv = ["doctor", "--report", str(file), "--run", str(yaml), "--folder", str(folder)]
    assert cli.bvpo([*argv, "--log", str(tmp_path / "slurm.log")]) == 0
    return file.read_text()


def test_no_planted_secret_is_in_the_report(report):
    for secret in (IN_ENV, IN_FLAG, IN_YAML, IN_YAML_ENV, IN_LOG, IN_URL, IN_QUERY, OTHER):
        assert secret not in report
    assert "Pl4nted" not in report
    assert report.count(MASK) >= 12


def test_the_report_has_what_a_helper_needs_and_nothing_private(report):
    for wanted in (
        "megatron-core", "ms_swift 4.6", "torch was built for CUDA", "NCCL_DEBUG=WARN", "BVPO_REHEARSAL=1",
        "there is no nvidia-smi here", "stage", "max_length: 4096", "lr: 1.0e-5", "512 tokens a sequence: mean 118",
        "RuntimeError: the first error", "line 40\n", "line 499\n", "lines are left out", f"HF_TOKEN={MASK}",
    ):  # fmt: skip
        assert wanted in report, wanted
    for private in ("NOBODYS_BUSINESS", "a private word", "MY_SERVICE_TOKEN", "line 200\n"):
        assert private not in report, private


@pytest.mark.parametrize(
    "text",
    [
        "--hub_token S", "my_password: x,S", "export HF_TOKEN=a&S", "hub_token: &anchor S",
        "--hub_token=S", "--hub-token '-S'", "--hub_tok S", "'--hub_token', 'S'", '"token":"S"',
        "token: S", "TOKEN = S", "x_password: 'a S b'", "a://u:S@h", "a://S@h", "u=https://h/?access_key=S&b",
        "authorization: bearer S", "WANDB_API_KEY: S", "  hub_token:\n    S\n  next: 1", "hub_token: |\n  S\n",
        "model.hub_token=S", "-----BEGIN RSA PRIVATE KEY-----\nS\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_each_way_to_write_a_secret(text):
    secret = "abcdEFGH12345678"
    found = masked(text.replace("S", secret) if "RSA" not in text else text.replace("\nS\n", f"\n{secret}\n"))
    assert secret not in found and MASK in found
    if "next:" in text:
        assert "next: 1" in found


@pytest.mark.parametrize("secret", ["hf_" + "a" * 30, "sk-" + "b" * 30, "ghp_" + "c" * 36, "AKIA" + "D" * 16])
def test_well_known_forms_need_no_name(secret):
    assert secret not in masked(f"it said {secret}, and went on")


@pytest.mark.parametrize(
    "text",
    [
        "loss: 0.69 tokens: 118 num_input_tokens_seen=12 tokens/s: 340", "hub_token: None", "hub_token=None, lr=1",
        "tokenizer: x", "a: b", "http://host:8000/v1", "--max_new_tokens 5", "monkey: see",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_of_all_flags_only_the_secret_ones_are_masked():
    """`lazy_tokenize`, `moe_token_drop_policy` and `teacher_tag_key` hold no token and no key."""
    texts = {name: [f"--{name} chosen-value", f"{name}: chosen-value"] for name in flag_names()}
    assert [name for name, ways in texts.items() if any(masked(way) != way for way in ways)] == ["hub_token"]
    shown = "TOKENIZED_ROWS=/data/tokenized"
    assert masked(shown) == shown and MASK in masked("MY_TOKEN=/data/tokenized")


def test_values_of_flags_and_addresses_are_known():
    run = RunFile((), ("--hub_token", "topsecret1", "--x=http://joe:password9@h"), {"A_KEY": "keykey7"}, None)
    assert known_secrets({"PATH": "/usr/bin"}, run) == {"topsecret1", "password9", "keykey7"}


def test_logs_of_ranks_with_an_error_come_first(tmp_path):
    for rank in range(40):
        folder = tmp_path / "logs" / "run" / f"{rank:03d}-n" / "x" / "attempt_0" / "0"
        folder.mkdir(parents=True)
        (folder / "stderr.log").write_text("ValueError: bad\n" if rank == 17 else "fine\n")
    found = run_logs(tmp_path)
    assert [f.parts[-5] for f in found] == ["017-n", "000-n", "001-n", "038-n", "039-n"]
    assert run_logs(tmp_path / "nothing") == [] == run_logs(None)


def test_heads_and_tails(tmp_path):
    file = tmp_path / "log"
    for n in (0, 3, 4, 6):
        file.write_text("".join(f"{i}\n" for i in range(n)))
        assert head_and_tail(file, 3) == file.read_text()
    file.write_text("".join(f"{i}\n" for i in range(9)))
    assert [line for line in head_and_tail(file, 3).splitlines() if "[" not in line] == list("012678")


def test_options_of_a_report_need_one(capsys):
    assert cli.bvpo(["doctor", "--log", "x"]) == 2
    assert "add --report FILE" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert cli.bvpo(["doctor", "--report", str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written" in capsys.readouterr().err
