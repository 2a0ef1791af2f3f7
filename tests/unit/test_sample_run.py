"""`bvpo sample` in one go: every sample once, in every mode, and what is told of those that failed."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.asking import sampling_run
from megatron_bvpo.sampling.asking.progress import Reasons
from megatron_bvpo.sampling.samples import (
    NO_TRACE_END,
    THINKS,
    TRUNCATED,
    Sample,
    read_judgements,
    read_prompts,
    read_samples,
    write_shard,
)
from tests.unit.chat_models import write_chat_model
from tests.unit.openai_server import Served, answer_of
from tests.unit.sample_runs import HYBRID, rows, sample

# --- one run ---


def test_every_sample_once(prompts, tmp_path, capsys):
    with Served() as one, Served(style="reasoning") as two:
        assert sample(prompts, tmp_path / "out", one, two) == 0
        requests = one.requests + two.requests
    found = rows(tmp_path / "out")
    asked = list(read_prompts(tmp_path / "out"))
    assert found.keys() == {(p.prompt_id, m, n) for p in asked for m in ("thinking", "empty") for n in range(4)}
    assert [(p.answer, p.source, p.columns) for p in asked][1] == ("1", f"{prompts}:2", {"family": "sum"})
    by_seed = {request["seed"]: request for request in requests}
    assert len(by_seed) == len(requests) == len(found)
    for (prompt_id, mode, _), answer in found.items():
        thinking = mode == "thinking"
        body = by_seed[answer.seed]
        assert body["messages"] == next(p.messages for p in asked if p.prompt_id == prompt_id)
        assert body["chat_template_kwargs"] == {"enable_thinking": thinking}
        trace, text = answer_of(body, thinking)
        assert answer.text == (f"<think>\n{trace}\n</think>\n\n{text}" if thinking else text)
        assert answer.tokens and answer.prompt_tokens and answer.marks == ()
        assert answer.logprob_sum == pytest.approx(-0.5 * answer.tokens)
    assert {s.server for s in read_samples(tmp_path / "out")} == {one.address, two.address}
    assert not list((tmp_path / "out" / "journal").iterdir())
    said = capsys.readouterr().err
    assert "6 prompts, modes thinking, empty: 48 samples, 0 are there" in said and "48 of 48 samples" in said


@pytest.mark.parametrize("style", ["raw", "opened", "closing", "reasoning", "reasoning_content", "r1"])
def test_texts_are_the_same_whatever_the_server_does_with_tags(style, prompts, tmp_path):
    with Served(style=style) as server:
        sample(prompts, tmp_path / "out", server, samples=1)
    with Served() as server:
        sample(prompts, tmp_path / "raw", server, samples=1)
    assert {k: s.text for k, s in rows(tmp_path / "out").items()} == {
        k: s.text for k, s in rows(tmp_path / "raw").items()
    }


@pytest.mark.parametrize("family", ["hybrid", "thinking", "r1"])
def test_three_modes(family, prompts, tmp_path):
    model = write_chat_model(tmp_path / "m", family)
    flags = ("--tokenizer", model, "--modes", "short", "thinking", "empty", "--short_budget", "5")
    with Served(style="closing") as server:
        assert sample(prompts, tmp_path / "out", server, samples=2, flags=flags) == 0
        paths = Counter(request["path"].removeprefix("/v1/") for request in server.requests)
    assert paths == ({"chat/completions": 24, "completions": 12} if family == "hybrid" else
                     {"chat/completions": 12, "completions": 24})  # fmt: skip
    found = rows(tmp_path / "out")
    assert Counter(key.mode for key in found) == {"thinking": 12, "empty": 12, "short": 12}
    for key, short in found.items():
        if key.mode == "short":
            start, _, answer = short.text.partition("\n</think>\n\n")
            assert found[key._replace(mode="thinking")].text.startswith(start) and start.startswith("<think>\nI")
            assert answer.startswith("The answer is")
    # A shard that is gone is asked for again; short samples then find their thinking samples on disk.
    shard = next((tmp_path / "out" / "samples").glob("*.parquet"))
    kept = [s for s in read_samples(tmp_path / "out") if s.mode != "short"]
    write_shard(shard, kept, Sample)
    with Served(style="raw") as server:
        sample(prompts, tmp_path / "out", server, samples=2, flags=flags)
        assert len(server.requests) == 12
    assert rows(tmp_path / "out") == found


def test_marks(prompts, tmp_path, capsys):
    with Served(finish="length", thinks_on=True) as server:
        sample(prompts, tmp_path / "out", server, samples=1)
    found = rows(tmp_path / "out")
    assert {s.finish_reason for s in found.values()} == {"length"}
    assert {s.marks for k, s in found.items() if k.mode == "empty"} == {(TRUNCATED, THINKS)}
    assert "empty: thinks: 6" in capsys.readouterr().err
    assert NO_TRACE_END not in {m for s in found.values() for m in s.marks}


def test_a_server_without_logprobs_is_used_without(prompts, tmp_path, capsys):
    with Served(logprobs="refused") as server:
        assert sample(prompts, tmp_path / "out", server, concurrency=1) == 0
        assert sum("logprobs" in request for request in server.requests) == 1
    assert {s.logprob_sum for s in rows(tmp_path / "out").values()} == {None}
    assert capsys.readouterr().err.count("tells no log-probs") == 1


# --- what a server makes of a prompt ---


def test_a_server_that_takes_no_token_ids_gets_texts(prompts, tmp_path, capsys):
    """`swift deploy` is one."""
    flags = ("--tokenizer", write_chat_model(tmp_path / "m", "r1"))
    with Served(ids=False) as server:
        assert sample(prompts, tmp_path / "out", server, concurrency=1, flags=flags) == 0
        asked = [request["prompt"] for request in server.requests if "prompt" in request]
    assert [type(prompt) for prompt in asked[:3]] == [list, str, str] and len(asked) == 25
    assert asked[1] == "<｜begin▁of▁sentence｜><｜User｜>What is 0?<｜Assistant｜><think>\n\n</think>\n\n"
    assert capsys.readouterr().err.count("takes no token ids") == 1


def test_something_around_a_rendered_prompt_ends_the_run(prompts, tmp_path, capsys):
    """`swift deploy` with its chat template around completions: another prompt than training's."""
    flags = ("--tokenizer", write_chat_model(tmp_path / "m", "thinking"))
    with Served(around=9) as server:
        assert sample(prompts, tmp_path / "out", server, flags=flags) == 2
    said = capsys.readouterr().err
    assert "tokens in a rendered prompt of" in said and "swift deploy puts its chat template around" in said
    assert not [key for key in rows(tmp_path / "out") if key.mode == "empty"]


