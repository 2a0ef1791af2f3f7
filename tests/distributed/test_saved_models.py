"""What a run leaves on disk, loaded as its users do: the adapter in peft, the merged model in transformers.

Both must give the log-probs of the run's last evaluation, which came after its last step.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_bvpo.host.peft_export import FOLDER, write_peft_form
from tests.distributed.hf_oracle import load_model, mean_logps, read_rows

TOLERANCE = 1e-5
MODELS = ["moe", "dense"]
CHECKPOINT = "checkpoint-2"


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


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapter_in_peft(saved_runs, workshop, kind):
    run, base = saved_runs[kind], getattr(workshop, kind)
    folder = run.folder / CHECKPOINT
    model = load_adapter(base, folder / FOLDER if kind == "moe" else folder)
    require_same_logps(model, run, workshop, base)
    with model.disable_adapter(), pytest.raises(AssertionError):  # the adapter is what makes them so
        require_same_logps(model, run, workshop, base)


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_in_transformers(saved_runs, workshop, kind):
    run = saved_runs[kind]
    merged = run.folder / f"{CHECKPOINT}-merged"
    require_same_logps(load_model(merged), run, workshop, merged)


@pytest.mark.parametrize("kind", MODELS)
def test_merging_leaves_every_parameter_as_it_was(saved_runs, kind):
    assert saved_runs[kind].recorded["moved_by_saving"] == []


def test_a_dense_adapter_has_one_form(saved_runs):
    assert not (saved_runs["dense"].folder / CHECKPOINT / FOLDER).exists()


def test_the_ordinary_moe_adapter_stays_as_the_bridge_wrote_it(saved_runs):
    """One pair of factors for each expert and projection: what vLLM and ms-swift read."""
    names = load_file(saved_runs["moe"].folder / CHECKPOINT / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.mlp.experts.7.up_proj.lora_B.weight" in names


def test_peft_alone_would_drop_the_experts(saved_runs, workshop, tmp_path):
    """Why the second form exists. When this fails, peft has learnt to read the first one."""
    import peft

    source = saved_runs["moe"].folder / CHECKPOINT
    shutil.copy(source / "adapter_model.safetensors", tmp_path)
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"].remove("gate")  # the router is no Linear in transformers 5, which peft refuses
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = peft.get_peft_model_state_dict(load_adapter(workshop.moe, tmp_path))
    assert loaded and not any("experts" in name for name in loaded)


@pytest.fixture
def copied(saved_runs, tmp_path):
    """The MoE adapter without its peft form, to write it again."""
    for file in (saved_runs["moe"].folder / CHECKPOINT).glob("adapter_*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_an_unknown_model_gets_a_reason(copied, workshop, caplog):
    """A dense model's config: its layers have no such experts."""
    with caplog.at_level("INFO", logger="swift"):
        write_peft_form(copied, AutoConfig.from_pretrained(workshop.dense))
    assert not (copied / FOLDER).exists()
    assert "No peft/ form" in caplog.text and "mlp.experts" in caplog.text and "--merge_lora" in caplog.text


def test_a_missing_factor_gets_a_reason(copied, workshop, caplog):
    from safetensors.torch import save_file

    tensors = load_file(copied / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, copied / "adapter_model.safetensors")
    with caplog.at_level("INFO", logger="swift"):
        write_peft_form(copied, AutoConfig.from_pretrained(workshop.moe))
    assert not (copied / FOLDER).exists() and "1 tensors are missing" in caplog.text


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
