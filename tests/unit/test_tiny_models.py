"""Tiny models: they load, tokenise as they should, fit the layouts, and a folder is whole or absent."""

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from megatron_bvpo.rehearsal import sample_data, tiny_models, tiny_tokenizers
from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

VARIED_TEXT = [
    "Hello world, it's 12345 and 6.78e-9!",
    "  leading\n\n\n  and trailing   \t ",
    "",
    " ",
    "\n",
    "def f(x):\n\treturn x**2  # ok\r\n",
    "你好,世界。今天天气很好吗?",
    "한국어 日本語テスト ไทย",
    "Привет, как дела?",
    "ñandú Ärger naïve",
    "مرحبا بالعالم שלום",
    "🙂👩‍👧 emoji ✓ ∑∫√",
    "DON'T they'LL I'm we've",
    "a" * 300,
    "\u00a0\u2003odd\u200bspaces",
    "x=1;y=2;\n\n\n\nprint(x+y)",
    "https://example.org/a?b=c&d=%20#e",
    '{"key": ["value", null, true]}',
]
needs_real = pytest.mark.skipif(importlib.util.find_spec("dashscope") is None, reason="needs dashscope")


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "moe", kind="moe", vocab="trimmed")


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    tiny_tokenizers.write_tokenizer(folder, vocab="real", vocab_size=tiny_tokenizers.REAL_VOCAB_SIZE)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return AutoTokenizer.from_pretrained(folder)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ---- vocabulary


@needs_real
def test_real_vocabulary_encodes_as_tiktoken_does(real_tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    # The pattern is transformers' own copy, so that ours is checked as well.
    reference = tiktoken.Encoding(
        "qwen", pat_str=PRETOKENIZE_REGEX, special_tokens={}, mergeable_ranks=tiny_tokenizers.real_ranks()
    )
    raw = Tokenizer.from_file(f"{real_tokenizer.name_or_path}/tokenizer.json")
    rows = [json.dumps(row, ensure_ascii=False) for row in sample_data_rows()]
    for text in VARIED_TEXT + rows:
        for special in tiny_tokenizers.SPECIAL_TOKENS:
            text = text.replace(special, "")  # those are not in the reference
        ids = reference.encode(text, disallowed_special=())
        assert real_tokenizer(text)["input_ids"] == ids, text
        assert real_tokenizer.decode(ids) == text
        # transformers puts its own splitter and decoder over the file's; others use the file's.
        assert raw.encode(text).ids == ids, text
        assert raw.decode(ids) == text


@needs_real
def test_every_token_of_the_real_vocabulary_is_reached_by_its_merges(real_tokenizer):
    ranks = tiny_tokenizers.real_ranks()
    assert len(ranks) == 151643
    tokens, merges = tiny_tokenizers._tokens_and_merges_from_ranks(ranks)
    assert len(merges) == len(ranks) - 256
    # Merge number k makes token 256 + k, so that a merge's priority is its token's rank.
    assert [tokens[left + right] for left, right in merges] == list(range(256, len(ranks)))


@needs_real
def test_special_tokens_stand_at_qwen3_ids(real_tokenizer):
    expected = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<tool_call>": 151657,
        "</tool_call>": 151658,
        "<tool_response>": 151665,
        "</tool_response>": 151666,
        "<think>": 151667,
        "</think>": 151668,
    }
    assert {text: real_tokenizer.convert_tokens_to_ids(text) for text in expected} == expected
    assert real_tokenizer.eos_token_id == 151645 and real_tokenizer.pad_token_id == 151643
    assert len(real_tokenizer) == 151669
    ids = real_tokenizer("<|im_start|>a<think>\nb</think><|im_end|>")["input_ids"]
    assert [i for i in ids if i >= 151643] == [151644, 151667, 151668, 151645]
    assert real_tokenizer.decode(ids, skip_special_tokens=True) == "a<think>\nb</think>"  # tags stay readable


