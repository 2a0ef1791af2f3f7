"""Losses of single responses against TRL's own loss function, in closed form, and at their edges."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_bvpo.objective.unpaired import (
    ResponseLogps,
    UnpairedConfig,
    kl_baseline,
    kl_sums,
    unpaired_losses,
)

RIGHT, WRONG = [True] * 3, [False] * 3


def random_responses(desirable, seed: int = 0) -> ResponseLogps:
    generator = torch.Generator().manual_seed(seed)
    n = len(desirable)
    reference = -100 - 300 * torch.rand(n, generator=generator, dtype=torch.float64)
    policy = reference + 8 * torch.randn(n, generator=generator, dtype=torch.float64)
    tokens = torch.randint(20, 400, (n,), generator=generator).double()
    return ResponseLogps(policy.requires_grad_(), reference, tokens, torch.tensor(desirable))


def mismatched(seed: int, n: int = 7):
    """(policy, reference, weights) of mismatched responses."""
    found = random_responses([True] * n, seed)
    return found.policy.detach(), found.reference, torch.ones(n, dtype=torch.float64)


def trl_losses(responses: ResponseLogps, config: UnpairedConfig, others):
    """TRL's losses and rewards in the order of our responses; its z."""
    from trl.experimental.kto import KTOTrainer

    theirs = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        loss_type=config.loss_type,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        calculate_KL=config.uses_baseline,
    )
    right, p, r = responses.desirable, responses.policy, responses.reference
    losses, chosen, rejected, kl = KTOTrainer.kto_loss(
        theirs, p[right], p[~right], others[0], r[right], r[~right], others[1]
    )
    order = torch.cat([torch.nonzero(right), torch.nonzero(~right)])[:, 0].argsort()
    return losses[order], torch.cat([chosen, rejected])[order], kl


@pytest.mark.parametrize("desirable", [RIGHT + WRONG, RIGHT, WRONG, [False, True], [True], [False]], ids=len)
@pytest.mark.parametrize("loss_type, seed", [("kto", 1), ("kto", 0), ("apo_zero_unpaired", 1)])
@pytest.mark.parametrize("beta, weights", [(0.1, (1.0, 1.0)), (0.5, (1.3, 0.7))])
def test_as_in_trl(loss_type, seed, beta, weights, desirable):
    """Seed 1 has a z of 0, seed 0 one above 0 (see below)."""
    config = UnpairedConfig(loss_type, beta, *weights)
    ours, theirs, others = random_responses(desirable), random_responses(desirable), mismatched(seed)
    z = kl_baseline(kl_sums(*others)) if config.uses_baseline else None
    found = unpaired_losses(ours, z, config)
    losses, rewards, kl = trl_losses(theirs, config, others)
    assert loss_type != "kto" or z.item() == pytest.approx(kl.item(), rel=1e-12)
    torch.testing.assert_close(found.loss, losses, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.rewards, rewards, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss.sum(), p)[0] for loss, p in ((found.loss, ours.policy), (losses, theirs.policy))]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-16)
    assert not found.rewards.requires_grad


def test_the_cases_above_have_a_z_of_either_kind():
    means = [float((p - r).mean()) for p, r, _ in map(mismatched, (1, 0))]
    assert means[0] < 0 < means[1]


