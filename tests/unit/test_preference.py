"""Preference losses against TRL's and ms-swift's own loss functions, and formulas written out by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_bvpo.objective.preference import PairLogps, PreferenceConfig, StreamSums, pair_losses
from megatron_bvpo.objective.stream_losses import WIDTH, stacked
from megatron_bvpo.objective.streams import mixing_factors, stream_metrics

PAIRS = 64


def random_pairs(seed: int = 0, **changes) -> PairLogps:
    """Log-probs of responses of 20 to 400 tokens; the policy is about as near its reference as in training."""
    generator = torch.Generator().manual_seed(seed)

    def side():
        tokens = torch.randint(20, 400, (PAIRS,), generator=generator).double()
        ref = -tokens * (1 + torch.rand(PAIRS, generator=generator, dtype=torch.float64))
        policy = ref + 12 * torch.randn(PAIRS, generator=generator, dtype=torch.float64)
        return policy.requires_grad_(), ref, tokens

    chosen, ref_chosen, chosen_tokens = side()
    rejected, ref_rejected, rejected_tokens = side()
    pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return replace(pairs, **changes)


def slopes(loss, pairs: PairLogps):
    return torch.autograd.grad(loss.sum(), [pairs.chosen, pairs.rejected], allow_unused=True)


def same_loss_and_slopes(config: PreferenceConfig, formula, seed: int = 0):
    ours, theirs = random_pairs(seed), random_pairs(seed)
    loss, expected = pair_losses(ours, config).loss, formula(theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(slopes(loss, ours), slopes(expected, theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0)])
@pytest.mark.parametrize("reference_free", [False, True])
def test_as_in_ms_swift(loss_type, smoothing, beta, reference_free):
    from swift.rlhf_trainers import DPOTrainer

    theirs = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        f_divergence_type="reverse_kl",
        reference_free=reference_free,
        label_smoothing=smoothing,
        beta=beta,
    )

    def swift_loss(p: PairLogps):
        return DPOTrainer.dpo_loss(theirs, p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, loss_type)[0]

    config = PreferenceConfig(loss_type, beta, label_smoothing=smoothing, reference_free=reference_free)
    same_loss_and_slopes(config, swift_loss)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_as_in_trl(gamma, smoothing):
    from trl.experimental.cpo import CPOTrainer

    beta = 2.0
    theirs = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=smoothing,
    )

    def trl_loss(p: PairLogps):
        return CPOTrainer.cpo_loss(theirs, p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens)[0]

    config = PreferenceConfig("simpo", beta, label_smoothing=smoothing, simpo_gamma=gamma)
    same_loss_and_slopes(config, trl_loss)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_by_hand(beta):
    def squared(p: PairLogps):
        gain = (p.chosen - p.ref_chosen) / p.chosen_tokens - (p.rejected - p.ref_rejected) / p.rejected_tokens
        return (gain - 0.5 / beta).square()

    same_loss_and_slopes(PreferenceConfig("ipo", beta), squared)


@pytest.mark.parametrize("beta", [0.5, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_norm_by_hand(beta, smoothing):
    """open-instruct's dpo_norm. TRL's of 1.16, which ms-swift does not allow yet: test_newest_trl.py."""

    def normed(p: PairLogps):
        logits = beta * (
            (p.chosen - p.ref_chosen) / p.chosen_tokens - (p.rejected - p.ref_rejected) / p.rejected_tokens
        )
        return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)

    same_loss_and_slopes(PreferenceConfig("sigmoid_norm", beta, label_smoothing=smoothing), normed)


def test_a_response_without_a_counted_token_is_no_division_by_zero():
    zero = torch.zeros(PAIRS, dtype=torch.float64)
    pairs = random_pairs(chosen=zero.clone().requires_grad_(), ref_chosen=zero, chosen_tokens=zero)
    loss = pair_losses(pairs, PreferenceConfig("sigmoid_norm", 5.0)).loss
    gain = (pairs.rejected - pairs.ref_rejected) / pairs.rejected_tokens
    torch.testing.assert_close(loss, -logsigmoid(-5.0 * gain), rtol=1e-12, atol=0)
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes(loss, pairs))


@pytest.mark.parametrize("rpo_alpha", [0.1, 1.0])
def test_rpo_adds_the_mean_negative_log_likelihood_of_the_chosen_response(rpo_alpha):
    def with_nll(p: PairLogps):
        margin = (p.chosen - p.ref_chosen) - (p.rejected - p.ref_rejected)
        return -logsigmoid(0.1 * margin) - rpo_alpha * p.chosen / p.chosen_tokens

    same_loss_and_slopes(PreferenceConfig(rpo_alpha=rpo_alpha), with_nll)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "simpo"])
def test_numbers_worked_out_by_hand(loss_type):
    """One pair in round numbers: gains of +4 and −2 over 10 and 5 tokens."""
    one = torch.ones(1, dtype=torch.float64)
    pair = PairLogps(-20 * one, -12 * one, -24 * one, -10 * one, 10 * one, 5 * one)
    expected = {
        "sigmoid": math.log(1 + math.exp(-0.1 * 6)),
        "sigmoid_norm": math.log(1 + math.exp(-0.1 * (0.4 + 0.4))),
        "hinge": 1 - 0.1 * 6,
        "ipo": (0.4 + 0.4 - 5) ** 2,
        "simpo": math.log(1 + math.exp(-(0.1 * (-2.0 + 2.4) - 1.0))),
    }
    losses = pair_losses(pair, PreferenceConfig(loss_type, 0.1))
    assert losses.loss.item() == pytest.approx(expected[loss_type], rel=1e-12)
    assert losses.nll.item() == pytest.approx(2.0)


def test_a_beta_for_each_stream():
    config = PreferenceConfig("sigmoid_norm", 5.0, empty_beta=0.5, short_beta=2.0)
    assert [config.of(stream).beta for stream in ("trace", "empty", "short")] == [5.0, 0.5, 2.0]
    same_loss_and_slopes(config.of("empty"), lambda p: pair_losses(p, PreferenceConfig("sigmoid_norm", 0.5)).loss)
    assert PreferenceConfig(beta=0.3).of("empty").beta == 0.3


def test_rewards_are_beta_times_the_gain():
    pairs = random_pairs()
    losses = pair_losses(pairs, PreferenceConfig(beta=0.3))
    torch.testing.assert_close(losses.chosen_rewards, 0.3 * (pairs.chosen - pairs.ref_chosen).detach())
    torch.testing.assert_close(losses.rejected_rewards, 0.3 * (pairs.rejected - pairs.ref_rejected).detach())
    assert not losses.chosen_rewards.requires_grad


@pytest.mark.parametrize(
    "loss_type, cancels",
    [("sigmoid", True), ("hinge", True), ("sigmoid_norm", False), ("ipo", False), ("simpo", False)],
)
def test_a_prefix_of_both_responses_cancels_in_losses_of_the_plain_difference(loss_type, cancels):
    """What makes masking the empty block a matter of taste there, and a must elsewhere."""
    prefix, tokens = -9.0, 4.0
    plain = random_pairs()
    longer = replace(
        plain,
        chosen=plain.chosen + prefix,
        rejected=plain.rejected + prefix,
        ref_chosen=plain.ref_chosen + 2 * prefix,
        ref_rejected=plain.ref_rejected + 2 * prefix,
        chosen_tokens=plain.chosen_tokens + tokens,
        rejected_tokens=plain.rejected_tokens + tokens,
    )
    config = PreferenceConfig(loss_type, 0.1)
    assert torch.allclose(pair_losses(plain, config).loss, pair_losses(longer, config).loss, rtol=1e-9) == cancels
    with_nll = replace(config, rpo_alpha=0.5)
    assert not torch.allclose(pair_losses(plain, with_nll).loss, pair_losses(longer, with_nll).loss, rtol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "kto_pair"},
        {"beta": 0.0},
        {"beta": float("nan")},
        {"empty_beta": 0.0},
        {"short_beta": math.inf},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"loss_type": "ipo", "label_smoothing": 0.1},
    ],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes)) if len(changes) == 1 else "label_smoothing"):
        PreferenceConfig(**changes)


def test_weights_and_metrics_are_means_over_pairs():
    """Two micro-batches of 3 and 1 pairs of one stream, 2 and 2 of the other, against the sums by hand."""
    config, alpha = PreferenceConfig(), 0.3
    pairs = random_pairs(3)
    losses = pair_losses(pairs, config)

    def part(first: int, last: int, weights=None) -> StreamSums:
        def cut(x):
            return x[first:last]

        some = PairLogps(*(cut(getattr(pairs, name)) for name in PairLogps.__dataclass_fields__))
        ones = torch.ones(last - first, dtype=torch.float64) if weights is None else torch.tensor(weights)
        return StreamSums.of(some, pair_losses(some, config), ones)

    def added(*parts: StreamSums) -> StreamSums:
        return StreamSums(*torch.stack([stacked(p) for p in parts]).sum(0))

    # The last pair of the empty stream only fills a batch: weight 0.
    trace, empty = added(part(0, 3), part(3, 4)), added(part(4, 6), part(6, 8, [1.0, 0.0]))
    means = {"trace": losses.loss[:4].mean().item(), "empty": losses.loss[4:7].mean().item()}
    weights = {"trace": alpha, "empty": 1 - alpha}
    factors = mixing_factors(weights, {"trace": float(trace.pairs), "empty": float(empty.pairs)})
    mixed = factors["trace"] * trace.loss + factors["empty"] * empty.loss
    assert mixed.item() == pytest.approx(alpha * means["trace"] + (1 - alpha) * means["empty"], rel=1e-12)

    metrics = {
        name: float(s / n)
        for name, (s, n) in stream_metrics({"trace": trace, "empty": empty}, weights, rpo=True).items()
    }
    assert metrics["loss"] == pytest.approx(mixed.item(), rel=1e-12)
    for name, mean in means.items():
        assert metrics[f"loss/{name}"] == pytest.approx(mean, rel=1e-12)
    assert metrics["logps/chosen"] == pytest.approx(pairs.chosen[:4].mean().item(), rel=1e-12)
    assert metrics["empty/logps/rejected"] == pytest.approx(pairs.rejected[4:7].mean().item(), rel=1e-12)
    better = (losses.chosen_rewards > losses.rejected_rewards).double()
    assert metrics["rewards/accuracies"] == better[:4].mean().item()
    assert metrics["empty/nll_loss"] == pytest.approx(losses.nll[4:7].mean().item(), rel=1e-12)


def test_a_stream_without_pairs_has_no_weight_and_no_metrics():
    assert mixing_factors({"trace": 0.3, "empty": 0.7}, {"trace": 0.0, "empty": 4.0}) == {"trace": 0.0, "empty": 0.175}
    none = StreamSums(*torch.zeros(WIDTH, dtype=torch.float64))
    some = StreamSums(*torch.ones(WIDTH, dtype=torch.float64))
    metrics = stream_metrics({"trace": some, "empty": none}, {"trace": 1.0, "empty": 0.0}, rpo=False)
    assert not any(name.startswith("empty/") or name == "loss/empty" for name in metrics)


def test_a_filled_pair_that_is_not_finite_adds_nothing():
    nan = torch.full((1,), float("nan"), dtype=torch.float64)
    pair = PairLogps(nan, nan, nan, nan, nan, nan)
    sums = StreamSums.of(pair, pair_losses(pair, PreferenceConfig()), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(stacked(sums), torch.zeros(WIDTH, dtype=torch.float64))