@needs_real
def test_cue_pairs_have_equal_length_in_real_tokens(real_tokenizer):
    for pair in sample_data.CUE_PAIRS:
        right, wrong = (len(real_tokenizer(sentence)["input_ids"]) for sentence in pair)
        assert right == wrong, pair


@pytest.mark.parametrize("which", ["trimmed", pytest.param("real", marks=needs_real)])
def test_preferring_fewer_tokens_wins_nothing(which, trimmed, request):
    tokenizer = (
        AutoTokenizer.from_pretrained(trimmed) if which == "trimmed" else request.getfixturevalue("real_tokenizer")
    )
    wins = {"trace": 0, "empty": 0}
    rows = sample_data_rows()
    for row in rows:
        chosen, rejected = row["messages"][1]["content"], row["rejected_response"]
        empty = [
            row.get(key) or sample_data.strip_trace(text)
            for key, text in (("empty_response", chosen), ("empty_rejected_response", rejected))
        ]
        for stream, pair in (("trace", (chosen, rejected)), ("empty", empty)):
            a, b = (len(tokenizer(text)["input_ids"]) for text in pair)
            wins[stream] += (a < b) + 0.5 * (a == b)
    assert all(0.45 <= won / len(rows) <= 0.55 for won in wins.values()), wins


def test_trimmed_vocabulary_round_trips_and_compresses(trimmed):
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    raw = Tokenizer.from_file(str(trimmed / "tokenizer.json"))
    for text in VARIED_TEXT:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert raw.encode(text).ids == ids
        assert raw.decode(ids) == text
    sentence = sample_data.CUE_PAIRS[0][0]
    assert len(tokenizer(sentence)["input_ids"]) < len(sentence) / 3
    for special in tiny_tokenizers.SPECIAL_TOKENS:
        assert len(tokenizer(special)["input_ids"]) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_missing_dashscope_is_a_clear_error_with_a_remedy(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dashscope" else find_spec(name))
    with pytest.raises(tiny_tokenizers.MissingVocabularyError, match="pip install dashscope"):
        make_tiny_model(tmp_path / "m", vocab="real")
    assert not any(tmp_path.iterdir())  # no half-made folder, no scratch
    make_tiny_model(tmp_path / "m", vocab="trimmed")  # needs no such package


# ---- models


@pytest.mark.parametrize(
    "kind, tied, name",
    [("moe", False, "Qwen3MoeForCausalLM"), ("dense", False, "Qwen3ForCausalLM"), ("dense", True, "Qwen3ForCausalLM")],
)
def test_models_load_in_transformers_and_run(tmp_path, kind, tied, name):
    folder = make_tiny_model(tmp_path / "m", kind=kind, tie_word_embeddings=tied)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    with torch.no_grad():
        logits_NV = model(**tokenizer("<think>\nhi", return_tensors="pt")).logits[0]
    assert logits_NV.shape[-1] == 1003 and logits_NV.isfinite().all()
    assert logits_NV.std(-1).mean() > 0.1  # not so flat that training stands still


def test_sizes_divide_by_the_layouts_of_the_rehearsals(trimmed):
    config = json.loads((trimmed / "config.json").read_text())
    for tp in (1, 2, 4):
        for size in ("num_attention_heads", "num_key_value_heads", "hidden_size", "moe_intermediate_size"):
            assert config[size] % tp == 0, (size, tp)
    assert config["num_hidden_layers"] % 4 == 0  # PP 4, and PP 2 with two virtual stages
    assert config.get("num_experts", config.get("num_local_experts")) % 8 == 0
    assert config["num_experts_per_tok"] == 2
    assert config["vocab_size"] % 2 == 1  # so padding is exercised at every TP


@pytest.mark.parametrize("vocab_size", [300, 512, 1003])
def test_vocabulary_size_is_selectable(tmp_path, vocab_size):
    folder = make_tiny_model(tmp_path / "m", kind="dense", vocab_size=vocab_size)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocab_size
    assert len(AutoTokenizer.from_pretrained(folder)) <= vocab_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="vision"), "kind is 'vision'"),
        (dict(vocab="latin"), "vocab is 'latin'"),
        (dict(kind="moe", tie_word_embeddings=True), "untied"),
        (dict(vocab_size=100), "use vocab_size >= 282"),
        pytest.param(dict(vocab="real", vocab_size=1000), "use vocab_size >= 151669", marks=needs_real),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_model(tmp_path / "m", **arguments)
    assert not any(tmp_path.iterdir())