@pytest.mark.parametrize("served", ["hybrid", "thinking"])
def test_a_server_that_ignores_the_switch_is_told(served, prompts, tmp_path, capsys):
    ours, theirs = (write_chat_model(tmp_path / family, family) for family in ("hybrid", served))
    with Served(tokenizer=str(theirs)) as server:
        assert sample(prompts, tmp_path / "out", server, flags=("--tokenizer", ours)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "it has another template" in line]
    assert len(told) == (2 if served == "thinking" else 0)  # once a mode
    assert all("or ignores enable_thinking" in line for line in told)


def test_no_torch_is_loaded(prompts, tmp_path):
    """Neither by help nor by a whole run: it starts on a login node in no time."""
    with Served() as server:
        code = (
            "import sys\nfrom megatron_bvpo.cli import bvpo\n"
            "try: bvpo(['sample', '--help'])\nexcept SystemExit: pass\nprint('first', *sys.modules)\n"
            f"bvpo(['sample', {str(prompts)!r}, '--out', {str(tmp_path / 'out')!r}, '--model', 'm', '--server', "
            f"{server.address!r}, '--max_tokens', '9', '--thinking_switch', 'x'])\nprint('then', *sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, then = (line.split() for line in done.stdout.splitlines() if line.startswith(("first", "then")))
    assert not {"torch", "transformers", "swift", "datasets", "aiohttp", "pyarrow", "jinja2", "tokenizers"} & {*first}
    assert not {"torch", "transformers", "swift", "datasets", "megatron"} & {*then} and "aiohttp" in then


# --- failed requests ---


def test_a_failed_request_is_recorded_told_and_asked_again_on_wish(prompts, tmp_path, capsys):
    with Served(always={"What is 3?": "400"}) as server:
        assert sample(prompts, tmp_path / "out", server) == 0
    failed = [s for s in rows(tmp_path / "out").values() if s.error]
    assert len(failed) == 8 and {s.error for s in failed} == {"400: a fault: 400"}
    assert {(s.text, s.finish_reason) for s in failed} == {(None, "error")}
    assert "failed 8 times: 400: a fault" in capsys.readouterr().err
    with Served() as server:
        sample(prompts, tmp_path / "out", server)
        assert not server.requests
        sample(prompts, tmp_path / "out", server, flags=(*HYBRID, "--retry_failed"))
        assert len(server.requests) == 8
    assert not [s for s in rows(tmp_path / "out").values() if s.error] and len(rows(tmp_path / "out")) == 48


def test_an_answer_that_came_at_last_is_judged(prompts, tmp_path):
    """Beside the judge's word on the request that failed."""
    judge = (*HYBRID, "--judge", "exact")
    for name, live in (("live", True), ("after", False)):
        out = tmp_path / name
        for always, retry in (({"What is 3?": "400"}, ()), ({}, ("--retry_failed",))):
            with Served(always=always) as server:
                assert sample(prompts, out, server, flags=((*judge, *retry) if live else (*HYBRID, *retry))) == 0
            if not live:
                assert bvpo(["judge", str(out), "--with", "exact"]) == 0
            said = list(read_judgements(out, "exact"))
            assert len(said) == 48 and sum(one.right is None for one in said) == (8 if always else 0)


def test_prompts_that_are_too_long_do_not_end_a_run_whose_answers_take_long(tmp_path, monkeypatch, capsys):
    """Refusals come at once; thirty of them are there before the first answer is."""
    monkeypatch.setattr(sampling_run, "_REFUSALS_AT_FIRST", 5)
    rows_of = [{"prompt": f"{'short' if i % 4 == 3 else 'long'} {i}"} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    flags = (*HYBRID, "--modes", "thinking")
    with Served(always={"long": "400"}, delay=1) as server:
        assert sample(tmp_path / "p.jsonl", tmp_path / "out", server, flags=flags, samples=1) == 0
    assert Counter(s.error for s in rows(tmp_path / "out").values()) == {None: 10, "400: a fault: 400": 30}
    with Served(always={"": "400"}, delay=1) as server:  # nothing is in flight that could be answered
        assert sample(tmp_path / "p.jsonl", tmp_path / "none", server, flags=flags, samples=1) == 2
        assert len(server.requests) < 20
    assert "thinking requests failed, and none has succeeded" in capsys.readouterr().err


def test_short_samples_share_the_fate_of_their_thinking_samples(prompts, tmp_path, monkeypatch):
    """So many that cannot be asked for are no sign of a wrong setting."""
    monkeypatch.setattr(sampling_run, "_REFUSALS_AT_FIRST", 5)
    model = write_chat_model(tmp_path / "m", "hybrid")
    with Served(always={f"What is {i}?": "400" for i in range(4)}, delay=0.5) as server:
        for modes in (("thinking",), ("thinking", "short", "--short_budget", "5")):
            flags = ("--tokenizer", model, "--modes", *modes)
            assert sample(prompts, tmp_path / "out", server, flags=flags, samples=2) == 0
    found = Counter((key.mode, s.error) for key, s in rows(tmp_path / "out").items())
    assert found == {
        ("thinking", "400: a fault: 400"): 8,
        ("short", "its thinking sample failed"): 8,
        ("thinking", None): 4,
        ("short", None): 4,
    }


def test_reasons_that_differ_in_numbers_are_one():
    told = Reasons()
    for reason in ("400: 9 tokens of 8", "400: 12 tokens of 8", "no server", "no server"):
        told.add(reason)
    assert told.lines() == ["failed 2 times, such as: 400: 9 tokens of 8", "failed 2 times: no server"]


def test_what_refuses_everything_spoils_nothing(prompts, tmp_path, capsys):
    with Served(always={"": "400"}) as server:
        assert sample(prompts, tmp_path / "out", server, samples=40) == 2
        assert len(server.requests) < 60  # of 480
    assert "requests failed, and none has succeeded: 400: a fault" in capsys.readouterr().err
    assert not rows(tmp_path / "out")


def test_a_mode_that_is_always_refused_ends_the_run(prompts, tmp_path, capsys):
    """Thinking goes well: its samples are kept, and no refusal of the other mode is recorded."""
    with Served(always={'"enable_thinking": false': "400"}) as server:
        assert sample(prompts, tmp_path / "out", server, samples=8) == 2
    assert re.search(r"the first 2\d empty requests failed", capsys.readouterr().err)
    found = rows(tmp_path / "out")
    assert found and {(key.mode, s.error) for key, s in found.items()} == {("thinking", None)}
