"""Settings under which alpha cannot be measured are refused by name, and BVPO's other refusals with them."""

from __future__ import annotations

import re

import pytest

from tests.distributed.forks import zygotes
from tests.distributed.short_runs import assert_told, flags

pytestmark = pytest.mark.slow

FIXED = "fix the weights (--bvpo_alpha NUMBER; --bvpo_weights NAME=NUMBER … of others), or leave the flag out"
BF16 = {"torch_dtype": "bfloat16", "bf16": "true"}
OFFLOAD = {"optimizer_cpu_offload": "true", "use_precision_aware_optimizer": "true", **BF16}
WHOLE = {"dist_ckpt_optim_fully_reshardable": "true"}
# case: (flags, flag that is named, reason, remedy)
AUTO = {
    "fp16": ({"fp16": "true"}, "fp16", "the moments of gradients under a moving loss scale are not measured"),
    # ms-swift sets fp16 itself, later than the first look.
    "fp16 by its data type": (
        {"torch_dtype": "float16", "fp16": None, "bf16": None},
        "fp16",
        "the moments of gradients under a moving loss scale are not measured",
    ),
    "bf16 main gradients": (
        {"main_grads_dtype": "bf16"},
        "main_grads_dtype",
        "differences of bf16 gradients are noise",
    ),
    "precision-aware optimizer": (
        {"use_precision_aware_optimizer": "true"},
        "use_precision_aware_optimizer",
        "never tested with probes",
    ),
    "CPU offload": (
        OFFLOAD | WHOLE,
        "use_precision_aware_optimizer",
        "never tested with probes",
    ),
    "sorted batches": (
        {"group_by_length": "true", "padding_free": "false"},
        "group_by_length",
        "halves of a batch sorted by length are not alike",
    ),
}
ALWAYS = {
    "Megatron-FSDP": (
        {"use_megatron_fsdp": "true"},
        "use_megatron_fsdp",
        r"Megatron-FSDP hides the finalised gradients that BVPO needs; use the distributed optimizer \(the default\)",
    ),
    "Muon": (
        {"optimizer": "muon"},
        "optimizer",
        "Muon's update is not linear in the gradient, .*; use --optimizer adam",
    ),
    "capacity factor": (
        {"moe_expert_capacity_factor": 1.5},
        "moe_expert_capacity_factor",
        "dropping tokens by capacity makes one stream's gradient depend on the other; leave the flag out",
    ),
    "a capacity factor behind the flags": (
        {"megatron_extra_kwargs": '{"moe_expert_capacity_factor": 1.5}'},
        "moe_expert_capacity_factor",
        "dropping tokens by capacity makes one stream's gradient depend on the other; leave the flag out",
    ),
    "CPU offload that cannot be resumed": (
        OFFLOAD,
        "optimizer_cpu_offload",
        "its checkpoints forget Adam's step, .*; add --dist_ckpt_optim_fully_reshardable true",
    ),
    "CPU offload in float32": (
        {"optimizer_cpu_offload": "true"},
        "optimizer_cpu_offload",
        "megatron-core takes a bf16 model only with the optimizer on the host; train in bf16",
    ),
    "CPU offload in fp16": (
        OFFLOAD | WHOLE | {"torch_dtype": "float16", "fp16": "true", "bf16": None},
        "optimizer_cpu_offload",
        "megatron-core takes a bf16 model only .*; train in bf16",
    ),
    "CPU offload beside float32 parameters on the GPU": (
        OFFLOAD | WHOLE | {"use_precision_aware_optimizer": "false"},
        "optimizer_cpu_offload",
        ".* no checkpoint could be resumed; add --use_precision_aware_optimizer true",
    ),
    "CPU offload in part": (
        OFFLOAD | WHOLE | {"optimizer_offload_fraction": 0.5},
        "optimizer_offload_fraction",
        "the part on the GPU would count no steps after a resume; leave the flag out, so that all is on the host",
    ),
    "contiguous context parallelism": (
        {"cp_partition_mode": "contiguous"},
        "cp_partition_mode",
        "megatron-core's attention knows zigzag parts only, .*; leave the flag out",
    ),
    "another bridge": (
        {"bridge_backend": "megatron-bridge", "tuner_type": "full"},
        "bridge_backend",
        "heads, adapters, checkpoints and merges are known with mcore-bridge only; leave the flag out",
    ),
    "a reference model beside LoRA": (
        {"ref_model": "there"},
        "ref_model",
        "the reference of a run with adapters is the model without them, .*; leave the flag out",
    ),
    "LoRA's flags without LoRA": (
        {"tuner_type": None, "lora_rank": 16},
        "lora_rank",
        "without adapters nothing would read it; add --tuner_type lora",
    ),
    "weights of tokens": (
        {"loss_scale": "last_round+hermes"},
        "loss_scale",
        "BVPO counts the two responses, each token once: no earlier turn, no prompt, no weights; leave the flag out",
    ),
}
UNREAD = {
    "sequence_packing_scheduler": ("dp_balanced", "nothing in ms-swift .* reads it; pack with --packing true"),
    "num_generations": (4, "it belongs to GRPO, .*; leave the flag out"),
    "attn_impl": ("flash_attn", "the Megatron backend builds the model itself, .*; use --attention_backend"),
}


