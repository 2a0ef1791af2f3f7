"""Mistakes a user can make, through the command line: one clear message, exit code 2, no stack trace.

Mistakes in data files are found by the launching process, before a rank is started; mistakes in flags,
layouts and checkpoints by the ranks, before a model is loaded. Rows that can be left out are counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bvpo.rehearsal.sample_data import make_sample_rows
from tests.distributed.cells import CPU_FLAGS, ROOT
from tests.distributed.forks import Run, zygotes

pytestmark = pytest.mark.slow

GOOD = "<think>\nTwo and two.\n</think>\n\n4"
BAD = "<think>\nTwo and three.\n</think>\n\n5"


def row(chosen=GOOD, rejected=BAD, prompt="What is 2+2?", **more) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}]
    made = {"messages": messages, "rejected_response": rejected, **more}
    return {key: value for key, value in made.items() if value is not ...}


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def assert_told(run: Run, message: str) -> None:
    """The last thing on stderr is this one message (a pattern), and the exit code is 2."""
    assert run.codes == [2], run.text[-3000:]
    told = [line for line in run.stderr[0].splitlines() if line.strip()]
    assert re.fullmatch(f"megatron-bvpo: error: {message}", told[-1]), told[-1]
    assert run.text.count("megatron-bvpo: error:") == 1 and "Traceback" not in run.text


# --- data files: told by the launching process ---

# case: (file name, content, message after the file's path)
FILES = {
    "broken JSON": (
        "a.jsonl",
        jsonl(*[row()] * 16) + b'{"messages": [\n',
        r":17: broken JSON at column \d+: .* Write .*",
    ),
    "no UTF-8": (
        "a.jsonl",
        jsonl(row()) + b'{"messages": "\xff"}\n',
        ":2: expected UTF-8, found the byte 0xff .* Save .*",
    ),
    "UTF-16": ("a.jsonl", json.dumps(row()).encode("utf-16"), ": expected UTF-8, found a UTF-16 .*"),
    "an empty file": ("a.jsonl", b"", ": the file is empty. Check .*"),
    "only white space": ("a.jsonl", b"\n \n", ": the file is empty. Check .*"),
    "an empty list": ("a.json", b"[]", ": the file holds no rows. Check .*"),
    "a row that is a list": ("a.jsonl", jsonl(row()) + b"[1]\n", ":2: expected an object, found a list. Every row .*"),
    "messages are text": (
        "a.jsonl",
        jsonl(row() | {"messages": "What?"}),
        ":1: messages: expected a list of messages, found text 'What.'. .*",
    ),
    "a message is text": (
        "a.jsonl",
        jsonl(row() | {"messages": ["What?"]}),
        r":1: messages\[0\]: expected an object.*",
    ),
    "content is a number": (
        "a.jsonl",
        jsonl(row(), row(chosen=4)),
        r":2: messages\[1\].content: expected text, found .* 4.*",
    ),
    "rejected is a number": (
        "a.jsonl",
        jsonl(row(rejected=5)),
        ":1: rejected_response: expected text or .* the number 5.*",
    ),
    "an empty answer is a list": (
        "a.jsonl",
        jsonl(row(empty_response=["4"], empty_rejected_response="5")),
        ":1: empty_response: expected text, found a list.*",
    ),
    "a key twice": (
        "a.jsonl",
        b'{"messages": [], "messages": []}\n',
        ":1: broken JSON: the key 'messages' stands twice.*",
    ),
    "several rejected responses": (
        "a.jsonl",
        jsonl(row(), row(rejected=[BAD, "<think>\nHm.\n</think>\n\n6"])),
        ":2: rejected_response: several responses in one list, found 2. .* write a row for each.*",
    ),
    "columns of other names": (
        "a.jsonl",
        jsonl({"dialogue": row()["messages"], "worse": BAD}),
        """: columns: no messages .*, found dialogue, worse. .* --columns '{"dialogue": "messages", "worse": .*""",
    ),
    "CSV of something else": (
        "a.csv",
        b"a,b\n1,2\n",
        ":1: columns: no messages and no pair of responses, found a, b. .*",
    ),
    "CSV with a cell too many": (
        "a.csv",
        b"query,response,rejected_response\na,b,c,d\n",
        ":2: expected 3 cells .* 4. .*",
    ),
    "an unknown ending": ("a.jsonx", jsonl(row()), ": ms-swift reads files by the ending .*'.jsonx'. Give .*"),
    "nothing left": ("a.jsonl", jsonl(row(chosen="4"), row(rejected=...)), ": no row is left .* 2 read.* Mend .*"),
}


