"""The small reasoner: its problems, its tokens, its committed weights."""

from __future__ import annotations

import json
import logging
import math
import re
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_bvpo.rehearsal import tiny_tokenizers
from megatron_bvpo.rehearsal.reasoner import copy_reasoner, reasoner_folder, train, write_prompts
from megatron_bvpo.rehearsal.reasoner.evaluate import Accuracy, accuracies, is_right
from megatron_bvpo.rehearsal.reasoner.problems import FAMILIES, SPLITS, different_problems, problems, split_of
from megatron_bvpo.rehearsal.reasoner.sampling import load_reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import MAX_TOKENS, MODES, encode_rows, prompt_text, write_tokenizer
from megatron_bvpo.rehearsal.reasoner.train import Recipe, batch_of
from megatron_bvpo.sampling.judging import gym_judge

# What issue H wants at temperature 1.
WINDOW = {"thinking": (0.35, 0.65), "empty": (0.15, 0.45)}


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner(reasoner_folder())


@pytest.fixture(scope="module")
def drawn():
    return {split: list(islice(problems(7, split), 400)) for split in SPLITS}


# ---- problems


def test_the_scorers_confirm_every_answer_and_no_other(drawn):
    for problem in [*drawn["train"], *drawn["heldout"]]:
        assert is_right(problem, problem.answer), problem
        assert not is_right(problem, str(int(problem.answer) + 1)), problem
        assert problem.thinking.endswith(f"\n</think>\n\n{problem.answer}")


def test_answers_are_reasoning_gyms_own(drawn):
    """Question and answer of its generators, in sizes where ours and theirs meet."""
    import reasoning_gym

    sizes = {
        "chain_sum": dict(min_terms=2, max_terms=3, min_digits=1, max_digits=2),
        "products": dict(min_digits=1, max_digits=2),
        "gcd": dict(min_value=1, max_value=60),
        "count_bits": dict(max_n=1999),
    }
    assert sizes.keys() == FAMILIES.keys()

    def wording(question: str) -> str:
        return re.sub(r"( [+-] \d+)+ =", " + 0 =", re.sub(r"\d+", "0", question.replace(" - ", " + ")))

    for family, options in sizes.items():
        theirs = reasoning_gym.create_dataset(family, seed=3, size=30, **options)
        ours = [problem for problem in drawn["train"] if problem.family == family]
        assert {wording(p.question) for p in ours} == {wording(entry["question"]) for entry in theirs}
        by_question = {entry["question"]: entry["answer"] for entry in theirs}
        assert all(by_question.get(p.question, p.answer) == p.answer for p in ours)


def test_work_is_true(drawn):
    """Each line with an equation holds, and the answer follows from the lines."""
    for problem in drawn["train"]:
        lines = problem.work.split("\n")
        for line in lines:
            if "=" in line:
                left, right = line.split("=")
                assert eval(left) == int(right), problem
        if problem.family in ("chain_sum", "products"):
            assert lines[-1].endswith(f"={problem.answer}"), problem
        elif problem.family == "count_bits":
            halves = [int(line.split(":")[0]) for line in lines]
            assert halves[-1] == 1 and all(a // 2 == b for a, b in pairwise(halves)), problem
            assert [line.split(":")[1] for line in lines] == list(problem.metadata["binary"][::-1]), problem
            assert sum(line.endswith(":1") for line in lines) == int(problem.answer), problem
        else:
            assert lines[-1].split("%")[1] == f"{problem.answer}=0", problem


def test_splits_share_no_question(tmp_path, drawn):
    questions = {split: {p.question for p in drawn[split]} for split in SPLITS}
    assert questions["train"].isdisjoint(questions["heldout"])
    assert {split_of(q) for q in questions["heldout"]} == {"heldout"}
    # What a training step sees is of the training split, whatever the seed.
    heldout = {p.question for seed in range(5) for p in islice(problems(seed, "heldout"), 200)}
    tokenizer = load_reasoner(reasoner_folder()).tokenizer
    batch = batch_of(Recipe(), 3, tokenizer)
    texts = "".join(tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in batch["input_ids"])
    seen = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", texts)
    assert len(seen) > 30 and all(split_of(q) == "train" for q in seen) and heldout.isdisjoint(seen)


def test_prompts_are_written_for_samplers_and_judges(tmp_path):
    path = write_prompts(tmp_path / "new" / "prompts.jsonl", 100, seed=4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["messages"][0]["content"] for row in rows}) == len({row["id"] for row in rows}) == 100
    assert {row["family"] for row in rows} == FAMILIES.keys()
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user"]
        assert split_of(row["messages"][0]["content"]) == "heldout"
        question, other = row["messages"][0]["content"], str(int(row["answer"]) + 1)
        assert gym_judge.score(f" {row['answer']}\n", row["answer"], row, question)["right"]
        assert not gym_judge.score(other, row["answer"], row, question)["right"]
    again = write_prompts(tmp_path / "again.jsonl", 100, seed=4)
    assert again.read_bytes() == path.read_bytes() != write_prompts(again, 100, seed=5).read_bytes()


