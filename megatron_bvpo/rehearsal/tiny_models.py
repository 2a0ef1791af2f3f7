"""Tiny Qwen3 models on disk, for rehearsals and tests without a download.

    make_tiny_model('/tmp/tiny', kind='moe', vocab='trimmed')      # 0.4 M parameters, about a second
    make_tiny_model('/tmp/tiny-real', kind='moe', vocab='real')    # Qwen's own vocabulary, 20 M parameters

The folder is an ordinary Hugging Face checkpoint (`Qwen3MoeForCausalLM` or `Qwen3ForCausalLM`), which
transformers and ms-swift load (`--model_type qwen3_moe` or `qwen3`, `--template qwen3_thinking` or `qwen3`).
The default sizes divide by TP 1/2/4, PP 1/2/4, two virtual stages at PP 2, EP 1/2/4/8 and CP 2. Weights are
random.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_bvpo.rehearsal import sample_data, tiny_tokenizers

STAMP = "rehearsal_model.json"  # what made the folder; where it stands, the folder is complete and ours
_FORMAT = 1  # raise when the same parameters begin to mean other files


def make_tiny_model(
    out_dir: str | Path,
    *,
    kind: str = "moe",
    vocab: str = "trimmed",
    seed: int = 0,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = False,
    num_layers: int = 4,
    hidden_size: int = 64,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 16,
    num_experts: int = 8,
    experts_per_token: int = 2,
    moe_intermediate_size: int = 32,
    intermediate_size: int = 128,
    init_std: float = 0.05,
) -> Path:
    """Write a random float32 model and its tokenizer to `out_dir`, or reuse what is there; return the folder.

    The same arguments give the same bytes. A folder made here with other arguments is replaced; anything else
    that stands there is left alone. The folder appears whole or not at all, also when the run is killed.

    Args:
        kind: 'moe' (Qwen3MoeForCausalLM) or 'dense' (Qwen3ForCausalLM).
        vocab: 'real' (Qwen's, needs the package dashscope) or 'trimmed' (a learnt byte-level BPE).
        vocab_size: rows of the embedding. Default 151936 for 'real', 1003 for 'trimmed': odd on purpose, so
            that Megatron must pad it. The tokenizer has at most so many tokens.
        tie_word_embeddings: one matrix for input and output; dense only.
        init_std: standard deviation of all weight matrices. At hidden size 64 the default gives logits a
            standard deviation of 0.4; Qwen3's own 0.02 would give 0.16.

    Raises:
        ValueError: an unknown kind or vocab, or sizes that do not fit.
        FileExistsError: `out_dir` holds something this function did not make.
        tiny_tokenizers.MissingVocabularyError: vocab 'real' without dashscope.
    """
    if kind not in ("moe", "dense"):
        raise ValueError(f"kind is {kind!r}; expected 'moe' or 'dense'")
    if kind == "moe" and tie_word_embeddings:
        raise ValueError("tie_word_embeddings=True goes with kind='dense' only: Qwen3-MoE models are untied")
    if vocab_size is None:
        vocab_size = tiny_tokenizers.REAL_VOCAB_SIZE if vocab == "real" else 1003
    sizes = dict(
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=init_std,
    )
    if kind == "moe":
        sizes |= dict(
            num_experts=num_experts, num_experts_per_tok=experts_per_token, moe_intermediate_size=moe_intermediate_size
        )

    stamp = dict(made_by="make_tiny_model", kind=kind, vocab=vocab, seed=seed, sizes=sizes)
    if vocab == "trimmed":  # learnt from these texts, so other texts make another model
        stamp["corpus"] = hashlib.sha256("\0".join(sample_data.phrases()).encode()).hexdigest()[:16]
    with whole_folder(out_dir, stamp) as folder:
        if folder is not None:
            n_tokens = tiny_tokenizers.write_tokenizer(
                folder, vocab=vocab, vocab_size=vocab_size, corpus=sample_data.phrases()
            )
            first_special_id = n_tokens - len(tiny_tokenizers.SPECIAL_TOKENS)
            _write_model(folder, kind, sizes, seed, first_special_id)
    return Path(out_dir)


def model_key(folder: str | Path) -> str:
    """The hash of what made a folder: equal keys mean equal files. ValueError when it is not one of ours."""
    stamp = Path(folder) / STAMP
    if not stamp.is_file():
        raise ValueError(f"{folder} has no {STAMP}: it was not made by make_tiny_model")
    return json.loads(stamp.read_text())["key"]


@contextmanager
def whole_folder(out_dir: str | Path, made_from: dict) -> Iterator[Path | None]:
    """Give a scratch folder to fill; move it to `out_dir` in one rename when the block ends without an error.

    Gives None when `out_dir` already was made from the same `made_from` (any JSON-able description). Raises
    FileExistsError when `out_dir` holds files that do not come from here.
    """
    out_dir = Path(out_dir)
    canonical = json.dumps([_FORMAT, made_from], sort_keys=True)
    key = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    if (out_dir / STAMP).is_file():
        if model_key(out_dir) == key:
            yield None
            return
    elif out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(
            f"{out_dir} exists and has no {STAMP}, so it is not ours to replace; give another folder or remove it"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that the rename is atomic.
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        yield scratch
        (scratch / STAMP).write_text(json.dumps(dict(key=key, **made_from), indent=2))
        scratch.chmod(0o755)
        _move_into_place(scratch, out_dir, key)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already where the move succeeded


def _move_into_place(scratch: Path, out_dir: Path, key: str) -> None:
    def made_meanwhile() -> bool:  # by another process; its files are as good as ours
        return (out_dir / STAMP).is_file() and model_key(out_dir) == key

    if made_meanwhile():
        return
    if out_dir.exists():
        shutil.rmtree(out_dir)
    try:
        os.replace(scratch, out_dir)
    except OSError:
        if not made_meanwhile():
            raise


def _write_model(folder: Path, kind: str, sizes: dict, seed: int, first_special_id: int) -> None:
    import transformers

    special_id = {text: first_special_id + i for i, text in enumerate(tiny_tokenizers.SPECIAL_TOKENS)}
    common = dict(
        sizes,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        eos_token_id=special_id[tiny_tokenizers.EOS],
        pad_token_id=special_id[tiny_tokenizers.PAD],
        bos_token_id=None,
        dtype="float32",
        use_cache=True,
    )
    if kind == "moe":
        # Without an auxiliary loss a step is a function of the preference loss alone.
        config = transformers.Qwen3MoeConfig(
            **common, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, router_aux_loss_coef=0.0
        )
        model_class = transformers.Qwen3MoeForCausalLM
    else:
        config = transformers.Qwen3Config(**common)
        model_class = transformers.Qwen3ForCausalLM
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[config.eos_token_id, config.pad_token_id], pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder, safe_serialization=True)
