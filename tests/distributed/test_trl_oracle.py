"""The same pairs through TRL's own DPOTrainer: its tokens, its collator, its loss function, in float64."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from megatron_bvpo.objective.preference import PreferenceConfig, pair_losses
from tests.distributed import oracle_runs
from tests.distributed.hf_oracle import STREAMS, Oracle, load_model, pair_of, read_rows
from tests.distributed.oracle_recorder import pair_logps

# Qwen's chat markup. Thinking turned off writes the empty block, which then belongs to the prompt.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
TOLERANCE = 1e-5
RPO = 0.5
# our loss: TRL's names and weights. TRL has no RPO; its `sft` term on one pair is RPO's.
LOSSES = {
    "sigmoid": (PreferenceConfig(), ["sigmoid"], [1.0]),
    "hinge": (PreferenceConfig("hinge"), ["hinge"], [1.0]),
    "ipo": (PreferenceConfig("ipo"), ["ipo"], [1.0]),
    "rpo": (PreferenceConfig(rpo_alpha=RPO), ["sigmoid", "sft"], [1.0, RPO]),
}


def as_trl_row(row: dict, stream: str) -> dict:
    pair = pair_of(row, stream)
    return {
        "prompt": [{"role": "user", "content": pair.question}],
        "chosen": [{"role": "assistant", "content": pair.block + pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.block + pair.rejected}],
        "chat_template_kwargs": {"enable_thinking": stream == "trace"},
    }


def make_trainer(policy, reference, tokenizer, rows: list[dict], folder):
    from trl import DPOConfig, DPOTrainer

    tokenizer.chat_template = CHAT_TEMPLATE
    config = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None
    )
    data = Dataset.from_list(rows)
    return DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)


@pytest.fixture(scope="module", params=["moe", "dense"])
def merged(request, workshop, saved_runs):
    """(the run, TRL's policy with the run's adapter multiplied out, its reference, tokenizer)."""
    run = saved_runs[request.param]
    scale = {"moe": oracle_runs.RSLORA_SCALE, "dense": oracle_runs.LORA_SCALE}[request.param]
    oracle = Oracle(getattr(workshop, request.param), run.recorded["adapter"], scale)
    policy = load_model(getattr(workshop, request.param))
    policy.load_state_dict({name: weight.detach() for name, weight in oracle.policy.items()}, strict=False)
    return run, policy, oracle.model, oracle.tokenizer


@pytest.mark.parametrize("stream", STREAMS)
def test_as_in_trl(merged, stream, workshop, tmp_path):
    run, policy, reference, tokenizer = merged
    rows = read_rows(workshop.train)
    pairs = [pair for pair in run.recorded["pairs"] if pair["stream"] == stream]
    texts = [as_trl_row(rows[pair["row"]], stream) for pair in pairs]
    trainer = make_trainer(policy, reference, tokenizer, texts, tmp_path)

    sums = dict.fromkeys(LOSSES, 0.0)
    for pair, item in zip(pairs, trainer.train_dataset, strict=True):
        sequences = run.recorded["sequences"][stream, pair["row"]]
        for side, (ids, labels) in zip(("chosen", "rejected"), sequences, strict=True):
            assert item["prompt_ids"] + item[f"{side}_ids"] == ids.tolist()
            assert item[f"{side}_ids"] == labels[labels != -100].tolist()
        ours = pair_logps(pair)
        for name, (config, trainer.loss_types, trainer.loss_weights) in LOSSES.items():
            with torch.no_grad():
                theirs = trainer.compute_loss(trainer.model, trainer.data_collator([item])).item()
            assert pair_losses(ours, config).loss.item() == pytest.approx(theirs, rel=TOLERANCE), (name, pair)
            sums[name] += theirs
        seen = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
        assert ours.chosen.item() == pytest.approx(seen["logps/chosen"], rel=TOLERANCE)
        assert ours.rejected.item() == pytest.approx(seen["logps/rejected"], rel=TOLERANCE)
    assert run.log[0][f"loss/{stream}"] == pytest.approx(sums["sigmoid"] / len(pairs), rel=TOLERANCE)
