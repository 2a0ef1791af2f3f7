"""What a trained adapter answers, and how far it has moved: in this process, float32, by transformers and peft.

Nothing of the training is used here but the checkpoint's adapter, so that drift and margins are a second opinion on
what the run logged.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.study.pairs import MAX_TOKENS, load_policy
from benchmarks.study.plan import Size
from megatron_bvpo.rehearsal.reasoner.evaluate import is_right
from megatron_bvpo.rehearsal.reasoner.problems import Problem, different_problems
from megatron_bvpo.rehearsal.reasoner.sampling import Reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import END, MODES, prompt_text

BATCH = 64
FIELDS = {
    "thinking": (None, "rejected_response"),  # the chosen one is the last message
    "empty": ("empty_response", "empty_rejected_response"),
}


@dataclass(frozen=True)
class Answers:
    """One model in one mode.

    Attributes:
        right: how many of its answers are right, a digit a question, in the questions' order.
        repeats: answers a question (9 at most).
        tokens: mean length of an answer.
        unended: share of the answers that reached the limit.
    """

    right: str
    repeats: int
    tokens: float
    unended: float


def questions(size: Size, *, choosing: bool = False) -> list[Problem]:
    """Held-out questions, the same for all runs, families in equal parts as far as there are so many.

    `choosing` has the next ones, which the learning rate is chosen on: no run is judged by them.
    """
    drawn = different_problems(size.questions + size.choosing, 77, "heldout")
    return drawn[size.questions :] if choosing else drawn[: size.questions]


def evaluate(
    model: Path, adapter: Path | None, asked: list[Problem], *, repeats: int, seed: int, temperature: float = 1.0
) -> dict[str, Answers]:
    """Both modes, `repeats` answers a question.

    Args:
        adapter: a checkpoint's folder; None: the model alone.
        temperature: 0 takes the likeliest token.
    """
    reasoner = load_policy(model, adapter)
    found = {}
    for mode in MODES:
        texts = [problem.question for problem in asked]
        answers = sample(reasoner, texts, mode, n=repeats, temperature=temperature, seed=seed, max_tokens=MAX_TOKENS)
        all_answers = [answer for of_one in answers for answer in of_one]
        found[mode] = Answers(
            right="".join(
                str(sum(is_right(problem, answer.final) for answer in of_one))
                for problem, of_one in zip(asked, answers, strict=True)
            ),
            repeats=repeats,
            tokens=sum(len(answer.ids) for answer in all_answers) / len(all_answers),
            unended=sum(not answer.ended for answer in all_answers) / len(all_answers),
        )
    return found


def side_log_probs(model: Path, adapter: Path | None, pairs: Path) -> dict[str, dict[str, float]]:
    """Mode → `chosen`, `rejected`: mean log-probability of the pairs' sides, nats a response; `pairs`: how many."""
    reasoner, found = load_policy(model, adapter), {}
    for mode in MODES:
        rows = pairs_of(pairs, mode)
        found[mode] = {"pairs": len(rows)}
        for side, name in enumerate(("chosen", "rejected")):
            texts = [(prompt_text(question, mode), response[side] + END) for question, *response in rows]
            with torch.no_grad():
                found[mode][name] = float(responses_log_probs(reasoner, texts).mean())
    return found


@cache
def pairs_of(pairs: Path, mode: str) -> list[tuple[str, str, str]]:
    """(question, chosen, rejected)"""
    found = []
    for row in map(json.loads, pairs.read_text("utf-8").splitlines()):
        question, answer = (message["content"] for message in row["messages"][-2:])
        chosen, rejected = FIELDS[mode]
        found.append((question, row[chosen] if chosen else answer, row[rejected]))
    return found


def responses_log_probs(reasoner: Reasoner, texts: list[tuple[str, str]]) -> Tensor:
    """[texts] float64: log p(response | prompt), summed over the response's tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    parts = [
        _of_batch(reasoner.model, reasoner.tokenizer, [texts[i] for i in order[start : start + BATCH]])
        for start in range(0, len(order), BATCH)
    ]
    back = torch.tensor(order).argsort()
    return torch.cat(parts)[back]


def _of_batch(model, tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> Tensor:
    # Prompt and response apart: a response's tokens are what sampling made one by one.
    parts = [(tokenizer.encode(prompt).ids, tokenizer.encode(response).ids) for prompt, response in texts]
    width = max(len(prompt) + len(response) for prompt, response in parts)
    ids = torch.zeros(len(parts), width, dtype=torch.long)
    counted = torch.zeros(len(parts), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(parts):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        counted[i, len(prompt) : len(prompt) + len(response)] = True
    # Rows are filled at the end: causal attention keeps what stands there out.
    logp = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.double().log_softmax(-1)
    of_tokens = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return (of_tokens * counted[:, 1:]).sum(1)


def as_json(found: dict[str, Answers]) -> dict[str, dict]:
    return {mode: asdict(answers) for mode, answers in found.items()}
