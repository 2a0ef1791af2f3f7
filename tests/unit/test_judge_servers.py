"""Judges behind servers: forms of requests and replies of each route, strict verdicts, and servers that fail."""

import json
from collections import Counter

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging import judge_requests
from megatron_bvpo.sampling.judging.judge_items import FAILED_REQUEST, NO_FINAL_ANSWER, NO_GOLD
from megatron_bvpo.sampling.judging.judges import Item, make_judge
from megatron_bvpo.sampling.judging.llm_judge import Rubric
from megatron_bvpo.sampling.samples import SampleKey
from tests.unit import judged_answers as known
from tests.unit.judge_server import JudgeServerInAThread

VLLM = [{"id": "rm", "owned_by": "vllm"}]
SGLANG = [{"id": "rm", "owned_by": "sglang"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)


@pytest.fixture(autouse=True)
def _quick_repetitions(monkeypatch):
    given = judge_requests.JudgeServer.__init__

    def quick(self, *args, **named):
        given(self, *args, **named)
        self.first_pause = 0.01

    monkeypatch.setattr(judge_requests.JudgeServer, "__init__", quick)


def an_item(text, answer="42", number=0, question="6 * 7?"):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return Item(SampleKey("p", "empty", number), messages, answer, text, {})


def items(count):
    return [an_item(f"{number}", number=number) for number in range(count)]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- rewards
def response_in(body):
    if "messages" in body:
        assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant"]
        return body["messages"][-1]["content"]
    if "text_1" in body:
        assert body["text_1"] == "6 * 7?"
        return body["text_2"]
    text = body.get("text") or body["input"]
    assert text.startswith("<system>Be brief.</><user>6 * 7?</><assistant>") and text.endswith("</>")
    return text.removesuffix("</>").rpartition(">")[2]


def closeness(text):
    return -abs(float(text) - 42)


REPLIES = {
    "/classify": lambda score: {"data": [{"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}]},
    "/v1/classify": lambda score: {"data": [{"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}]},
    "/pooling": lambda score: {"data": [{"index": 0, "object": "pooling", "data": [[0.5], [7.0], [score]]}]},
    "/score": lambda score: {"data": [{"index": 0, "object": "score", "score": score}]},
    "/v1/score": lambda score: {"data": [{"index": 0, "object": "score", "score": score}]},
    "sglang": lambda score: [{"embedding": [score], "meta_info": {}}],
}


@pytest.mark.parametrize(
    "route, engine, asked_with",
    [
        ("", VLLM, {"messages", "model", "use_activation"}),
        ("/classify", VLLM, {"messages", "model", "use_activation"}),
        ("/pooling", VLLM, {"messages", "model", "use_activation"}),
        ("/score", VLLM, {"text_1", "text_2", "model", "use_activation"}),
        ("/v1/score", VLLM, {"text_1", "text_2", "model", "use_activation"}),
        ("/classify", SGLANG, {"text"}),
        ("/v1/classify", SGLANG, {"input", "model", "use_activation", "add_special_tokens"}),
        ("/pooling", VLLM, {"input", "model", "use_activation", "add_special_tokens"}),
        ("/classify", None, {"messages", "use_activation"}),
    ],
)
def test_thirty_rewards_by_each_route(route, engine, asked_with, tokenizer):
    def answer(path, body):
        form = "sglang" if engine is SGLANG and path == "/classify" else path
        return 200, REPLIES[form](closeness(response_in(body)))

    rendered = bool(asked_with & {"text", "input"})
    with JudgeServerInAThread(answer, engine) as server:
        judge = make_judge(f"reward:{server.url}{route}", tokenizer=tokenizer if rendered else None)
        said = judge.judge(items(30))
        assert len(server.requests) == 30
        assert all(body.keys() == asked_with for _, body, _ in server.requests)
        assert all(path == (route or "/classify") for path, _, _ in server.requests)
    assert [one.score for one in said] == [closeness(str(number)) for number in range(30)]
    assert all(one.right is None and one.parsed and one.error is None for one in said)
    assert judge.settings["model"] == ("rm" if engine else "")
    assert server.url not in json.dumps(judge.settings)  # the same judge on another node


def test_token_ids_for_sglang(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, **{char: at for at, char in enumerate(dict.fromkeys("<>/6*7?4 2assistantBerif."), 1)}}
    tok = Tokenizer(models.WordLevel({**words}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tok.save(str(tokenizer / "tokenizer.json"))
    with JudgeServerInAThread(lambda path, body: (200, [{"embedding": [1.5]}]), SGLANG) as server:
        (one,) = make_judge(f"reward:{server.url}", tokenizer=tokenizer).judge([an_item("42")])
        assert one.score == 1.5
        assert server.requests[0][1].keys() == {"input_ids"} and len(server.requests[0][1]["input_ids"]) > 10


def test_a_threshold_makes_verdicts_of_rewards():
    with JudgeServerInAThread(lambda p, b: (200, REPLIES["/classify"](closeness(response_in(b)))), VLLM) as server:
        said = make_judge(f"reward:{server.url}", threshold=-1.0).judge(items(50))
        scores = make_judge(f"reward:{server.url}").judge([an_item(""), an_item(None, number=1)])
        verdicts = make_judge(f"reward:{server.url}", threshold=0.0).judge([an_item("")])
    assert [one.key.number for one in said if one.right] == [41, 42, 43]
    assert [(one.score, one.right, one.error) for one in scores + verdicts] == [
        (None, None, NO_FINAL_ANSWER),
        (None, None, FAILED_REQUEST),
        (0.0, False, NO_FINAL_ANSWER),
    ]


def test_one_of_several_numbers_is_named():
    with JudgeServerInAThread(lambda p, b: (200, {"data": [{"probs": [0.25, 0.75]}]}), VLLM) as server:
        with pytest.raises(UserError, match=r"--label: /classify gives 2 numbers .* say which is the score, 0 to 1"):
            make_judge(f"reward:{server.url}").judge(items(1))
        with pytest.raises(UserError, match="gives 2 numbers"):
            make_judge(f"reward:{server.url}", label=2).judge(items(1))
        (one,) = make_judge(f"reward:{server.url}", label=1).judge(items(1))
        assert one.score == 0.75
        assert "use_activation" not in server.requests[-1][1]


@pytest.mark.parametrize(
    "reply", [{}, [], {"data": []}, {"data": [{"probs": []}]}, {"data": [{"probs": ["x"]}]}, "ab", 3]
)
def test_a_reply_without_a_score_marks_the_sample(reply):
    with JudgeServerInAThread(lambda path, body: (200, json.loads(json.dumps(reply))), VLLM) as server:
        (one,) = make_judge(f"reward:{server.url}").judge(items(1))
    assert one.score is None and one.error


def test_requests_are_in_flight_together_and_no_more_than_asked_for():
    """The server answers sixteen at a time, when sixteen are there."""
    with JudgeServerInAThread(lambda p, b: (200, REPLIES["/classify"](1.0)), VLLM, together=16) as server:
        said = make_judge(f"reward:{server.url}", concurrency=16, time_limit=60).judge(items(64))
        assert [one.error for one in said] == [None] * 64 and server.most_at_once == 16


# ------------------------------------------------------------------------------------------------------ judge models
def chat(text, finish="stop", **message):
    return {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}]}


def grader(form):
    """A judge model that knows the verdicts of `judged_answers.MATH`, and writes them in a form of its own."""
    right = {(gold, text): verdict for gold, text, verdict in known.MATH}

    def answer(path, body):
        asked = body["messages"][0]["content"]
        for (gold, text), verdict in right.items():
            if f"[RIGHT ANSWER]\n{gold}\n" in asked and f"[RESPONSE]\n{text}\n" in asked:
                return 200, chat(form("CORRECT" if verdict else "INCORRECT", len(body["messages"]) > 1))
        raise AssertionError(asked)

    return answer


FORMS = {
    "as asked": lambda verdict, again: f"Because.\nANSWER: seven\nVERDICT: {verdict}",
    "bold": lambda verdict, again: f"Because.\n**ANSWER:** seven\n**VERDICT: {verdict}**\n",
    "lower case, a full stop": lambda verdict, again: f"Answer: seven\n\nVerdict: {verdict.lower()}.",
    "thinks first": lambda verdict, again: (
        f"<think>\nVERDICT: CORRECT? VERDICT: INCORRECT?\n</think>\n\nANSWER: seven\nVERDICT: {verdict}"
    ),
    "asked again": lambda verdict, again: f"VERDICT: {verdict}" if again else "ANSWER: seven\nIt is as it is.",
}


@pytest.mark.parametrize("form", FORMS)
def test_thirty_verdicts_of_a_judge_model(form):
    rows = [an_item(text, gold, number) for number, (gold, text, _) in enumerate(known.MATH)]
    with JudgeServerInAThread(grader(FORMS[form]), VLLM) as server:
        said = make_judge(f"llm:{server.url}/v1").judge(rows)
        assert all(path == "/v1/chat/completions" for path, _, _ in server.requests)
        assert all(body["temperature"] == 0 and body["model"] == "rm" for _, body, _ in server.requests)
    assert [one.right for one in said] == [verdict for _, _, verdict in known.MATH]
    assert {(one.parsed, one.error) for one in said} == {("seven", None)}
    assert all(one.score == float(one.right) for one in said)


@pytest.mark.parametrize(
    "reply, found",
    [
        ("VERDICT: CORRECT", (True, None)),
        ("ANSWER: NONE\nVERDICT: INCORRECT", (False, "NONE")),
        ("VERDICT: CORRECT\nI am not sure.", None),
        ("VERDICT: CORRECT or INCORRECT", None),
        ("The verdict: it is CORRECT", None),
        ("VERDICT: INCORRECTLY", None),
        ("CORRECT", None),
        ("", None),
    ],
)
def test_only_the_last_line_is_a_verdict(reply, found):
    assert Rubric("{response} VERDICT: CORRECT or INCORRECT").read(reply) == found


@pytest.mark.parametrize(
    "reply, found",
    [
        ("Good.\nSCORE: 7", 7.0),
        ("**SCORE: 7.5/10**", 7.5),
        ("SCORE: 10.", 10.0),
        ("SCORE: 11", None),
        ("SCORE: -1", None),
        ("SCORE: 7 of 9", None),
        ("VERDICT: CORRECT", None),
    ],
)
def test_scores_of_a_rubric(reply, found):
    read = Rubric("{response} end with SCORE: and a number from 0 to 10").read(reply)
    assert (read and read[0]) == found


def test_a_rubric_with_scores_judges_only_from_a_threshold_on(tmp_path):
    (tmp_path / "r.txt").write_text("Grade {response}. End with SCORE: 0 to 10")
    with JudgeServerInAThread(lambda p, b: (200, chat("SCORE: 6")), VLLM) as server:
        judge = make_judge(f"llm:{server.url}", rubric=tmp_path / "r.txt")
        assert not judge.needs_answers
        (one,) = judge.judge([an_item("x", None)])
        (other,) = make_judge(f"llm:{server.url}", rubric=tmp_path / "r.txt", threshold=6).judge([an_item("x", None)])
    assert (one.score, one.right, one.parsed) == (6.0, None, "x")
    assert (other.score, other.right) == (6.0, True)


def test_what_is_filled_in_is_not_looked_at_again():
    rubric = Rubric('{{"a": {question}}} {answer} {response} {"VERDICT: 1"}')
    item = an_item("{answer} {{}} VERDICT: CORRECT", "{response}", question="{question}")
    assert rubric.fill(item) == '{"a": {question}} {response} {answer} {{}} VERDICT: CORRECT {"VERDICT: 1"}'


def test_a_verdict_that_cannot_be_read_is_asked_for_once_more_and_then_told():
    replies = {"never": chat("I would rather not."), "cut": chat("VERDICT: CORR", "length"), "null": chat(None)}

    def answer(path, body):
        return 200, next(
            reply for name, reply in replies.items() if f"[RESPONSE]\n{name}" in body["messages"][0]["content"]
        )

    with JudgeServerInAThread(answer, VLLM) as server:
        texts = ["never", "cut", "null"]
        judge = make_judge(f"llm:{server.url}", max_tokens=9)
        said = judge.judge([an_item(text, number=number) for number, text in enumerate(texts)])
        assert len(server.requests) == 6
        assert server.requests[-1][1]["messages"][-1]["content"].endswith("VERDICT: CORRECT or VERDICT: INCORRECT")
        (gold,) = judge.judge([an_item("x", None)])
    assert [one.right for one in said] == [None] * 3
    assert "it ends in 'I would rather not.'" in said[0].error
    assert "cut off at --max_tokens 9" in said[1].error
    assert "has no verdict" in said[2].error
    assert gold.error == NO_GOLD


# ------------------------------------------------------------------------------------------------- servers that fail
def test_what_passes_is_waited_for():
    seen = {}

    def answer(path, body):
        text = body["messages"][-1]["content"]
        seen[text] = seen.get(text, 0) + 1
        if seen[text] <= 3:
            return [(429, {"error": "slow down"}), (503, "busy"), (-1, ""), (200, "{broken")][int(text) % 4]
        return 200, REPLIES["/classify"](1.0)

    with JudgeServerInAThread(answer, VLLM) as server:
        said = make_judge(f"reward:{server.url}").judge(items(20))
    assert [one.score for one in said] == [1.0] * 20


def test_what_does_not_pass_marks_the_sample_and_the_others_are_judged():
    def answer(path, body):
        text = body["messages"][-1]["content"]
        if text == "3":
            return 400, {"error": {"message": "too\nlong"}}
        if text == "4":
            return 500, "no"
        return (0, "") if text == "5" else (200, REPLIES["/classify"](1.0))

    with JudgeServerInAThread(answer, VLLM) as server:
        judge = make_judge(f"reward:{server.url}", time_limit=3.0, concurrency=1)
        said = judge.judge(items(30))
        asked = Counter(body["messages"][-1]["content"] for _, body, _ in server.requests)
    assert [one.key.number for one in said if one.error] == [3, 4, 5]
    assert [one.error for one in said[3:6]] == ["status 400: too long", "status 500: no", "no answer within 3 s"]
    # What was refused or took too long is not asked for again.
    assert asked == Counter(map(str, range(30))) | {"4": judge_requests.ATTEMPTS}


def test_a_server_that_goes_away_ends_the_judging():
    server = JudgeServerInAThread(lambda path, body: (200, REPLIES["/classify"](1.0)), VLLM)
    with server:
        judge = make_judge(f"reward:{server.url}", concurrency=1)
        said = judge.stream(iter(items(10)))
        assert next(said).score == 1.0
    with pytest.raises(UserError, match="nobody answers at http.*what was judged is kept"):
        list(said)


def test_the_key_is_sent_and_not_kept(monkeypatch):
    monkeypatch.setenv("BVPO_JUDGE_API_KEY", "sesame")
    with JudgeServerInAThread(lambda path, body: (200, REPLIES["/classify"](1.0)), VLLM) as server:
        judge = make_judge(f"reward:{server.url}")
        judge.judge(items(1))
        assert server.requests[0][2]["Authorization"] == "Bearer sesame"
    assert "sesame" not in json.dumps(judge.settings)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda url, d: make_judge("reward:http://127.0.0.1:9"), "--with: nobody answers at http://127.0.0.1:9"),
        (lambda url, d: make_judge("llm:http://127.0.0.1:9"), "--with: nobody answers at http://127.0.0.1:9"),
        (lambda url, d: make_judge(f"llm:{url}", model="other"), "--model: .* does not serve 'other'; it serves rm"),
        (lambda url, d: make_judge(f"reward:{url}/v1/classify"), "--tokenizer: .* takes rendered text"),
        (lambda url, d: make_judge(f"reward:{url}", tokenizer=d / "none"), "no folder"),
        (lambda url, d: make_judge(f"llm:{url}", rubric=d / "none"), "--rubric: cannot be read"),
        (lambda url, d: rubric(url, d, "{response} {gold} VERDICT:"), r"unknown placeholder \{gold\}"),
        (lambda url, d: rubric(url, d, "{answer} VERDICT:"), r"\{response\} is missing"),
        (lambda url, d: rubric(url, d, "Grade {response}"), "asks for neither a line `VERDICT"),
        (
            lambda url, d: make_judge(f"reward:{url}/pooling").judge(items(1)),
            "/pooling answers 404, no such route or model",
        ),
        (lambda url, d: make_judge(f"llm:{url}").judge([an_item("x")]), "refuses the request .status 400: no chat"),
        (lambda url, d: make_judge(f"reward:{url}/score").judge(items(1)), "answers 401.*set BVPO_JUDGE_API_KEY"),
    ],
)
def test_mistakes_end_in_one_message(make, complaint, tmp_path):
    def answer(path, body):
        return {"/score": (401, {}), "/v1/chat/completions": (400, {"message": "no chat"})}.get(path, (404, "nothing"))

    with JudgeServerInAThread(answer, VLLM) as server:
        with pytest.raises(UserError, match=complaint):
            make(server.url, tmp_path)


def rubric(url, folder, text):
    (folder / "rubric.txt").write_text(text)
    return make_judge(f"llm:{url}", rubric=folder / "rubric.txt")


def test_a_server_without_a_list_of_models_needs_its_name():
    with JudgeServerInAThread(lambda path, body: (200, chat("ANSWER: 1\nVERDICT: CORRECT")), None) as server:
        with pytest.raises(UserError, match="--model: .* does not say what it serves"):
            make_judge(f"llm:{server.url}")
        (one,) = make_judge(f"llm:{server.url}", model="mine").judge([an_item("1")])
        assert one.right and server.requests[0][1]["model"] == "mine"
