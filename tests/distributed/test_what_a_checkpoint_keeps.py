"""What a checkpoint keeps: a `target_regex` as a list of names, its own schedule, which is told, and its place in the
data, in its Hugging Face form too."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open

from tests.distributed.forks import zygotes
from tests.distributed.short_runs import flags

pytestmark = pytest.mark.slow


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def losses(folder) -> list[tuple]:
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in log(folder) if "loss" in line]


def test_a_pattern_is_saved_as_the_names_that_it_matches(workshop, tmp_path):
    out = tmp_path / "out"
    given = {"target_regex": r".*(experts\.linear_fc1|linear_proj)", "train_iters": 2, "save_steps": 1}
    given |= {"logging_steps": 1, "merge_lora": "false"}
    zygotes().run(out, flags(workshop, **given)).require_success()
    adapter = out / "checkpoint-1"
    fused = json.loads((adapter / "adapter_config.json").read_text())  # peft's form: experts are parameters there
    assert fused["target_modules"] == ["o_proj"]
    assert [name.rpartition(".")[2] for name in fused["target_parameters"]] == ["gate_up_proj"]
    saved = json.loads((adapter / "vllm" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(saved) == ["gate_proj", "o_proj", "up_proj"]
    with safe_open(str(adapter / "vllm" / "adapter_model.safetensors"), framework="pt") as file:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in file.keys()} == set(saved)
    whole = losses(out)
    more = flags(workshop, **given, mcore_adapter=out / "checkpoint-1", finetune="false")
    zygotes().run(out, more).require_success()
    assert losses(out)[len(whole) :] == whole[1:] and len(whole) == 2


def test_a_rate_that_the_checkpoint_wins_over_is_told(workshop, tmp_path):
    """Megatron takes the schedule from the checkpoint, whatever the flags say."""
    out = tmp_path / "out"
    given = {"train_iters": 1, "lr": 1e-4, "save_safetensors": "false"}
    run = zygotes().run(out, flags(workshop, **given)).require_success()
    assert "The checkpoint's" not in run.text
    more = {**given, "train_iters": 2, "lr": 5e-5, "mcore_adapter": out / "checkpoint-1", "finetune": "false"}
    run = zygotes().run(out, flags(workshop, **more)).require_success()
    assert "The checkpoint's max_lr goes on, 0.0001, and not this run's 5e-05." in run.text
    assert "The checkpoint's lr_decay_steps goes on, 4, and not this run's 8." in run.text


@pytest.fixture(scope="module")
def exported(workshop, tmp_path_factory):
    """A run of two steps that saved an adapter and a merged model after the first, and the flags to go on with."""
    out = tmp_path_factory.mktemp("exported") / "out"
    given = {"train_iters": 2, "save_steps": 1, "logging_steps": 1, "lr": 1e-3, "lr_warmup_iters": 0}
    given |= {"lora_dropout": 0, "merge_lora": "true"}
    zygotes().run(out, flags(workshop, **given)).require_success()
    return out, given | {"finetune": "false", "save_steps": 9, "merge_lora": "false"}


@pytest.mark.parametrize("form", ["checkpoint-1", "checkpoint-1-merged"])
def test_an_exported_form_goes_on_with_the_rows_that_come_next(workshop, exported, tmp_path, form):
    """The step and the rows go together: megatron-core 0.19 keeps them where ms-swift does not look."""
    out, given = exported
    start = {"model": out / form, "tuner_type": "full"} if "merged" in form else {"adapters": out / form}
    if "merged" in form:
        given = {name: value for name, value in given.items() if name not in ("lora_dropout", "merge_lora")}
    run = zygotes().run(tmp_path / "again", flags(workshop, **given, **start)).require_success()
    second, again = ([line for line in log(folder) if line.get("iteration") == "2/2"] for folder in (out, run.folder))
    assert len(second) == len(again) == 1 and [line["iteration"] for line in log(run.folder) if "loss" in line] == [
        "2/2"
    ]
    for name in ("logps/chosen", "empty/logps/rejected"):  # with the same weights they name the rows
        assert again[0][name] == pytest.approx(second[0][name], rel=1e-5), name
    state = json.loads((run.folder / "checkpoint-2" / "bvpo_state.json").read_text())
    assert (state["iteration"], state["consumed_train_samples"]) == (2, 8)


def test_a_step_without_its_rows_is_refused(workshop, exported, tmp_path):
    """As ms-swift alone leaves it: the data would begin anew in the middle of the schedule."""
    out, given = exported
    foreign = shutil.copytree(out / "checkpoint-1" / "vllm", tmp_path / "foreign")
    shutil.copy(out / "checkpoint-1" / "latest_checkpointed_iteration.txt", foreign)
    run = zygotes().run(tmp_path / "again", flags(workshop, **given, adapters=foreign))
    assert run.codes == [2]
    last = run.stderr[0].strip().splitlines()[-1]
    assert "is of step 1 of a run, and nothing there says which rows" in last and "--finetune" in last