@pytest.mark.parametrize(
    "more, complaint",
    [(dict(split="test"), "test"), (dict(families=("sudoku",)), "sudoku"), (dict(families=("count_bits",)), "fewer")],
)
def test_prompts_that_are_not_to_be_had(tmp_path, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_prompts(tmp_path / "p.jsonl", 700, **more)
    assert not list(tmp_path.iterdir())


# ---- tokens


@given(st.text() | st.sampled_from([text for text in ("8 * 12 =", "ñandú 你好 🙂", "<think>\n1\n</think>\n\n")]))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(text):
    import unicodedata

    tokenizer = test_any_text_comes_back.tokenizer
    ids = tokenizer.encode(text).ids
    # Qwen's normaliser composes characters; nothing else is changed.
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


test_any_text_comes_back.tokenizer = load_reasoner(reasoner_folder()).tokenizer


def test_the_vocabulary_is_small_and_the_folders_own(tmp_path, reasoner):
    assert reasoner.tokenizer.get_vocab_size() <= MAX_TOKENS == reasoner.model.config.vocab_size
    for text in tiny_tokenizers.SPECIAL_TOKENS:
        assert len(reasoner.tokenizer.encode(text).ids) == 1
    assert len(reasoner.tokenizer.encode("0123456789").ids) == 10
    # Written anew it is the one that was trained.
    assert write_tokenizer(tmp_path) == reasoner.tokenizer.get_vocab_size()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (reasoner_folder() / name).read_bytes()


def test_the_chat_template_writes_the_prompts():
    tokenizer = AutoTokenizer.from_pretrained(reasoner_folder())
    turn = [dict(role="user", content="3 * 4?")]
    for mode, more in (("thinking", {}), ("empty", {"enable_thinking": False})):
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **more)
        assert text == prompt_text("3 * 4?", mode)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking"])
@pytest.mark.parametrize("mode", MODES)
def test_ms_swift_encodes_what_was_trained(reasoner, drawn, name, mode):
    from swift.model import get_processor
    from swift.template import get_template

    logging.getLogger("swift").setLevel(logging.ERROR)
    template = get_template(get_processor(str(reasoner_folder()), model_type="qwen3"), template_type=name)
    template.set_mode("train")
    for problem in drawn["train"][:20]:
        (row,) = encode_rows(reasoner.tokenizer, [(problem, mode)])
        response = problem.thinking if mode == "thinking" else problem.empty
        messages = [dict(role="user", content=problem.question), dict(role="assistant", content=response)]
        assert template.encode(dict(messages=messages))["input_ids"] == row.ids


# ---- batches


