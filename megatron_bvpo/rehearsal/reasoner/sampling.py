"""Sampling from the reasoner in this process: batches with a cache of keys and values, on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3ForCausalLM

from megatron_bvpo.rehearsal.reasoner.tokens import END, prompt_text, read_tokenizer

BATCH = 256


class Reasoner(NamedTuple):
    model: PreTrainedModel
    tokenizer: Tokenizer


class Answer(NamedTuple):
    """A sampled response: text without the end token, token ids with it, their log-probs, whether it ended itself."""

    text: str
    ids: list[int]
    log_probs: list[float]
    ended: bool

    @property
    def final(self) -> str:
        """What a judge reads; empty when a trace did not end."""
        if self.text.startswith("<think>") and "</think>" not in self.text:
            return ""
        return self.text.rpartition("</think>")[2].strip()


def load_reasoner(folder: str | Path) -> Reasoner:
    """The model in float32, in evaluation mode, and its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Reasoner(model.eval(), read_tokenizer(folder))


@torch.no_grad()
def sample(
    reasoner: Reasoner,
    questions: Sequence[str],
    mode: str,
    *,
    n: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 128,
) -> list[list[Answer]]:
    """`n` answers to each question; the same arguments on the same machine give the same answers.

    Args:
        mode: `thinking` (the model opens its own trace) or `empty` (an empty think block stands in the prompt).
        temperature: 0 takes the likeliest token.
        max_tokens: of the response.

    Raises:
        ValueError: an unknown mode.
    """
    prompts = [reasoner.tokenizer.encode(prompt_text(question, mode)).ids for question in questions for _ in range(n)]
    draw = torch.Generator().manual_seed(seed)
    answers: list[Answer] = []
    for first in range(0, len(prompts), BATCH):
        answers += _sample_batch(reasoner, prompts[first : first + BATCH], temperature, draw, max_tokens)
    return [answers[i * n : (i + 1) * n] for i in range(len(questions))]


def _sample_batch(
    reasoner: Reasoner, prompts: list[list[int]], temperature: float, draw: torch.Generator, max_tokens: int
) -> list[Answer]:
    end = reasoner.tokenizer.token_to_id(END)
    # Padding stands in front, so that all rows go on at the same column.
    widest = max(map(len, prompts))
    tokens = torch.tensor([[end] * (widest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (widest - len(ids)) + [1] * len(ids) for ids in prompts])
    rows = torch.arange(len(prompts))  # those that have not ended
    ids: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    cache = DynamicCache()
    for _ in range(max_tokens):
        logp = _next_log_probs(reasoner.model, tokens, mask, cache)
        new = _draw(logp, temperature, draw)
        values = logp.gather(1, new)[:, 0]
        for row, token, value in zip(rows.tolist(), new[:, 0].tolist(), values.tolist(), strict=True):
            ids[row].append(token)
            log_probs[row].append(value)
        going = (new[:, 0] != end).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, tokens = rows[going], new[going]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
    texts = [reasoner.tokenizer.decode(row[: row.index(end) if end in row else None], False) for row in ids]
    return [Answer(*of, row[-1] == end) for row, *of in zip(ids, texts, ids, log_probs, strict=True)]


def _next_log_probs(model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """[rows, words] of the next token. `tokens` are those that the cache has not seen, `mask` covers all."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    inputs = dict(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits.float().log_softmax(-1)


def _draw(logp: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """[rows, 1] token ids."""
    if temperature == 0:
        return logp.argmax(-1, keepdim=True)
    return torch.multinomial((logp / temperature).softmax(-1), 1, generator=draw)
