"""What is asked is what is trained: templates as transformers renders them, empty prompts as ms-swift encodes them."""

import json
import logging
import shutil

import pytest

from megatron_bvpo.data.batches import TemplateSettings, make_bvpo_template
from megatron_bvpo.data.empty_trace import empty_block
from megatron_bvpo.data.pair_checks import response_start
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.chat_templates import ChatTemplate
from megatron_bvpo.sampling.asking.modes import CHAT, COMPLETIONS, Asking
from megatron_bvpo.sampling.samples import Prompt
from tests.unit.chat_models import FAMILIES, write_chat_model

TALKS = {
    "plain": [{"role": "user", "content": "What is 2+2?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What is\n\n2+2?\n"}],
    "history": [
        {"role": "user", "content": "Hello é 😀."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "What is 2+2?"},
    ],
}
ANSWERS = ["4", "The answer is 4.\n\nIt is so.", "$4$", "- é"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_chat_model(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_and_encoded_as_transformers_does(family, talk, folders):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[family]), ChatTemplate(folders[family])
    for thinking in (True, False):
        text = theirs.apply_chat_template(
            TALKS[talk], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert ours.render(TALKS[talk], thinking=thinking) == text
        ids = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True, enable_thinking=thinking)
        assert ours.encode(text) == list(ids["input_ids"])


def test_what_a_template_is_known_to_do(folders):
    found = {family: ChatTemplate(folder) for family, folder in folders.items()}
    assert {family: template.switch for family, template in found.items()} == {
        "hybrid": "enable_thinking",
        "thinking": None,
        "r1": None,
    }
    assert [family for family, template in found.items() if template.opens_trace] == ["thinking", "r1"]


@pytest.fixture(scope="module")
def training(folders):
    """Family → the template of a BVPO run on its tokenizer."""
    from swift.model import get_processor
    from swift.template import get_template

    logging.getLogger("swift").setLevel(logging.ERROR)
    made = {}
    for family, (name, _) in FAMILIES.items():
        processor = get_processor(str(folders[family]), model_type="qwen3")
        template = get_template(processor, template_type=name, loss_scale="last_round")
        template.set_mode("rlhf")
        block = empty_block(template.template_meta.non_thinking_prefix)
        made[family] = make_bvpo_template(template, TemplateSettings(RowRules(), block))
    return made


def asked(request, theirs) -> list[int]:
    """The token ids that a server generates behind."""
    if request.path == COMPLETIONS:
        assert isinstance(request.body["prompt"], list)
        return request.body["prompt"]
    switch = request.body["chat_template_kwargs"]
    return list(theirs.apply_chat_template(request.body["messages"], add_generation_prompt=True, **switch)["input_ids"])


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_prompts_and_answers_are_the_trained_tokens(family, talk, own_block, folders, training):
    """Done-when 8: prompt and answer of an empty sample, token for token what `swift rlhf` encodes of its row."""
    theirs = training[family].tokenizer
    asking = Asking("m", template=(template := ChatTemplate(folders[family])), switch=template.switch)
    if own_block:
        asking = Asking("m", template=template, switch=template.switch, own_block=True)
    prompt = Prompt("p", TALKS[talk], None, "f:1", {})
    request = asking.request(prompt, "empty", 0)
    assert request.path == (CHAT if family == "hybrid" and not own_block else COMPLETIONS)
    ids = asked(request, theirs)
    for answer in ANSWERS:
        text = asking.sample(request, {"message": {"content": answer}, "text": answer}, None).text
        row = {
            "messages": [*TALKS[talk], {"role": "assistant", "content": "<think>\nr\n</think>\n\n1"}],
            "rejected_response": "<think>\ns\n</think>\n\n2",
            "empty_response": text,
            "empty_rejected_response": "no",
        }
        encoded, account = training[family].encode_with_account(row)
        assert not account.lost
        trained = encoded["empty_chosen_input_ids"]
        start = response_start({"labels": encoded["empty_chosen_labels"]})
        assert trained[:start] == ids
        tokens = theirs.encode(answer, add_special_tokens=False)
        assert trained[start : start + len(tokens)] == tokens
        assert theirs.decode(trained[start + len(tokens) :]).strip() == theirs.eos_token


@pytest.mark.parametrize("family", FAMILIES)
def test_short_prompts_are_the_trained_tokens(family, folders, training):
    template = ChatTemplate(folders[family])
    asking = Asking("m", template=template, switch=template.switch, short_budget=9)
    prompt = Prompt("p", TALKS["system"], None, "f:1", {})
    thinking = "<think>\nWhat is 2+2? I think é 😀 of 4, then again of 4.\n</think>\n\n4"
    request = asking.request(prompt, "short", 0, thinking)
    text = asking.sample(request, {"text": "The answer is 4."}, None).text
    trace = text.removeprefix("<think>\n").removesuffix("\n</think>\n\nThe answer is 4.")
    assert trace and thinking.startswith(f"<think>\n{trace}") and len(template.encode(trace)) <= 9
    row = {
        "messages": [*TALKS["system"], {"role": "assistant", "content": text}],
        "rejected_response": text.replace("answer is 4", "answer is 5"),
    }
    encoded, account = training[family].encode_with_account(row)
    assert not account.lost
    assert encoded["chosen_input_ids"][: len(request.body["prompt"])] == request.body["prompt"]


def test_a_short_trace_is_kept_whole_and_one_of_half_a_character_is_not(folders):
    template = ChatTemplate(folders["thinking"])
    assert template.cut("2+2 😀", 100) == "2+2 😀"
    smiley = template.encode("a 😀")
    assert len(smiley) > 3
    assert template.cut("a 😀", len(smiley) - 1).strip() == "a"


def test_without_tokenizer_json_texts_are_asked_for(folders, tmp_path):
    folder = shutil.copytree(folders["r1"], tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    request = Asking("m", template=ChatTemplate(folder)).request(
        Prompt("p", TALKS["plain"], None, "f:1", {}), "empty", 0
    )
    assert request.body["prompt"].endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert request.body["add_special_tokens"] is False


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{}", "no chat template"),
        ("chat_template.jinja", "{% if %}", "its chat template is broken"),
        ("chat_template.jinja", "{{ raise_exception('no such role') }}", "no such role"),
    ],
)
def test_bad_templates_are_told(name, text, complaint, folders, tmp_path):
    folder = shutil.copytree(folders["hybrid"], tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        ChatTemplate(folder)


def test_files_that_hold_a_template(folders, tmp_path):
    folder = shutil.copytree(folders["hybrid"], tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    digest = ChatTemplate(folder).digest
    text = config.pop("chat_template")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert ChatTemplate(folder).digest == digest
    (folder / "chat_template.jinja").write_text(FAMILIES["thinking"][1])
    assert ChatTemplate(folder).switch is None