def test_packed_rows_do_not_see_each_other(reasoner):
    """The packed loss is the loss of the rows one by one."""
    recipe = Recipe(rows=8, pack=200, seed=5)
    batch = batch_of(recipe, 0, reasoner.tokenizer)
    with torch.no_grad():
        output = reasoner.model(
            input_ids=batch["input_ids"], attention_mask=batch["mask"], position_ids=batch["position_ids"]
        )
        packed = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten()).item()
        total = count = 0
        for ids, labels, positions in zip(*(batch[k] for k in ("input_ids", "labels", "position_ids")), strict=True):
            starts = [i for i in range(len(ids)) if positions[i] == 0 and ids[i] != 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                logits = reasoner.model(input_ids=ids[None, start:end]).logits[0]
                mine = labels[start:end]
                total += torch.nn.functional.cross_entropy(logits, mine, reduction="sum").item()
                count += (mine >= 0).sum().item()
    assert count > 100
    assert packed == pytest.approx(total / count, rel=1e-4)


def test_the_training_command_ends_in_a_model_with_a_softer_head(tmp_path, monkeypatch):
    """A small recipe through the one command; its checkpoint has the head as it was trained."""
    flags = "--steps 2 --eval_every 1 --eval_problems 4 --rows 4 --hidden_size 64 --layers 1 --heads 2 "
    flags += "--key_value_heads 2 --intermediate_size 64 --soften 2 --no-compile"
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), *flags.split()])
    train.main()
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert trained["step"] == 2 and [line["step"] for line in trained["curve"]] == [1, 2]
    written = load_reasoner(tmp_path / "model").model.state_dict()
    assert written.keys() == trained["model"].keys()
    for name, weights in trained["model"].items():
        expected = weights / 2 if name == "lm_head.weight" else weights
        assert torch.equal(written[name], expected.to(torch.bfloat16).float()), name


# ---- weights


def test_the_folder_is_whole_and_small(tmp_path):
    folder = copy_reasoner(tmp_path / "a" / "copy")
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    model, report = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and all(p.isfinite().all() for p in model.parameters())
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    config = model.config
    assert config.head_dim >= 32
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers, config.vocab_size // 128)
    assert all(size % 2 == 0 for size in sizes)  # TP 2, PP 2
    assert model.generation_config.do_sample and model.generation_config.temperature == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_it_is_sometimes_right(reasoner, mode):
    """Within the window on 240 draws, give or take three standard errors; and in each family both happens."""
    asked = list(islice(problems(11, "heldout"), 240))
    table = accuracies(reasoner, asked, mode, seed=1)
    low, high = WINDOW[mode]
    margin = 3 * math.sqrt(0.25 / len(asked))
    assert low - margin < table["all"].share < high + margin, table
    assert all(0 < accuracy.right < accuracy.asked for accuracy in table.values()), table


def test_sampling_repeats_itself_and_varies(reasoner):
    questions = [p.question for p in different_problems(8, 2, "heldout")]
    first, again, other = (sample(reasoner, questions, "thinking", n=2, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert [len(answers) for answers in first] == [2] * 8
    greedy = sample(reasoner, questions, "empty", n=2, temperature=0)
    assert all(a == b for a, b in greedy)
    cut = sample(reasoner, questions, "thinking", max_tokens=3)
    assert all(not a.ended and a.final == "" and len(a.ids) == 3 for (a,) in cut)


def test_samples_tell_their_log_probs(reasoner):
    """What the cache, the padding in front and rows that ended leave of them is the whole row's forward."""
    questions = [p.question for p in different_problems(6, 3, "heldout")]
    for mode in MODES:
        for question, (answer,) in zip(questions, sample(reasoner, questions, mode, seed=5), strict=True):
            prompt = reasoner.tokenizer.encode(prompt_text(question, mode)).ids
            ids = torch.tensor([prompt + answer.ids])
            with torch.no_grad():
                logp = reasoner.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert torch.tensor(answer.log_probs) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval():
    low, high = Accuracy(45, 100).interval
    assert (low, high) == pytest.approx((0.3561, 0.5476), abs=1e-4)  # the textbook's
