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

from megatron_bvpo.rehearsal.reasoner.evaluate import is_right
from megatron_bvpo.rehearsal.reasoner.problems import Problem, different_problems
from megatron_bvpo.rehearsal.reasoner.sampling import Reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import END, prompt_text

from benchmarks.study.pairs import MAX_TOKENS, MODES, load_policy
from benchmarks.study.plan import Size

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
        chosen, rejected: mean log-probability of the held-out pairs' sides (nats a response).
    """

    right: str
    repeats: int
    tokens: float
    unended: float
    chosen: float
    rejected: float

    @property
    def share(self) -> float:
        return sum(map(int, self.right)) / len(self.right) / self.repeats


def questions(size: Size, *, choosing: bool = False) -> list[Problem]:
    """Held-out questions, the same for all runs, families in equal parts as far as there are so many.

    `choosing` has the next ones, which the learning rate is chosen on: no run is judged by them.
    """
    drawn = different_problems(size.questions + size.choosing, 77, "heldout")
    return drawn[size.questions :] if choosing else drawn[: size.questions]


def evaluate(
    model: Path, adapter: Path | None, asked: list[Problem], pairs: Path, *, repeats: int, seed: int
) -> dict[str, Answers]:
    """Both modes, `repeats` answers a question at temperature 1.

    Args:
        adapter: a checkpoint's folder; None: the model alone.
        pairs: rows of questions that no run has trained on.
    """
    reasoner = load_policy(model, adapter)
    found = {}
    for mode in MODES:
        texts = [problem.question for problem in asked]
        answers = sample(reasoner, texts, mode, n=repeats, seed=seed, max_tokens=MAX_TOKENS)
        all_answers = [answer for of_one in answers for answer in of_one]
        chosen, rejected = _pair_log_probs(reasoner, pairs, mode)
        found[mode] = Answers(
            right="".join(
                str(sum(is_right(problem, answer.final) for answer in of_one))
                for problem, of_one in zip(asked, answers, strict=True)
            ),
            repeats=repeats,
            tokens=sum(len(answer.ids) for answer in all_answers) / len(all_answers),
            unended=sum(not answer.ended for answer in all_answers) / len(all_answers),
            chosen=chosen,
            rejected=rejected,
        )
    return found


def _pair_log_probs(reasoner: Reasoner, pairs: Path, mode: str) -> tuple[float, float]:
    means = []
    for side in (0, 1):
        texts = [(prompt_text(question, mode), response[side] + END) for question, *response in pairs_of(pairs, mode)]
        with torch.no_grad():
            means.append(float(responses_log_probs(reasoner, texts).mean()))
    return means[0], means[1]


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
