"""What a run leaves on disk, loaded as its users do: the adapter in peft, in swift and in a further run, the merged
model in transformers.

All must give the log-probs of the run's last evaluation, which came after its last step.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_bvpo.host.peft_export import DUE, set_aside, write_peft_form
from megatron_bvpo.launching.adapter_folders import CONFIG, PER_EXPERT, WEIGHTS, per_expert_form
from tests.distributed import oracle_runs
from tests.distributed.cells import run_cells
from tests.distributed.hf_oracle import load_model, mean_logps, read_rows

TOLERANCE = 1e-5
MODELS = ["moe", "moe-experts", "dense"]
CHECKPOINT = "checkpoint-2"
# What a user takes: the link that every page names.
LAST = "last-checkpoint"


def last_evaluation(run) -> dict[str, float]:
    (line,) = [line for line in run.log if "eval_loss" in line]
    return {key.removeprefix("eval_"): value for key, value in line.items() if "logps" in key}


def load_adapter(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base), folder, autocast_adapter_dtype=False).eval()


def require_same_logps(model, run, workshop, base) -> None:
    expected = last_evaluation(run)
    found = mean_logps(model, base, read_rows(workshop.held_out))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=TOLERANCE), key


def model_of(kind, workshop):
    return getattr(workshop, kind.removesuffix("-experts"))


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapter_in_peft(saved_runs, workshop, kind):
    run, base = saved_runs[kind], model_of(kind, workshop)
    model = load_adapter(base, run.folder / LAST)
    require_same_logps(model, run, workshop, base)
    with model.disable_adapter(), pytest.raises(AssertionError):  # the adapter is what makes them so
        require_same_logps(model, run, workshop, base)


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapter_in_swift(saved_runs, workshop, kind):
    """`swift infer --adapters` and `swift export --merge_lora true`."""
    from swift.tuners import Swift

    run, base = saved_runs[kind], model_of(kind, workshop)
    model = Swift.from_pretrained(load_model(base), str(run.folder / LAST), autocast_adapter_dtype=False).eval()
    require_same_logps(model, run, workshop, base)
    merged = model.merge_and_unload()
    require_same_logps(merged, run, workshop, base)


def test_the_adapter_in_a_further_run(saved_runs):
    """`--adapters` and `--ref_adapters` of a Megatron run, given the checkpoint: both start where it ended."""
    (start,) = [line for line in saved_runs["again"].log if "eval_loss" in line][:1]
    for key, value in last_evaluation(saved_runs["moe-experts"]).items():
        assert start[f"eval_{key}"] == pytest.approx(value, rel=TOLERANCE), key
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_the_adapter_alone_in_a_further_run(saved_runs):
    """`--adapters` without `--ref_adapters`: the reference is the base model, as it was in the run before."""
    (start,) = [line for line in saved_runs["onward"].log if "eval_loss" in line][:1]
    (ended,) = [line for line in saved_runs["moe-experts"].log if "eval_loss" in line][-1:]
    for key in ("loss", "rewards/margins", "empty/rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert start[f"eval_{key}"] == pytest.approx(ended[f"eval_{key}"], rel=TOLERANCE), key
    assert abs(start["eval_rewards/margins"]) > 1e-4


@pytest.mark.parametrize(("kind", "flag"), [("fewer", "adapters"), ("fewer-ref", "ref_adapters")])
def test_an_adapter_of_more_layers_than_the_run_is_told(saved_runs, kind, flag):
    """mcore-bridge would leave the experts' factors unread."""
    assert f"--{flag}: 192 of its tensors have no place in this run's layers" in saved_runs[kind].error


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_in_transformers(saved_runs, workshop, kind):
    run = saved_runs[kind]
    merged = run.folder / f"{CHECKPOINT}-merged"
    require_same_logps(load_model(merged), run, workshop, merged)


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_is_as_complete_as_its_base(saved_runs, workshop, kind):
    """Whoever serves it gets the base model's own sampling settings and end-of-text tokens."""
    base, merged = model_of(kind, workshop), saved_runs[kind].folder / f"{CHECKPOINT}-merged"
    files = {p.name for p in base.iterdir()} - {"rehearsal_model.json"}  # of the tiny model's maker
    assert files <= {p.name for p in merged.iterdir()}
    there, here = (json.loads((f / "generation_config.json").read_text()) for f in (base, merged))
    assert here == there and len(there["eos_token_id"]) == 2


@pytest.mark.parametrize("kind", MODELS)
def test_merging_leaves_every_parameter_as_it_was(saved_runs, kind):
    assert saved_runs[kind].recorded["moved_by_saving"] == []


def test_a_dense_adapter_has_one_form(saved_runs):
    folder = saved_runs["dense"].folder / CHECKPOINT
    assert not (folder / PER_EXPERT).exists() and per_expert_form(str(folder)) == str(folder)


def test_the_form_of_vllm_stays_as_the_bridge_wrote_it(saved_runs):
    """One pair of factors for each expert and projection: what vLLM and the Megatron backend read."""
    folder = saved_runs["moe"].folder / CHECKPOINT / PER_EXPERT
    names = load_file(folder / WEIGHTS).keys()
    assert "base_model.model.model.layers.0.mlp.experts.7.up_proj.lora_B.weight" in names
    config = json.loads((folder / CONFIG).read_text())
    assert {"up_proj", "gate", "q_proj"} <= set(config["target_modules"]) and not config.get("target_parameters")
    assert (folder / "args.json").is_file()


