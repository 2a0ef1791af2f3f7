"""The reasoner's tokenizer and the tokens of its rows: what ms-swift's qwen3 template makes of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from megatron_bvpo.rehearsal import tiny_tokenizers
from megatron_bvpo.rehearsal.reasoner.problems import EMPTY_BLOCK, FAMILIES, Problem, problems

MAX_TOKENS = 512
MODES = ("thinking", "empty")
END = tiny_tokenizers.EOS


class Row(NamedTuple):
    """Token ids; the loss is on those from `learn_from` on."""

    ids: list[int]
    learn_from: int


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files; return the number of tokens: bytes, words of the questions, Qwen's 26 specials."""
    # Letters alone are words to learn; digits are never merged (Qwen's splitter parts them).
    corpus = [problem.question for problem in islice(problems(0, "train"), 10 * len(FAMILIES))]
    corpus += ["user\n", "assistant\n", "system\n", "\n\n"]
    return tiny_tokenizers.write_tokenizer(folder, vocab="trimmed", vocab_size=MAX_TOKENS, corpus=corpus)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def prompt_text(question: str, mode: str) -> str:
    """What the chat template writes before the answer; with the empty block in mode `empty`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return prompt + (EMPTY_BLOCK if mode == "empty" else "")


def encode_rows(tokenizer: Tokenizer, rows: list[tuple[Problem, str]]) -> list[Row]:
    """Training rows of (problem, mode). The empty block is given, never learnt: it stands in the prompt."""
    prompts = [prompt_text(problem.question, mode) for problem, mode in rows]
    responses = [(problem.thinking if mode == "thinking" else problem.answer) + END + "\n" for problem, mode in rows]
    encoded = zip(tokenizer.encode_batch_fast(prompts), tokenizer.encode_batch_fast(responses), strict=True)
    return [Row(prompt.ids + response.ids, len(prompt.ids)) for prompt, response in encoded]
