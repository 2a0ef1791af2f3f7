"""Models and runs that the plan's tests plan."""

from __future__ import annotations

from megatron_bvpo.planning.reading import settings_from

MOE, LARGE, DENSE = "Qwen3-30B-A3B-Thinking-2507", "Qwen3-235B-A22B-Thinking-2507", "DeepSeek-R1-0528-Qwen3-8B"
LORA = dict(tuner_type="lora", lora_rank=16, lora_dropout=0, max_length=4096)
FULL = dict(tuner_type="full", max_length=4096)
OFFLOADED = dict(optimizer_cpu_offload=True, use_precision_aware_optimizer=True)


def settings(**values):
    return settings_from({**LORA, **values})