@pytest.mark.parametrize("case", FILES)
def test_data_file(case, workshop, tmp_path):
    name, content, message = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file), launcher=True)
    assert_told(run, re.escape(str(file)) + message)
    assert "torch.distributed.run" not in run.text, "ranks were started"


def test_data_file_that_is_not_there(workshop, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(row()))
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=tmp_path / "pears.jsonl"), launcher=True)
    assert_told(run, rf".*pears.jsonl: no such file. Did you mean {tmp_path}/pairs.jsonl\? .*")


# --- flags, layouts, checkpoints: told by a rank ---


def flags(workshop, **given) -> list[str]:
    values = {
        "model": workshop.moe,
        "model_type": "qwen3_moe",
        "template": "qwen3_thinking",
        "dataset": workshop.train,
        "tuner_type": "lora",
        "global_batch_size": 4,
        "train_iters": 1,
        "eval_iters": 0,
        "max_length": 512,
        "bvpo_alpha": 0.3,
        **{flag.removeprefix("--"): value for flag, value in zip(CPU_FLAGS[::2], CPU_FLAGS[1::2], strict=True)},
        **given,
    }
    return [token for name, value in values.items() if value is not None for token in (f"--{name}", str(value))]


# case: (flags, ranks that are claimed, message)
FLAGS = {
    "alpha above 1": (
        {"bvpo_alpha": 1.5},
        1,
        r"--bvpo_alpha: alpha is '1.5'; expected a number in \[0, 1\], or auto. .*",
    ),
    "alpha below 0": ({"bvpo_alpha": -0.1}, 1, "--bvpo_alpha: alpha is '-0.1'; .*"),
    "alpha NaN": ({"bvpo_alpha": "nan"}, 1, "--bvpo_alpha: alpha is 'nan'; .*"),
    "alpha is a word": ({"bvpo_alpha": "half"}, 1, "--bvpo_alpha: alpha is 'half'; .*"),
    "alpha_prior": ({"bvpo_alpha_prior": 2}, 1, r"--bvpo_alpha_prior: is 2.0; expected a number in \[0, 1\].*"),
    "kappa": ({"bvpo_kappa": 0}, 1, r"--bvpo_kappa: is 0.0; expected a number in \(0, 1\].*"),
    "probe_interval": ({"bvpo_probe_interval": 0}, 1, "--bvpo_probe_interval: is 0; expected 1 or more.*"),
    "an unknown flag": ({"bvpo_alfa": 0.5}, 1, "--bvpo_alfa: no such flag; did you mean --bvpo_alpha.*"),
    "a wrong choice": ({"bvpo_empty": "drop"}, 1, "--bvpo_empty: invalid choice: 'drop' .*strip.*require.*"),
    "a rate that is none": ({"lr": "fast"}, 1, "--lr: invalid float value: 'fast'"),
    "loss_type": ({"loss_type": "dpo"}, 1, "--loss_type: loss_type is 'dpo'; BVPO knows sigmoid, .*"),
    "beta": ({"beta": -1}, 1, "--beta: beta is -1.0; it must be above 0.*"),
    "label_smoothing": ({"label_smoothing": 0.7}, 1, r"--label_smoothing: .* is 0.7; it must be in \[0, 0.5\).*"),
    "a filled empty block": (
        {"bvpo_empty_block": "<think>hm</think>"},
        1,
        "--bvpo_empty_block: an empty trace must hold nothing .* found 'hm' .*",
    ),
    "another optimizer": ({"optimizer": "muon"}, 1, "--optimizer: optimizer is 'muon': .* use --optimizer adam"),
    "ms-swift's own rules": (
        {"apply_wd_to_qk_layernorm": "true"},
        1,
        r"apply_wd_to_qk_layernorm is only supported .* \(.*megatron_args.py:\d+\)",
    ),
    "no data": ({"dataset": None}, 1, ".*Please input the training dataset. .*"),
    "no such model": ({"model": "/no/such/model"}, 1, "/no/such/model: --model: no such folder; check the path"),
    "TP of the heads": (
        {"tensor_model_parallel_size": 3, "sequence_parallel": "true"},
        3,
        r"--tensor_model_parallel_size: 8 attention heads cannot be split over TP 3. TP can be 1, 2, 4, 8.*|.*TP 3.*",
    ),
    "TP of the ranks": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": "true"},
        3,
        "--tensor_model_parallel_size: 3 ranks cannot be split into TP 2 × PP 1 × CP 1 = 2; start a multiple of 2 .*",
    ),
    "PP of the layers": (
        {"pipeline_model_parallel_size": 3},
        3,
        "--pipeline_model_parallel_size: 4 layers cannot be split evenly over 3 .* PP can be 1, 2, 4, .*",
    ),
    "EP of the experts": (
        {"expert_model_parallel_size": 3, "global_batch_size": 3},
        3,
        "--expert_model_parallel_size: 8 experts cannot be split over EP 3. EP can be 1, 2, 4, 8",
    ),
    "EP of the ranks": (
        {"expert_model_parallel_size": 2, "global_batch_size": 3},
        3,
        "--expert_model_parallel_size: 3 ranks cannot be split into expert TP 1 × EP 2 × PP 1 = 2. EP can be 1, 3 here",
    ),
    "MoE with TP, no SP": (
        {"tensor_model_parallel_size": 2},
        2,
        "--sequence_parallel: a mixture of experts with TP 2 needs sequence parallelism; add --sequence_parallel true",
    ),
    "VPP with few micro-batches": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 1},
        2,
        "--global_batch_size: 1 micro-batches a step cannot fill 2 pipeline stages .* use a multiple of 2",
    ),
    "the global batch": (
        {"global_batch_size": 5},
        2,
        "--global_batch_size: global batch 5 is not a multiple of micro batch 1 × data parallel 2 = 2; use 4",
    ),
    "more than there is": (
        {"global_batch_size": 32, "train_iters": None, "num_train_epochs": 1},
        1,
        ".*16 rows do not fill .* 32.*",
    ),
    "all rows too long": (
        {"max_length": 12},
        1,
        r".*train.jsonl: --max_length: no row is left: 16 longer than .* 12. .*",
    ),
    "a loss scale": ({"loss_scale": "default"}, 1, "--loss_scale: .* is 'default': BVPO counts the two responses, .*"),
    "truncation into pieces": (
        {"truncation_strategy": "split"},
        1,
        "--truncation_strategy: .* is 'split': a piece .* right or left; .*",
    ),
    "all frozen": (
        {"tuner_type": "full", "freeze_parameters_ratio": 1.0},
        1,
        "--freeze_parameters_ratio: .* is 1.0: every parameter is frozen, so nothing would be trained; .*",
    ),
    "no length": ({"train_iters": None}, 1, "--num_train_epochs: is missing, and so is train_iters: .*"),
    "two lengths": ({"num_train_epochs": 1}, 1, "--train_iters: is 1, and --num_train_epochs 1 would win over it; .*"),
    "a name cut short": (
        {"train_iters": None, "train_iter": 1},
        1,
        "--train_iter: no such flag; did you mean --train_.*",
    ),
    "a stream without an end": (
        {"streaming": "true", "train_iters": None, "num_train_epochs": 1},
        1,
        "--train_iters: is missing, and a stream has no end .*",
    ),
    "a stream with nothing of use": (
        {"streaming": "true", "max_length": 12},
        1,
        ".*train.jsonl: --dataset: no row of the stream is of use: .* --max_length 12; .*",
    ),
    "lazy rows with nothing of use": (
        {"lazy_tokenize": "true", "max_length": 12},
        1,
        ".*train.jsonl: --dataset: none of the rows that were tried is of use .* --max_length 12; .*",
    ),
    "a warm-up longer than the epoch": (
        {"train_iters": None, "num_train_epochs": 1, "lr_warmup_iters": 9},
        1,
        "--lr_warmup_iters: is 9, and the learning rate ends after 4 steps; .*",
    ),
    "a tracker that is not installed": ({"report_to": "swanlab"}, 1, "--report_to: is swanlab, which is not .*"),
    "a reference that is not there": (
        {"ref_adapters": "owner/name"},
        1,
        "owner/name: --ref_adapters: no such folder; .*",
    ),
    "modules in one pair of quotes": (
        {"target_modules": "all-linear all-router"},
        1,
        "--target_modules: has 'all-linear all-router' as one name; .*",
    ),
    "modules of another library": (
        {"target_modules": "q_proj"},
        1,
        "--target_modules: has 'q_proj', which no module of the model is called. Megatron's names are linear_fc1, .*",
    ),
    "a pattern that matches nothing": (
        {"target_regex": ".*q_proj"},
        1,
        "--target_regex: '.*q_proj' matches no module of the model; .*linear_qkv.*",
    ),
    "a pattern for one layer": (
        {"target_regex": r".*layers\.0\..*linear_qkv"},
        1,
        r"--target_regex: matches decoder.layers.\*.self_attention.linear_qkv in some layers only, .*",
    ),
    "a module without LoRA": (
        {"target_modules": "output_layer"},
        1,
        r"--target_modules: has no LoRA for output_layer \(ColumnParallelLinear\); .*",
    ),
    "a module that cannot be copied": (
        {"modules_to_save": "all-embedding"},
        1,
        "--modules_to_save: has embedding, of which no copy can be made: .*",
    ),
    "a saved module that is not there": ({"modules_to_save": "lm_head"}, 1, "--modules_to_save: has 'lm_head', .*"),
    "freezing what is not there": (
        {"tuner_type": "full", "freeze_parameters": "model.layers"},
        1,
        "--freeze_parameters: has 'model.layers', with which no parameter's name begins; names are like .*",
    ),
    "everything frozen": (
        {"tuner_type": "full", "freeze_parameters_regex": ".*"},
        1,
        "--freeze_parameters: nothing is left to train: every parameter is frozen; .*",
    ),
    "SGD": ({"optimizer": "sgd"}, 1, "--optimizer: is sgd: Megatron's distributed optimizer .* use --optimizer adam"),
    "gradients in bf16": (
        {"main_grads_dtype": "bf16"},
        1,
        "--main_grads_dtype: is bf16, and Megatron has that with the precision-aware optimizer only; .*",
    ),
    "moments in fp16": ({"exp_avg_sq_dtype": "fp16"}, 1, "--exp_avg_sq_dtype: is fp16, and Megatron .*"),
    "no rows asked": ({"dataset": "pairs.jsonl#0"}, 1, "--dataset: takes 0 rows of pairs.jsonl; .*"),
    "a jinja template": ({"template_backend": "jinja"}, 1, "--template_backend: .* is 'jinja': .*"),
    "no such checkpoint": (
        {"mcore_adapter": "/no/such/checkpoint-1", "finetune": "false"},
        1,
        "--mcore_adapter: there is no checkpoint /no/such/checkpoint-1; no whole checkpoint is beside it",
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, workshop, tmp_path):
    given, ranks, message = FLAGS[case]
    claim = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    assert_told(zygotes().run(tmp_path / "out", flags(workshop, **given), env=claim), message)