def test_peft_alone_would_make_another_adapter_of_it(saved_runs, workshop):
    """Why there are two forms: peft below 0.19 drops the experts and refuses a router, and later ones scale the experts
    otherwise under rsLoRA."""
    run = saved_runs["moe"]
    with pytest.raises((AssertionError, ValueError), match=r"logps|Target module \w+TopKRouter"):
        loaded = load_adapter(workshop.moe, run.folder / CHECKPOINT / PER_EXPERT)
        require_same_logps(loaded, run, workshop, workshop.moe)


def said_in(run) -> list[str]:
    """What rank 0 of a run has logged."""
    text = run.rank_0.read_text(errors="replace")
    return text.split(f"===== cell {run.folder.name}\n")[1].partition("===== cell ")[0].splitlines()


def test_a_checkpoint_is_published_before_peft_s_form_and_each_part_is_timed(saved_runs):
    said = said_in(saved_runs["moe"])
    first: dict[str, int] = {}
    for i, line in enumerate(said):
        if "INFO" in line:
            first.setdefault(line.partition("] ")[2].rpartition(":")[0] or line, i)
    order = [
        "time: reading and judging rows",
        "time: tokenising, with dataset_num_proc 1",
        "time: building and reading the model",
        "time: first step",
        "time: save: save_weights",
        "time: save: Megatron's files, and the lines of save_weights",
        "time: save: publishing, and removing old checkpoints",
        "time: save: all that a restart needs",
        f"time: save: the adapter of {CHECKPOINT} in peft's form",
        "time: save: all of it",
    ]
    assert [name for name in sorted(first, key=first.get) if name in order] == order
    (whole,) = (i for i, line in enumerate(said) if "The checkpoint is whole" in line)
    (form,) = (i for i, line in enumerate(said) if "is for peft" in line)
    assert whole < form, "a run that is killed in between can go on"


def test_a_run_goes_on_from_a_checkpoint_without_peft_s_form(saved_runs, workshop, tmp_path):
    """As a kill behind the publication leaves it; the next save writes what is missing."""
    before = saved_runs["moe-experts"].folder / CHECKPOINT
    checkpoint = tmp_path / "goes-on" / CHECKPOINT
    shutil.copytree(before, checkpoint)
    for name in (CONFIG, WEIGHTS):
        (checkpoint / name).unlink()
    (checkpoint / DUE).touch()
    flags = oracle_runs.saved_flags(workshop)
    flags += f" --train_iters 3 --mcore_adapter {checkpoint} --finetune false --no_load_rng true"
    cell = oracle_runs.cell("goes-on", flags, hook_args={"save": True}, keep_folder=True)
    run = run_cells(1, [cell], tmp_path)["goes-on"]
    said = "\n".join(said_in(run))
    assert "Going on from step 2" in said and f"{CHECKPOINT} lacks its adapter in peft's form" in said
    for folder in (checkpoint, run.folder / "checkpoint-3"):
        assert not (folder / DUE).exists() and (folder / CONFIG).is_file()
    mended, wanted = load_file(checkpoint / WEIGHTS), load_file(before / WEIGHTS)
    assert mended.keys() == wanted.keys() and all(torch.equal(mended[name], wanted[name]) for name in wanted)


@pytest.fixture
def copied(saved_runs, tmp_path):
    """The MoE adapter as mcore-bridge writes it."""
    for name in (CONFIG, WEIGHTS):
        shutil.copy(saved_runs["moe"].folder / CHECKPOINT / PER_EXPERT / name, tmp_path)
    return tmp_path


def require_no_half_adapter(folder, workshop) -> None:
    """peft would load a part of it without a word, so it must find nothing."""
    assert not (folder / WEIGHTS).exists() and (folder / PER_EXPERT / WEIGHTS).is_file()
    with pytest.raises(ValueError, match=CONFIG):
        load_adapter(workshop.moe, folder)


def test_an_unknown_model_gets_a_reason(copied, workshop, caplog):
    """A dense model's config: its layers have no such experts."""
    with caplog.at_level("INFO", logger="swift"):
        set_aside(copied)
        write_peft_form(copied, AutoConfig.from_pretrained(workshop.dense))
    require_no_half_adapter(copied, workshop)
    assert "has no form for peft" in caplog.text and "mlp.experts" in caplog.text and "--merge_lora" in caplog.text


def test_a_missing_factor_gets_a_reason(copied, workshop, caplog):
    from safetensors.torch import save_file

    tensors = load_file(copied / WEIGHTS)
    del tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, copied / WEIGHTS)
    with caplog.at_level("INFO", logger="swift"):
        set_aside(copied)
        write_peft_form(copied, AutoConfig.from_pretrained(workshop.moe))
    require_no_half_adapter(copied, workshop)
    assert "1 tensors are missing" in caplog.text


@pytest.mark.parametrize("swapped", [False, True])
def test_packed_experts_give_the_same_update(swapped):
    """peft's own rule for a three-dimensional parameter, for both orders it has had."""
    from megatron_bvpo.host.peft_export import pack_experts

    n_experts, rank, n_in, n_out = 3, 2, 5, 7
    a_ERI, b_EOR = torch.randn(n_experts, rank, n_in), torch.randn(n_experts, n_out, rank)
    lora_a, lora_b = pack_experts(a_ERI, b_EOR, swapped=swapped)
    factor_a = lora_a.reshape(n_experts, -1, lora_a.shape[-1])
    factor_b = lora_b.reshape(lora_b.shape[0], -1, n_experts)
    update = torch.einsum("o r e, e r i -> e i o" if swapped else "o r e, e r i -> e o i", factor_b, factor_a)
    torch.testing.assert_close(update, torch.bmm(b_EOR, a_ERI))
