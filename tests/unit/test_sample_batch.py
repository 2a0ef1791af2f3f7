"""`--batch`: the same samples as over a server, through files; and budgets in rounds."""

import json
from collections import Counter

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.asking.batch_files import RAW_TEMPLATE
from megatron_bvpo.sampling.samples import read_samples
from tests.unit.chat_models import write_chat_model
from tests.unit.openai_server import Behaviour, Served
from tests.unit.sample_runs import rows


def command(prompts, out, *flags, samples=2):
    given = ["sample", prompts, "--out", out, "--model", "m", "--max_tokens", 100, "--samples", samples, *flags]
    return bvpo([str(item) for item in given])


def answer(folder, number=1, fault=lambda name: False) -> Counter:
    """What `vllm run-batch` does: chat completions alone; raw ones behind a template that adds nothing."""
    engine, counts = Behaviour({}), Counter()
    for path in sorted((folder / "batch").glob(f"{number:06d}-*.jsonl")):
        if ".results" in path.name:
            continue
        kind = path.stem.split("-")[1]
        results = []
        for line in path.read_text().splitlines():
            request = json.loads(line)
            assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
            counts[kind] += 1
            body = request["body"]
            if kind == "raw":
                (message,) = body["messages"]
                assert message["content"].startswith(("<|im_start|>", "<｜begin▁of▁sentence｜>"))
                body = {**body, "chat_template_kwargs": {"enable_thinking": False}}
            response = {"status_code": 200, "request_id": "r", "body": engine.good(body, chat=True)}
            result = {"id": "i", "custom_id": request["custom_id"], "response": response, "error": None}
            if fault(request["custom_id"]):
                error = {"error": {"message": "too long"}}
                result |= {"response": {"status_code": 400, "request_id": "r", "body": error}, "error": "no"}
            results.append(json.dumps(result) + "\n")
        path.with_name(f"{path.stem}.results.jsonl").write_text("".join(results))
    return counts


def test_the_samples_of_a_server(prompts, tmp_path, capsys):
    flags = ("--thinking_switch", "enable_thinking")
    with Served() as server:
        command(prompts, tmp_path / "served", "--server", server.address, *flags)
    out = tmp_path / "out"
    assert command(prompts, out, *flags, "--batch", "write") == 0
    said = capsys.readouterr().err
    assert f"24 requests: vllm run-batch -i {out}/batch/000001-chat.jsonl -o" in said and "--batch read" in said
    assert answer(out) == {"chat": 24}
    assert command(prompts, out, *flags, "--batch", "read") == 0
    assert "24 samples are new" in capsys.readouterr().err
    assert rows(out) == rows(tmp_path / "served")
    assert command(prompts, out, *flags, "--batch", "read") == 0
    assert "24 results were read before" in capsys.readouterr().err
    assert command(prompts, out, *flags, "--batch", "write") == 0
    assert "nothing is left to ask for" in capsys.readouterr().err
    assert len(rows(out)) == 24


@pytest.mark.parametrize("family", ["thinking", "r1"])
def test_rendered_prompts_and_short_samples_in_two_rounds(family, prompts, tmp_path, capsys):
    model = write_chat_model(tmp_path / "m", family)
    out = tmp_path / "out"
    flags = ("--tokenizer", model, "--modes", "thinking", "empty", "short", "--short_budget", 5)
    command(prompts, out, *flags, "--batch", "write")
    assert f"--chat-template {out}/batch/raw.jinja" in capsys.readouterr().err
    assert (out / "batch" / "raw.jinja").read_text() == RAW_TEMPLATE
    assert answer(out) == {"chat": 12, "raw": 12}
    command(prompts, out, *flags, "--batch", "read")
    command(prompts, out, *flags, "--batch", "write")
    assert answer(out, 2) == {"raw": 12}
    command(prompts, out, *flags, "--batch", "read")
    found = rows(out)
    assert Counter(key.mode for key in found) == {"thinking": 12, "empty": 12, "short": 12}
    for key, sample in found.items():
        if key.mode == "short":
            trace, _, _ = sample.text.partition("\n</think>\n\n")
            assert found[key._replace(mode="thinking")].text.startswith(trace)
    # Over a server the same prompts are asked as tokens: what they say is the same.
    asked = [json.loads(line)["body"] for line in (out / "batch" / "000001-raw.jsonl").read_text().splitlines()]
    with Served() as server:
        command(prompts, tmp_path / "served", *flags[:2], "--modes", "empty", "--server", server.address)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts = {tokenizer.decode(r["prompt"], skip_special_tokens=False) for r in server.requests}
        seeds = {r["seed"] for r in server.requests}
    assert {body["messages"][0]["content"] for body in asked} == texts
    assert {body["seed"] for body in asked} == seeds