# ---- folders


def test_same_arguments_same_bytes_even_in_another_process(trimmed, tmp_path):
    again = tmp_path / "again"
    torch.manual_seed(99)
    before = torch.get_rng_state()
    make_tiny_model(tmp_path / "here")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on undisturbed
    program = f"from megatron_bvpo.rehearsal.tiny_models import make_tiny_model as m; m({str(again)!r})"
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ, PYTHONHASHSEED="7"),
    )
    assert digests(trimmed) == digests(tmp_path / "here") == digests(again)
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert digests(other)["model.safetensors"] != digests(trimmed)["model.safetensors"]
    assert digests(other)["tokenizer.json"] == digests(trimmed)["tokenizer.json"]


def test_a_folder_is_reused_and_replaced_only_when_it_is_ours(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    inode, key = (folder / "model.safetensors").stat().st_ino, tiny_models.model_key(folder)
    make_tiny_model(folder)
    assert (folder / "model.safetensors").stat().st_ino == inode
    make_tiny_model(folder, seed=1)
    assert tiny_models.model_key(folder) != key
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not ours"):
        make_tiny_model(foreign)
    assert (foreign / "precious.txt").read_text() == "keep me"


def test_a_failure_half_way_leaves_neither_folder_nor_scratch(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_models, "_write_model", broken)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_model(tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_other_phrases_make_another_trimmed_model(tmp_path, monkeypatch):
    key = tiny_models.model_key(make_tiny_model(tmp_path / "m"))
    monkeypatch.setattr(sample_data, "phrases", lambda: ["entirely other words"])
    assert tiny_models.model_key(make_tiny_model(tmp_path / "m")) != key


# ---- with ms-swift's templates


@pytest.mark.parametrize(
    "kind, model_type, template_type", [("moe", "qwen3_moe", "qwen3_thinking"), ("dense", "qwen3", "qwen3")]
)
def test_swift_template_encodes_a_row_as_chatml(tmp_path, kind, model_type, template_type):
    pytest.importorskip("reasoning_gym")
    from swift.model import get_processor
    from swift.template import get_template

    logging.getLogger("swift").setLevel(logging.ERROR)
    folder = make_tiny_model(tmp_path / "m", kind=kind)
    tokenizer = get_processor(str(folder), model_type=model_type)
    template = get_template(tokenizer, template_type=template_type, max_length=2048)
    template.set_mode("rlhf")
    for row in sample_data_rows()[:6]:
        encoded = template.encode({key: row[key] for key in ("messages", "rejected_response")})
        question, chosen = (message["content"] for message in row["messages"])
        for side, response in (("chosen", chosen), ("rejected", row["rejected_response"])):
            ids, labels = encoded[f"{side}_input_ids"], encoded[f"{side}_labels"]
            assert tokenizer.decode(ids).rstrip("\n") == (
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"
            )
            trained = tokenizer.decode([label for label in labels if label != -100])
            assert trained.rstrip("\n") == f"{response}<|im_end|>"


def test_chat_template_of_the_folder(trimmed):
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    turns = [dict(role="user", content="Q"), dict(role="assistant", content="A")]
    full = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == full
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    render = dict(tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(turns[:1], **render) == prompt
    off = tokenizer.apply_chat_template(turns[:1], enable_thinking=False, **render)
    assert off == prompt + "<think>\n\n</think>\n\n"


def sample_data_rows():
    pytest.importorskip("reasoning_gym")
    return sample_data.make_sample_rows(160, seed=5)