def test_experts_of_a_dense_model(workshop, tmp_path):
    given = flags(workshop, model=workshop.dense, model_type="qwen3", expert_model_parallel_size=2)
    run = zygotes().run(tmp_path / "out", given, env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert_told(run, "--expert_model_parallel_size: the model has no experts, so EP 2 has nothing to split; use EP 1")


def test_an_output_folder_that_cannot_be_written(workshop, tmp_path):
    (tmp_path / "file").write_text("")
    run = zygotes().run(tmp_path / "out", flags(workshop, output_dir=tmp_path / "file" / "out"))
    assert_told(run, f"--output_dir: the output folder {tmp_path}/file/out cannot be written: Not a directory; .*")


@pytest.fixture(scope="module")
def saved(workshop, tmp_path_factory) -> Path:
    """A checkpoint after one step of a LoRA run on the MoE."""
    out = tmp_path_factory.mktemp("saved") / "out"
    zygotes().run(out, flags(workshop, save_safetensors="false")).require_success()
    return out / "checkpoint-1"


CHECKPOINTS = {
    "of another model": (
        {"model": "dense", "model_type": "qwen3"},
        "the checkpoint is of another model: model_type qwen3_moe there and qwen3 here, .*",
    ),
    "of another rank": (
        {"lora_rank": 4},
        "--lora_rank: the checkpoint was trained in another way: lora_rank 8 there and 4 here; .*",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(case, saved, workshop, tmp_path):
    given, message = CHECKPOINTS[case]
    if given.get("model") == "dense":
        given = given | {"model": workshop.dense}
    run = zygotes().run(tmp_path / "out", flags(workshop, mcore_adapter=saved, finetune="false", **given))
    assert_told(run, f"{saved}/bvpo_state.json: .*{message}")


def test_a_reference_of_another_scale(workshop, tmp_path):
    """ms-swift would run it with the run's own lora_alpha, without a word."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "use_rslora": false}')
    run = zygotes().run(tmp_path / "out", flags(workshop, ref_adapters=tmp_path))
    assert_told(
        run,
        f"{tmp_path}/adapter_config.json: --ref_adapters: lora_alpha is 16 and this run's is 32.0, which it would get; "
        "give --lora_alpha 16, or merge .*",
    )


def test_full_tuning_does_not_go_on_from_an_adapter(saved, workshop, tmp_path):
    given = flags(workshop, mcore_model=saved, finetune="false", tuner_type="full")
    told = "--tuner_type: the checkpoint was trained in another way: tuner_type lora there and full here; .*"
    assert_told(zygotes().run(tmp_path / "out", given), f"{saved}/bvpo_state.json: {told}")


# --- rows that can be left out ---

LONG = "Hm. " * 400
# What is wrong, and how it is counted in the log.
ROWS = {
    "no rejected side": (row(rejected=...), "1 × rejected_response: missing"),
    "no messages": (row() | {"messages": []}, "1 × messages: empty"),
    "no trace": (row(chosen="4", rejected="5"), "× messages: no trace, neither <think> nor </think>"),
    "an unclosed trace": (row(chosen="<think>\nTwo and"), "1 × messages: no </think>"),
    "equal responses": (row(rejected=GOOD), "1 × rejected_response: the same text as the chosen response"),
    "white space": (row(chosen=" \n "), "1 × messages: blank response"),
    "images": (row(images=["a.png"]), "1 × images: not empty"),
    "tool calls": (
        row() | {"messages": [{"role": "user", "content": "?"}, {"role": "tool_call", "content": "{}"}]},
        "1 × messages: tool calls in the response",
    ),
    "equal empty answers": (
        row(empty_response="4", empty_rejected_response="4"),
        "1 × empty_rejected_response: the same text as empty_response",
    ),
    "one empty answer": (
        row(empty_response="4"),
        "1 × empty_rejected_response: missing, the other empty answer is there",
    ),
}
TOO_LONG = {
    "rows dropped": row(prompt=f"Read long. {LONG}"),
    "rows kept without the trace pair": row(chosen=f"<think>\n{LONG}\n</think>\n\n4", prompt="Think long."),
    "rows kept without the empty pair": row(empty_response=LONG, empty_rejected_response="5", prompt="Answer long."),
}


def test_rows_that_are_left_out_are_counted_and_listed(workshop, tmp_path):
    good = make_sample_rows(6, seed=1)
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(jsonl(*good, *(bad for bad, _ in ROWS.values()), *TOO_LONG.values()))
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file, save_safetensors="false")).require_success()
    said = re.sub(r"\[INFO:swift\] ", "", run.stderr[0])
    for number, (what, (_, counted)) in enumerate(ROWS.items()):
        assert counted in said, what
        assert f"{file}:{len(good) + number + 1}: " in said, f"{what} is not listed"
    kept = len(good) + 5  # two without their empty pair, and three with something that is too long to be encoded
    assert f"{len(good) + len(ROWS) + len(TOO_LONG)} rows read, {kept} kept." in said
    for what in TOO_LONG:
        assert f"training data: 1 {what}: longer than --max_length 512" in said
    too_long = r"longer than --max_length 512 \(\d+ tokens\): raise it, or cut with --truncation_strategy"
    place = rf"training data: {re.escape(str(file))}:\d+: row \d+"
    assert re.search(rf"{place} \('Read long. Hm.*…'\): its trace pair: {too_long}; its empty pair: {too_long}", said)
    assert re.search(rf"{place} \('Think long.'\): its trace pair: longer than", said)
    assert re.search(rf"{place} \('Answer long.'\): its empty pair: longer than", said)
    assert f"training data: trace stream: {kept} pairs encoded, {kept - 2} left and 2 lost." in said
    assert re.search(rf"trace stream: {kept - 2} pairs,", said) and re.search(rf"empty stream: {kept - 4} pairs,", said)


def test_pairs_that_are_cut_are_counted(workshop, tmp_path):
    """Cut on the right: what is left without a response or a difference is lost by name, and the rest is trained."""
    good = make_sample_rows(4, seed=1)
    behind = f"<think>\n{LONG}\n</think>\n\n"
    rows = [
        row(prompt=f"Read long. {LONG}"),
        row(f"{behind}4", f"{behind}5", prompt="Differ late."),
        row(f"<think>\nSo {LONG}</think>4", f"<think>\nOr {LONG}</think>5", prompt="Differ at once."),
    ]
    file = tmp_path / "long.jsonl"
    file.write_bytes(jsonl(*good, *rows))
    more = {"truncation_strategy": "right", "global_batch_size": 6, "save_safetensors": "false"}
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file, **more)).require_success()
    said = re.sub(r"\[INFO:swift\] ", "", run.stderr[0])
    for line in (
        "trace stream: 1 pairs cut to --max_length.",
        "trace stream: 7 pairs encoded, 5 left and 2 lost.",
        "empty stream: 7 pairs encoded, 6 left and 1 lost.",
        "1 rows dropped: no response within --max_length 512",
        "1 rows kept without the trace pair: the same tokens on both sides within --max_length 512",
    ):
        assert f"training data: {line}" in said, line
    assert re.search("trace stream: 5 pairs,", said) and re.search("empty stream: 6 pairs,", said)
    assert len(step_losses(tmp_path / "out")) == 1


def step_losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "logging.jsonl").read_text().splitlines())
    return [line["loss/trace"] for line in lines if "loss/trace" in line]


# --- the commands themselves ---


def command(workshop, tmp_path, **given) -> subprocess.CompletedProcess:
    env = {**os.environ, "BVPO_REHEARSAL": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "megatron_bvpo.cli", "rlhf", "--rlhf_type", "bvpo", *flags(workshop, **given)]
    argv += ["--output_dir", str(tmp_path / "out")]
    return subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_a_broken_line_is_told_before_anything_is_started(workshop, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[row()] * 16) + b'{"messages": [\n')
    result = command(workshop, tmp_path, dataset="a.jsonl")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(
        "megatron-bvpo: error: a.jsonl:17: broken JSON"
    )
    assert "torch.distributed.run" not in result.stdout and not (tmp_path / "out").exists()


def test_what_only_the_ranks_can_see_is_told_once_and_last(workshop, tmp_path):
    result = command(
        workshop,
        tmp_path,
        pipeline_model_parallel_size=2,
        model=workshop.dense,
        model_type="qwen3",
        expert_model_parallel_size=2,
    )
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if "megatron-bvpo: error:" in line]
    assert len(told) == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == told[0]