def test_errors_and_other_lines(prompts, tmp_path, capsys):
    out, flags = tmp_path / "out", ("--thinking_switch", "x", "--modes", "thinking")
    command(prompts, out, *flags, "--batch", "write")
    assert command(prompts, out, *flags, "--batch", "write") == 2
    assert "no results yet: 000001-chat.jsonl" in capsys.readouterr().err
    assert command(prompts, out, *flags, "--batch", "read") == 2
    assert "run what --batch write has written" in capsys.readouterr().err
    answer(out, fault=lambda name: True)
    assert command(prompts, out, *flags, "--batch", "read") == 2
    assert "all 12 results are errors: 400: too long" in capsys.readouterr().err
    assert not rows(out)
    answer(out, fault=lambda name: name.endswith(":1"))
    results = out / "batch" / "000001-chat.results.jsonl"
    results.write_text(results.read_text() + '{"custom_id": "other:thinking:0"}\nhalf a li')
    assert command(prompts, out, *flags, "--batch", "read") == 0
    said = capsys.readouterr().err
    assert "6 requests failed" in said and "2 lines are no results of these prompts" in said
    assert Counter(s.error for s in read_samples(out)) == {None: 6, "400: too long": 6}


def test_a_failed_request_that_is_asked_again_is_taken_from_the_later_file(prompts, tmp_path):
    out, flags = tmp_path / "out", ("--thinking_switch", "enable_thinking")
    command(prompts, out, *flags, "--batch", "write")
    answer(out, fault=lambda name: name.endswith(":1"))
    command(prompts, out, *flags, "--batch", "read")
    assert Counter(s.error for s in read_samples(out)) == {None: 12, "400: too long": 12}
    command(prompts, out, *flags, "--batch", "write", "--retry_failed")
    assert answer(out, 2) == {"chat": 12}
    command(prompts, out, *flags, "--batch", "read")
    with Served() as server:
        command(prompts, tmp_path / "served", "--server", server.address, *flags)
    assert rows(out) == rows(tmp_path / "served")


# --- budgets ---

BUDGET = ("--thinking_switch", "enable_thinking", "--judge", "tests.unit.sample_judges:last_digit", "--pilot", 3)


@pytest.mark.parametrize("budget", ["balanced", "gvm", "pairs"])
def test_a_budget_is_spent_in_rounds(budget, prompts, tmp_path, capsys):
    """In a stream and through files: the same samples, never more than the budget or the most for one prompt."""
    flags = (*BUDGET, "--budget", budget, "--max_samples", 14)
    with Served() as server:
        assert command(prompts, tmp_path / "served", *flags, "--server", server.address, samples=8) == 0
    said = capsys.readouterr().err
    assert "round 1: 36 samples for 6 prompts, at most 3 for one" in said and "round 2" in said
    found = rows(tmp_path / "served")
    given = Counter((key.prompt_id, key.mode) for key in found)
    assert len(given) == 12 and max(given.values()) <= 14 and min(given.values()) >= 3
    for mode in ("thinking", "empty"):
        assert 18 < sum(count for key, count in given.items() if key[1] == mode) <= 48
    assert len(set(given.values())) > 1  # not uniform
    if len(found) < 96:
        assert f"the budget left {96 - len(found)} samples unspent" in said
    with Served() as server:  # nothing is left to do
        assert command(prompts, tmp_path / "served", *flags, "--server", server.address, samples=8) == 0
        assert not server.requests
    out, number = tmp_path / "out", 0
    while True:
        number += 1
        command(prompts, out, *flags, "--batch", "write", samples=8)
        if not answer(out, number):
            break
        command(prompts, out, *flags, "--batch", "read", samples=8)
        assert command(prompts, out, *flags, "--batch", "write", samples=8) == 2  # not judged yet
        assert bvpo(["judge", str(out), "--with", "tests.unit.sample_judges:last_digit"]) == 0
    assert number > 2
    assert rows(out) == found


def test_a_budget_that_is_killed_goes_on_with_its_round(prompts, tmp_path):
    flags = (*BUDGET, "--budget", "pairs", "--max_samples", 14)
    with Served() as server:
        command(prompts, tmp_path / "calm", *flags, "--server", server.address, samples=8)
    found = rows(tmp_path / "calm")
    with Served(always={"What is 4?": "400"}) as server:  # ends, with failures; they are dropped and asked again
        command(prompts, tmp_path / "out", *flags, "--server", server.address, samples=8)
    rounds = sorted((tmp_path / "out" / "rounds").iterdir())
    for path in rounds[1:]:
        path.unlink()
    for path in (tmp_path / "out").glob("*/*.parquet"):
        path.unlink()
    for path in (tmp_path / "out" / "judgements").rglob("*.parquet"):
        path.unlink()
    with Served() as server:  # as after a kill in the middle of round 1
        command(prompts, tmp_path / "out", *flags, "--server", server.address, samples=8)
    assert rows(tmp_path / "out") == found
