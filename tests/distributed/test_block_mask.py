"""Masking the empty block or not: nothing for sigmoid and hinge, another loss for all that count tokens.

The template's own batches through a Hugging Face model in float64, so that "nothing" is far below 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from megatron_bvpo.data.batches import TemplateSettings, make_bvpo_template
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.objective.preference import PairLogps, PreferenceConfig, pair_losses
from megatron_bvpo.objective.stream_losses import sequence_logps
from tests.distributed.hf_oracle import EMPTY_BLOCK, load_model, read_rows
from tests.distributed.oracle_runs import other_dense


@pytest.fixture(scope="module")
def encoded(workshop) -> dict[bool, dict]:
    """The first row's empty pair as the template encodes it, with the block masked and not."""
    from swift.model import get_processor
    from swift.template import get_template

    row = read_rows(workshop.train)[0]
    found = {}
    for mask_block in (True, False):
        template = get_template(
            get_processor(str(workshop.dense), model_type="qwen3"),
            template_type="qwen3_thinking",
            loss_scale="last_round",
        )
        template.set_mode("rlhf")
        make_bvpo_template(template, TemplateSettings(RowRules(), EMPTY_BLOCK, mask_block=mask_block))
        found[mask_block] = template.encode(dict(row))
    return found


@pytest.fixture(scope="module")
def models(workshop):
    return load_model(workshop.dense), load_model(other_dense(workshop))


def loss_and_gradient(encoded: dict, models, config: PreferenceConfig):
    policy, reference = models
    weights = {name: param.detach().clone().requires_grad_() for name, param in policy.named_parameters()}
    sums = {}
    for side in ("chosen", "rejected"):
        ids = torch.tensor(encoded[f"empty_{side}_input_ids"])
        labels = torch.tensor(encoded[f"empty_{side}_labels"])
        inputs = {"input_ids": ids[None], "use_cache": False}
        for name, output in (
            (side, functional_call(policy, weights, kwargs=inputs)),
            (f"ref_{side}", reference(**inputs)),
        ):
            logps = output.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            sums[name], counts = sequence_logps(logps[None], labels[None, 1:], None)
        sums[f"ref_{side}"] = sums[f"ref_{side}"].detach()
        sums[f"{side}_tokens"] = counts
    loss = pair_losses(PairLogps(**sums), config).loss.sum()
    gradient = torch.autograd.grad(loss, list(weights.values()))
    return loss.item(), torch.cat([g.flatten() for g in gradient])


def difference(encoded, models, config: PreferenceConfig) -> tuple[float, float]:
    """Relative differences of loss and gradient between a masked and an unmasked block."""
    (loss, gradient), (other_loss, other_gradient) = (
        loss_and_gradient(encoded[mask_block], models, config) for mask_block in (True, False)
    )
    return abs(other_loss - loss) / abs(loss), ((other_gradient - gradient).norm() / gradient.norm()).item()


def test_the_two_encodings_differ_by_the_block_alone(encoded):
    for side in ("chosen", "rejected"):
        masked, scored = (encoded[mask_block][f"empty_{side}_labels"] for mask_block in (True, False))
        assert encoded[True][f"empty_{side}_input_ids"] == encoded[False][f"empty_{side}_input_ids"]
        newly = [i for i, (a, b) in enumerate(zip(masked, scored, strict=True)) if a != b]
        assert newly and all(masked[i] == -100 for i in newly)
        assert newly == list(range(newly[0], newly[-1] + 1)) and masked[newly[-1] + 1] != -100


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_it_cancels_in_losses_of_the_plain_difference(encoded, models, loss_type):
    loss, gradient = difference(encoded, models, PreferenceConfig(loss_type))
    assert loss < 1e-9 and gradient < 1e-6  # the model computes its norms and rotations in float32


@pytest.mark.parametrize(
    "config",
    [PreferenceConfig("ipo"), PreferenceConfig("simpo", beta=2.0), PreferenceConfig(rpo_alpha=0.5)],
    ids=["ipo", "simpo", "rpo"],
)
def test_it_does_not_where_tokens_are_counted(encoded, models, config):
    loss, gradient = difference(encoded, models, config)
    assert loss > 1e-3 and gradient > 1e-2
