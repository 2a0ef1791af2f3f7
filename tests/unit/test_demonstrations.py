"""Token losses of demonstrations and their schedule, against TRL's and ms-swift's own functions and by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_bvpo.objective.demonstrations import TOKEN_LOSSES, token_losses
from megatron_bvpo.objective.schedule import MuSchedule
from megatron_bvpo.objective.stream_losses import sequence_sums

VOCAB = 11
FACTORS = {"sft": lambda p: 1.0, "dft": lambda p: p, "sft_phi": lambda p: p * (1 - p)}


def batch(seed: int = 0):
    """(logits [2, 9, VOCAB], labels [2, 9] with prompts and padding at -100), labels in place of their token."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 9, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (2, 9), generator=generator)
    labels[0, :3] = labels[1, :5] = labels[1, 8:] = -100
    return logits.requires_grad_(), labels


def counted_logps(logits, labels):
    """Log-probs of the counted tokens, each predicted by the position in front of it."""
    targets = labels[:, 1:]
    counted = targets != -100
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(counted, logps, 0.0), counted


def our_mean(logits, labels, kind):
    logps, counted = counted_logps(logits, labels)
    return sequence_sums(token_losses(logps, kind), None).sum() / counted.sum()


def trl_dft(logits, labels):
    from trl.trainer.sft_trainer import dft_loss

    return dft_loss(SimpleNamespace(logits=logits), labels.clone())


def swift_chord(phi: bool):
    """ms-swift's own CHORD loss at µ = 1, which leaves the demonstrations alone."""
    from swift.rlhf_trainers.utils import compute_chord_loss

    def loss(logits, labels):
        class Model(torch.nn.Module):
            def forward(self, **_):
                return SimpleNamespace(logits=logits)

        trainer = SimpleNamespace(
            state=SimpleNamespace(global_step=0),
            args=SimpleNamespace(
                chord_mu_warmup_steps=0,
                chord_mu_decay_steps=0,
                chord_mu_peak=1.0,
                chord_mu_valley=1.0,
                chord_enable_phi_function=phi,
            ),
            chord_sft_iterator=iter([[]]),
            template=SimpleNamespace(data_collator=lambda _: {"labels": labels.clone()}),
            accelerator=SimpleNamespace(device="cpu"),
            model=Model(),
        )
        return compute_chord_loss(trainer, grpo_loss=torch.zeros((), dtype=torch.float64))

    return loss


SOURCES = {"dft": trl_dft, "sft": swift_chord(False), "sft_phi": swift_chord(True)}


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_as_in_its_source(kind):
    """TRL's dft_loss; ms-swift's CHORD without and with φ. ms-swift's cross-entropy runs in float32."""
    tolerance = 1e-12 if kind == "dft" else 2e-6
    (ours, labels), (theirs, _) = batch(), batch()
    found, expected = our_mean(ours, labels, kind), SOURCES[kind](theirs, labels)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    slopes = torch.autograd.grad(found, ours)[0], torch.autograd.grad(expected, theirs)[0]
    torch.testing.assert_close(*slopes, rtol=0, atol=tolerance)
    assert slopes[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_the_slope_is_the_closed_form(kind):
    """Through a softmax, ∂(−w·log p_t)/∂logits = w·(softmax − 1_t) with w held fixed."""
    logits, labels = batch(3)
    logps, counted = counted_logps(logits, labels)
    token_losses(logps, kind).sum().backward()
    p = logits.detach().softmax(-1)
    expected = torch.zeros_like(p)
    for b, t in counted.nonzero().tolist():
        target = labels[b, t + 1]
        weight = FACTORS[kind](p[b, t, target])
        expected[b, t] = weight * p[b, t]
        expected[b, t, target] -= weight
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
@pytest.mark.parametrize("logp", [0.0, -1e-9, -0.5, -40.0, -1e4])
def test_numbers_at_the_ends(kind, logp):
    """A token that is certain, nearly so, and one that has no probability left."""
    p, rest = math.exp(logp), -math.expm1(logp)
    factor = {"sft": 1.0, "dft": p, "sft_phi": p * rest}[kind]
    x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss = token_losses(x, kind)
    loss.backward()
    assert loss.item() == pytest.approx(-factor * logp, rel=1e-14, abs=0)
    assert x.grad.item() == pytest.approx(-factor, rel=1e-14, abs=0)


def test_float32_log_probs_are_weighed_in_float64():
    x = torch.tensor([-1e-7, -3.25], dtype=torch.float32)
    assert token_losses(x, "sft_phi").dtype == torch.float64
    assert token_losses(x, "sft_phi")[0].item() == pytest.approx(float(x[0]) ** 2, rel=1e-6)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="'nll' is no loss of demonstrations; there are sft, dft, sft_phi"):
        token_losses(torch.zeros(1), "nll")


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_a_mean_over_the_tokens_of_the_global_batch_under_any_packing(kind):
    """The tokens of five sequences cut into packs in three ways: one mean; a mean of the packs' means is another."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 40, 1, 7, 12]
    sequences = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    whole = token_losses(torch.cat(sequences), kind).mean().item()

    def pack(members):
        tokens = torch.cat([sequences[i] for i in members] + [torch.full((2,), -7.0, dtype=torch.float64)])[None]
        lens = torch.tensor([lengths[i] for i in members])
        return sequence_sums(token_losses(tokens, kind), lens)

    for packs in ([[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[1], [3, 0], [4], [2]]):
        sums = [pack(members) for members in packs]
        assert torch.cat(sums).sum().item() / sum(lengths) == pytest.approx(whole, rel=1e-14)
    means = [s.sum().item() / sum(lengths[i] for i in members) for s, members in zip(sums, packs, strict=True)]
    assert sum(means) / len(means) != pytest.approx(whole, rel=1e-2)


# --- the schedule ---


@pytest.mark.parametrize(
    "warmup, decay, peak, valley",
    [(0, 200, 0.9, 0.05), (0, 0, 0.1, 0.1), (0, 0, 0.9, 0.05), (10, 0, 0.5, 0.2), (7, 13, 0.3, 0.6), (5, 5, 1.0, 0.0)],
)
def test_the_schedule_is_ms_swifts(warmup, decay, peak, valley):
    from swift.rlhf_trainers.utils import mu_schedule_function

    schedule = MuSchedule(peak, valley, warmup, decay)
    for step in range(warmup + decay + 4):
        assert schedule.at(step) == pytest.approx(mu_schedule_function(step, warmup, decay, peak, valley), abs=1e-15)


def test_the_schedule_by_hand():
    schedule = MuSchedule(peak=0.8, valley=0.2, warmup_steps=4, decay_steps=6)
    assert [schedule.at(s) for s in (0, 1, 4, 7, 10, 99)] == pytest.approx([0.0, 0.2, 0.8, 0.5, 0.2, 0.2], abs=1e-15)
    assert MuSchedule(0.9, 0.05).at(0) == 0.05


@pytest.mark.parametrize(
    "changes", [{"peak": 1.1}, {"valley": -0.1}, {"peak": float("nan")}, {"warmup_steps": -1}, {"decay_steps": -1}]
)
def test_a_bad_schedule_is_refused(changes):
    with pytest.raises(ValueError, match=f"mu_{next(iter(changes))}"):
        MuSchedule(**{"peak": 0.5, "valley": 0.1, **changes})