def test_numbers_worked_out_by_hand():
    """Log-ratios of +4 and −2 against z = 1."""
    responses = ResponseLogps(*torch.tensor([[-20.0, -12], [-24, -10], [10, 5]]).double(), torch.tensor([True, False]))
    z = torch.tensor(1.0, dtype=torch.float64)
    loss = unpaired_losses(responses, z, UnpairedConfig("kto", 0.1, 2.0, 3.0)).loss.tolist()
    assert loss[0] == pytest.approx(2 / (1 + math.exp(0.1 * (4 - 1))), rel=1e-14)
    assert loss[1] == pytest.approx(3 / (1 + math.exp(0.1 * (1 + 2))), rel=1e-14)
    zero = unpaired_losses(responses, None, UnpairedConfig("apo_zero_unpaired", 0.1)).loss.tolist()
    assert zero == pytest.approx([1 / (1 + math.exp(0.4)), 1 / (1 + math.exp(0.2))], rel=1e-14)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_slope_is_the_closed_form(loss_type):
    """∂/∂r of λσ(∓β(r − z)) is ∓λβσ(1 − σ), and nothing flows into z or the reference."""
    config = UnpairedConfig(loss_type, 0.3, 1.5, 0.5)
    responses = random_responses(RIGHT + WRONG, 5)
    responses = replace(responses, reference=responses.reference.requires_grad_())
    z = torch.tensor(0.7, dtype=torch.float64, requires_grad=True) if config.uses_baseline else None
    unpaired_losses(responses, z, config).loss.sum().backward()
    sign = torch.where(responses.desirable, -1.0, 1.0).double()
    weight = torch.tensor([1.5] * 3 + [0.5] * 3, dtype=torch.float64)
    gain = (responses.policy - responses.reference - (0.0 if z is None else 0.7)).detach()
    s = torch.sigmoid(0.3 * sign * gain)
    torch.testing.assert_close(responses.policy.grad, sign * weight * 0.3 * s * (1 - s), rtol=1e-12, atol=0)
    assert z is None or z.grad is None


def test_a_loss_near_zero_keeps_its_digits():
    """A right response of log-ratio 400: 1 − σ(40) would be 0."""
    responses = ResponseLogps(*torch.tensor([[0.0], [-400], [9]]).double(), torch.tensor([True]))
    loss = unpaired_losses(responses, None, UnpairedConfig("apo_zero_unpaired", 0.1)).loss
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-12)


# --- z ---


def test_z_is_the_mean_over_the_global_batch():
    """Sums of ranks with 5, 2, 0 responses and one that only fills; not the mean of the ranks' means."""
    policy, reference, ones = mismatched(0)
    weights = torch.tensor([1.0, 1, 1, 1, 1, 1, 0]).double()
    policy[-1] = float("nan")
    parts = [slice(0, 5), slice(5, 5), slice(5, 7)]
    total = sum(kl_sums(policy[p], reference[p], weights[p]) for p in parts)
    assert total[1] == 6
    mean = (policy - reference)[:6].mean()
    assert mean > 0 and kl_baseline(total).item() == pytest.approx(mean.item(), rel=1e-14)
    means = [kl_baseline(kl_sums(policy[p], reference[p], weights[p])).item() for p in parts]
    assert sum(means) / 3 != pytest.approx(mean.item(), rel=1e-3)


@pytest.mark.parametrize("sums, z", [([-3.0, 4], 0.0), ([0.0, 0], 0.0), ([6.0, 4], 1.5)])
def test_z_is_never_below_0_and_0_without_responses(sums, z):
    assert kl_baseline(torch.tensor(sums, dtype=torch.float64)).item() == z


def test_nothing_flows_through_z():
    policy, reference, weights = mismatched(0)
    assert not kl_baseline(kl_sums(policy.requires_grad_(), reference, weights)).requires_grad


# --- settings ---


def test_a_beta_for_the_empty_stream():
    config = UnpairedConfig(beta=0.1, empty_beta=0.4)
    assert (config.of("trace").beta, config.of("empty").beta) == (0.1, 0.4)
    assert UnpairedConfig(beta=0.1).of("empty").beta == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sigmoid"},
        {"beta": 0.0},
        {"beta": math.inf},
        {"empty_beta": -1.0},
        {"desirable_weight": 0.0},
        {"undesirable_weight": float("nan")},
    ],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        UnpairedConfig(**changes)


def test_a_baseline_is_given_where_one_is_needed_and_nowhere_else():
    responses, z = random_responses(RIGHT), torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a baseline"):
        unpaired_losses(responses, None, UnpairedConfig("kto"))
    with pytest.raises(ValueError, match="has no baseline"):
        unpaired_losses(responses, z, UnpairedConfig("apo_zero_unpaired"))
