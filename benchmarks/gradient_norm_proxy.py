"""Whether √Σ(1 − p)² of an answer's tokens ranks answers as the true norm of their gradient does.

    python benchmarks/gradient_norm_proxy.py [--model FOLDER] [--prompts 100] [--answers 4]

`bvpo sample --budget gvm` and `pairs` hand samples out in proportion to G, the norm of ∂(−Σ log p)/∂W. A server tells
log-probs and no gradients, so G is taken from them: the gradient of one token's −log p by its logits has a norm
between (1 − p) and √2·(1 − p), and √Σ(1 − p)² is what is left of Σ when the tokens' gradients are at right angles and
everything behind the logits is as large for each of them. Here the small reasoner's answers to held-out problems
(temperature 1, both modes) have both: the stand-in from their log-probs, and the norm from a backward pass each, over
all weights, over the last layer's down projection (the one matrix that GVM's recipe would take), and over the
embedding. What a budget uses is a prompt's mean, so that is ranked, too.

Predicted before it was run (Spearman's rank correlation):
- empty mode, all weights: .95 or more: an answer of a few tokens has one or two that are uncertain.
- thinking, all weights: .85 to .95: more tokens, whose gradients are not at right angles where they fail alike.
- one matrix: about .05 less than all weights.
- prompts' means: as high as single answers', within .03.
- the stand-in is better than an answer's number of tokens, which in thinking should reach .3 to .6, and about as good
  as −Σ log p.

What came (results/gradient-norm-proxy.md): in thinking a little more than predicted over all weights, .97 for answers
and for prompts' means, less in one matrix (.89, means .79), and longer answers are the surer ones (−.43). With an empty
trace the prediction was wrong: .78 over all weights, .52 in one matrix, and .60 for prompts' means. There answers are
three tokens long and about equally unsure; presumably what ranks them is what stands behind the logits, of which
log-probs know nothing. Σ(1 − p) is no cure (.82). So a budget's G is a good guide for thinking and a weak one for the
empty mode. An earlier state of the reasoner gave .99, .97, .77 and .40 for answers: the picture was the same.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bvpo.rehearsal.reasoner import reasoner_folder
from megatron_bvpo.rehearsal.reasoner.problems import different_problems
from megatron_bvpo.rehearsal.reasoner.sampling import load_reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import MODES, prompt_text

TARGET = Path(__file__).parent / "results" / "gradient-norm-proxy.md"
STAND_INS = ("√Σ(1−p)²", "Σ(1−p)", "−Σ log p", "tokens")
TRUE = ("all weights", "last down_proj", "embedding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=reasoner_folder())
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--answers", type=int, default=4)
    args = parser.parse_args()
    reasoner = load_reasoner(args.model)
    questions = [problem.question for problem in different_problems(args.prompts, 7, "heldout")]
    digest = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()[:12]
    began = time.monotonic()
    lines = [
        "# √Σ(1 − p)² against the norm of the gradient",
        "",
        f"`python benchmarks/gradient_norm_proxy.py`: {args.prompts} held-out problems, {args.answers} answers each in "
        "both modes, temperature 1, the small reasoner in float32 on a CPU. Spearman's rank correlation, with the "
        "interval that holds 95 % of 2000 resamples of prompts.",
        f"Weights: model.safetensors {digest}.",
        "",
    ]
    for mode in MODES:
        groups = sample(reasoner, questions, mode, n=args.answers, temperature=1.0, seed=11)
        measured = np.array(
            [
                [_measure(reasoner, q, mode, answer) for answer in group]
                for q, group in zip(questions, groups, strict=True)
            ]
        )
        lines += _tables(mode, measured)
    lines.append(f"{time.monotonic() - began:.0f} s.")
    TARGET.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _measure(reasoner, question: str, mode: str, answer) -> list[float]:
    """The stand-ins and the true norms of one answer, in the order of STAND_INS and TRUE."""
    prompt = reasoner.tokenizer.encode(prompt_text(question, mode)).ids
    ids = torch.tensor([prompt + answer.ids])
    reasoner.model.zero_grad(set_to_none=True)
    logp = reasoner.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    logp = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
    (-logp.sum()).backward()
    # The sampler saw the same numbers, token by token through its cache.
    told = torch.tensor(answer.log_probs)
    assert torch.allclose(logp.detach(), told, atol=2e-3), (logp.detach() - told).abs().max()
    doubt = 1 - told.exp()
    stand_ins = [float(doubt.square().sum().sqrt()), float(doubt.sum()), float(-told.sum()), float(len(answer.ids))]
    grads = {name: p.grad for name, p in reasoner.model.named_parameters() if p.grad is not None}
    last = max(int(name.split(".")[2]) for name in grads if name.startswith("model.layers."))
    return stand_ins + [
        float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()),
        float(grads[f"model.layers.{last}.mlp.down_proj.weight"].norm()),
        float(grads["model.embed_tokens.weight"].norm()),
    ]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _tables(mode: str, measured: np.ndarray) -> list[str]:
    """`measured`: [prompts, answers, STAND_INS + TRUE]."""
    lines = [f"## {mode}", "", f"| | {' | '.join(TRUE)} |", "|---" * (len(TRUE) + 1) + "|"]
    for at, name in enumerate(STAND_INS):
        cells = [_cell(measured, at, len(STAND_INS) + true) for true in range(len(TRUE))]
        lines.append(f"| {name}, answers | {' | '.join(cells)} |")
    means = measured.mean(axis=1, keepdims=True)
    cells = [_cell(means, 0, len(STAND_INS) + true) for true in range(len(TRUE))]
    lines.append(f"| {STAND_INS[0]}, prompts' means | {' | '.join(cells)} |")
    true = measured[..., len(STAND_INS)]
    lines += [
        "",
        f"Norms over all weights: 5 % {np.quantile(true, 0.05):.3g}, median {np.median(true):.3g}, 95 % "
        f"{np.quantile(true, 0.95):.3g}; the stand-in: {np.quantile(measured[..., 0], 0.05):.3g}, "
        f"{np.median(measured[..., 0]):.3g}, {np.quantile(measured[..., 0], 0.95):.3g}; tokens: median "
        f"{np.median(measured[..., 3]):.0f}.",
        "",
    ]
    return lines


def _cell(measured: np.ndarray, one: int, other: int) -> str:
    random = np.random.default_rng(0)
    value = spearman(measured[..., one].ravel(), measured[..., other].ravel())
    draws = []
    for _ in range(2000):
        some = measured[random.integers(0, len(measured), len(measured))]
        draws.append(spearman(some[..., one].ravel(), some[..., other].ravel()))
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