def told(workshop, folder, given: dict, alpha) -> object:
    return zygotes().run(folder / "out", flags(workshop, bvpo_alpha=alpha, **given))


@pytest.mark.parametrize("case", AUTO)
def test_refused_with_auto(case, workshop, tmp_path):
    given, flag, reason = AUTO[case]
    assert_told(told(workshop, tmp_path, given, "auto"), f"--{flag}: {flag} is .*: {reason}; {re.escape(FIXED)}")


@pytest.mark.parametrize("case", ALWAYS)
@pytest.mark.parametrize("alpha", ["auto", 0.5])
def test_refused_always(case, alpha, workshop, tmp_path):
    given, flag, reason = ALWAYS[case]
    assert_told(told(workshop, tmp_path, given, alpha), f"--{flag}: {flag} is .*: {reason}")


@pytest.mark.parametrize("flag", UNREAD)
def test_a_flag_that_nothing_reads_is_told(flag, workshop, tmp_path):
    value, reason = UNREAD[flag]
    message = f"--{flag}: {flag} is '?{value}'? and would change nothing: {reason}"
    assert_told(told(workshop, tmp_path, {flag: value}, 0.5), message)


def test_an_adapter_whose_start_moved_the_base_model_is_told(workshop, tmp_path):
    """OLoRA, PiSSA and CorDA put a part of the base weights into the factors."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8, "init_lora_weights": "olora"}')
    message = f"{adapter}/adapter_config.json: --adapters: init_lora_weights is 'olora', and the Megatron backend .*"
    assert_told(told(workshop, tmp_path, {"adapters": adapter}, 0.5), message)


@pytest.mark.parametrize("flag", ["init_lora_weights", "init_weights", "use_dora", "target_parameters"])
def test_forms_of_lora_that_the_backend_lacks_are_no_flags(flag, workshop, tmp_path):
    assert_told(told(workshop, tmp_path, {flag: "olora"}, 0.5), f"--{flag}: no such flag.*")


BRIDGE = "megatron-bridge"


@pytest.mark.parametrize(
    ("tuner", "packages", "answer"),
    [
        ("full", [], f'bridge_backend="{BRIDGE}" requires the `{BRIDGE}` package. .*'),
        ("lora", ["megatron.bridge"], f'LoRA training is not yet supported with bridge_backend="{BRIDGE}". .*'),
    ],
)
def test_the_other_bridge_without_our_refusal_ends_before_the_model(tuner, packages, answer, workshop, tmp_path):
    """Its package is no dependency of ms-swift's; with it, ms-swift would go on with full tuning only."""
    hook = {"hook": "tests.distributed.without_refusals:allow_everything", "hook_args": {"packages": packages}}
    given = flags(workshop, bridge_backend=BRIDGE, tuner_type=tuner)
    assert_told(zygotes().run(tmp_path / "out", given, **hook), f".*{answer}")


def test_a_fixed_alpha_is_free_of_the_first_kind(workshop, tmp_path):
    given, _, _ = AUTO["sorted batches"]
    told(workshop, tmp_path, given | {"save_safetensors": "false"}, 0.5).require_success()
