"""Tokenizer files for the tiny rehearsal models: Qwen's real vocabulary, or a trimmed one of the same shape.

Both kinds are byte-level BPE with Qwen2's pre-tokenisation and the 26 special tokens of Qwen3 in Qwen3's
order, placed right after the last merged token:

* real: 151643 ordinary tokens from the file `resources/qwen.tiktoken` in the PyPI package dashscope, so
  <|endoftext|> is 151643, <|im_end|> 151645, <think> 151667 and </think> 151668, as in Qwen3 itself.
* trimmed: the 256 bytes and as many merges, learnt from a corpus, as fit the wished size.

A tiktoken file lists tokens with their ranks but no merges. Its encoder joins, again and again, the two
neighbours whose union has the lowest rank; so the merge that makes a token is what that same procedure leaves
of its bytes when only lower ranks are allowed: always two parts.
"""

import base64
import importlib.util
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

REAL_VOCAB_SIZE = 151936  # rows of Qwen3's embedding; 151669 of them are tokens
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS, PAD = "<|im_end|>", "<|endoftext|>"
# Control tokens vanish with skip_special_tokens=True; the text-like ones after them (tags) stay readable.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
SPECIAL_TOKENS = CONTROL_TOKENS + TAG_TOKENS
# Plain ChatML. `enable_thinking=False` opens the answer with an empty think block.
CHAT_TEMPLATE = (
    "{%- for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


class MissingVocabularyError(RuntimeError):
    """The real vocabulary was asked for and the package that ships it is not installed."""


def real_ranks() -> dict[bytes, int]:
    """Token bytes -> rank (= token id, 0..151642) of Qwen's vocabulary. Raises MissingVocabularyError."""
    # find_spec, not an import: only a data file is wanted, not the client library around it.
    spec = importlib.util.find_spec("dashscope")
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingVocabularyError(
            "vocab='real' needs the file resources/qwen.tiktoken of the PyPI package dashscope "
            f"({'package not installed' if path is None else f'not found at {path}'}). "
            "Run `pip install dashscope`, or use vocab='trimmed', which needs nothing."
        )
    lines = path.read_text(encoding="ascii").split("\n")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def write_tokenizer(out_dir: Path, *, vocab: str, vocab_size: int, corpus: Iterable[str] = ()) -> int:
    """Write tokenizer.json and tokenizer_config.json into `out_dir`; return the number of tokens.

    Args:
        vocab: 'real' or 'trimmed'.
        vocab_size: upper bound for the number of tokens (the model's embedding rows). 'trimmed' fills it as
            far as the corpus yields merges.
        corpus: texts to learn the merges of 'trimmed' from; without any, its tokens are the bytes.

    Raises:
        ValueError: unknown `vocab`, or `vocab_size` too small for it.
        MissingVocabularyError: 'real' without dashscope.
    """
    if vocab not in ("real", "trimmed"):
        raise ValueError(f"vocab is {vocab!r}; expected 'real' or 'trimmed'")
    ranks = real_ranks() if vocab == "real" else {}
    at_least = (len(ranks) or 256) + len(SPECIAL_TOKENS)
    if vocab_size < at_least:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the {vocab} vocabulary has at least {at_least} "
            f"tokens; use vocab_size >= {at_least}"
        )
    if vocab == "real":
        tokens, merges = _tokens_and_merges_from_ranks(ranks)
    else:
        tokens, merges = _learn_tokens_and_merges(corpus, vocab_size - at_least)
    tokenizer = _byte_level_bpe(tokens, merges)
    tokenizer.add_tokens(
        [AddedToken(text, special=text in CONTROL_TOKENS, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(len(tokens)), indent=2))
    return len(tokens) + len(SPECIAL_TOKENS)


def _byte_letters() -> list[str]:
    """One printable character per byte value, as byte-level BPE files use them (space is 'Ġ')."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


def _tokens_and_merges_from_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_two_parts(token, rank, ranks)
            merges.append((spell[left], spell[right]))
    return {spell[token]: rank for token, rank in ranks.items()}, merges


def _last_two_parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        lowest = min(joined)
        assert lowest < rank, f"token {token!r} of rank {rank} cannot be merged from lower ranks"
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _learn_tokens_and_merges(corpus: Iterable[str], n_merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = _byte_letters()
    learner = _byte_level_bpe({}, [])
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=letters, min_frequency=1, show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:n_merges]
    # Two merges can spell the same token; ids go to distinct texts.
    texts = dict.fromkeys(letters + [left + right for left, right in merges])
    return {text: i for i, text in enumerate(texts)}, merges


def _byte_level_bpe(tokens: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(first_special_id: int) -> dict:
    added = {
        str(first_special_id + i): dict(
            content=text,
            special=text in CONTROL_TOKENS,
            normalized=False,
            lstrip=False,
            rstrip=False,
            single_word=False,
        )
        for i, text in enumerate(SPECIAL_TOKENS)
    }
    return dict(
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder=added,
        chat_template=CHAT_TEMPLATE,
        eos_token=EOS,
        pad_token=PAD,
        bos_token=None,
        unk_token=None,
        add_prefix_space=False,
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
        errors="replace",
        model_max_length=4096,
        split_special_tokens=False,
    )
