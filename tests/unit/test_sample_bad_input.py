"""Done-when 7: bad input to `bvpo sample` is one clear line and exit code 2, and what was sampled before stays."""

import json
from pathlib import Path

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.asking.journal import FolderLock
from megatron_bvpo.sampling.samples import read_samples
from tests.unit.chat_models import write_chat_model
from tests.unit.openai_server import Served, free_port

ROW = {"prompt": "What is 1?", "answer": "1"}


class Place:
    """A finished folder of samples, and the command that made it."""

    def __init__(self, root: Path, address: str) -> None:
        self.root, self.address, self.out, self.prompts = root, address, root / "out", root / "prompts.jsonl"
        self.given = {"--server": [address], "--model": ["m"], "--max_tokens": ["9"], "--samples": ["2"]}
        self.given |= {"--thinking_switch": ["x"], "--patience": ["0.5"], "--out": [str(self.out)]}
        self.lock = None

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run(self) -> int:
        return bvpo(["sample", str(self.prompts), *(i for name, values in self.given.items() for i in (name, *values))])

    def give(self, name: str, *values) -> None:
        self.given["--" + name] = [str(value) for value in values]

    def without(self, name: str) -> None:
        del self.given["--" + name]

    def model(self, family="thinking") -> Path:
        return write_chat_model(self.root / "model", family)


@pytest.fixture(scope="module")
def server():
    with Served() as server:
        yield server


@pytest.fixture
def place(tmp_path, server):
    place = Place(tmp_path, server.address)
    place.file("prompts.jsonl", json.dumps(ROW) + "\n")
    assert place.run() == 0
    return place


def prompts(content, name="other.jsonl"):
    def change(place):
        place.prompts = place.file(name, content)

    return change


def flags(**given):
    def change(place):
        for name, value in given.items():
            place.give(name, *(value if isinstance(value, tuple) else (value,)))

    return change


def no_file(place):
    place.prompts = place.root / "nowhere.jsonl"


def out_is_a_file(place):
    place.give("out", place.file("a_file", "x"))


def out_of_others(place):
    (place.root / "home").mkdir()
    place.file("home/thesis.tex", "x")
    place.give("out", place.root / "home")


def settings(content):
    return lambda place: (place.out / "settings.json").write_text(content)


def shard(place):
    next((place.out / "samples").glob("*.parquet")).with_name("000007.parquet").write_bytes(b"PAR1 no")


def journal(place):
    (place.out / "journal" / "000009.jsonl").write_text(
        '{"broken\n{"prompt_id": "x", "mode": "m", "number": 0, "text": ""}\n'
    )


def no_switch(place):
    place.without("thinking_switch")


def tokenizer_without(name, family="thinking"):
    def change(place):
        place.without("thinking_switch")
        folder = place.model(family)
        (folder / name).unlink()
        place.give("tokenizer", folder)
        place.give("modes", "thinking", "short")
        place.give("short_budget", 4)

    return change


def two_switches(place):
    place.give("tokenizer", place.model("hybrid"))


def own_switch(place):
    place.without("thinking_switch")
    place.give("tokenizer", place.model("hybrid"))


def locked(place):
    place.lock = FolderLock(place.out)


def nobody(place):
    place.give("server", f"127.0.0.1:{free_port()}")
    place.give("samples", 3)


def wrong_key(place):
    place.other = Served(key="right")
    place.other.__enter__()
    place.give("server", place.other.address)
    place.give("samples", 3)


def key_file(content):
    return lambda place: place.give("api_key_file", place.file("key", content))


def judged_otherwise(place):
    place.give("judge", "exact")
    assert place.run() == 0
    place.give("judge_text", "whole")


CASES = {
    "no such file": (no_file, "nowhere.jsonl: cannot be read: No such file"),
    "an empty file": (prompts(""), "the file is empty"),
    "broken JSON": (prompts("{no\n"), "no row is a prompt; first: "),
    "no UTF-8": (prompts(b'{"prompt": "\xff"}\n'), "expected UTF-8"),
    "no prompt": (prompts('{"question": "Hi", "n": 1}\n'), "columns found: n, question"),
    "a prompt that is a number": (prompts('{"prompt": 3}\n'), "expected a list of messages, found int"),
    "an answered prompt": (
        prompts('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'),
        "ends in a turn of the role 'assistant', expected 'user'",
    ),
    "a tool's turn": (prompts('{"messages": [{"role": "tool", "content": "a"}]}\n'), "cannot be asked"),
    "an image": (prompts('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n'), "is no text"),
    "an empty question": (prompts('{"prompt": " "}\n'), "the last user turn is empty"),
    "a bad id": (prompts('{"prompt": "a", "id": []}\n'), "id: expected a text or a whole number"),
    "a damaged table": (prompts(b"PAR1 no", "other.parquet"), "cannot be read as a table"),
    "--out is a file": (out_is_a_file, "is a file; give a folder with --out"),
    "--out cannot be made": (flags(out="/proc/nowhere/out"), "/proc/nowhere/out: cannot be written: No such file"),
    "--out holds other files": (out_of_others, "holds other files (thesis.tex) and no settings.json"),
    "another temperature": (flags(temperature=0.7), "other settings: temperature 0.8 before, 0.7 now"),
    "another model": (flags(model="n"), 'model "m" before, "n" now'),
    "other prompts": (prompts('{"prompt": "a"}\n{"prompt": "b"}\n'), "other prompts (1 before, 2 now)"),
    "fewer samples": (flags(samples=1), "samples 2 before, 1 now"),
    "fewer modes": (flags(modes="thinking"), 'modes ["thinking", "empty"] before, ["thinking"] now'),
    "damaged settings": (settings("{"), "settings.json: cannot be read"),
    "settings of something else": (settings("[]"), "settings.json: cannot be read: no object"),
    "a damaged shard": (shard, "000007.parquet: cannot be read"),
    "a damaged journal": (journal, "000009.jsonl:1: a damaged line"),
    "a folder in use": (locked, "another bvpo sample is at work in this folder"),
    "no server": (lambda place: place.without("server"), "--server: missing"),
    "no address": (flags(server="ftp://x"), "no address of a server: 'ftp://x'"),
    "a password in an address": (flags(server="http://me:secret@x"), "an address must not hold a password"),
    "nobody listens": (nobody, "no server has answered for"),
    "a wrong key": (wrong_key, "401: who are you?"),
    "no key file": (flags(api_key_file="/nowhere/key"), "--api_key_file: cannot be read"),
    "an empty key file": (key_file("\n"), "holds no key on one line"),
    "no tokenizer's folder": (flags(tokenizer="/nowhere"), "--tokenizer: no folder: /nowhere"),
    "no way to switch thinking off": (no_switch, "the mode empty needs the model's chat template"),
    "no chat template": (tokenizer_without("tokenizer_config.json"), "no chat template"),
    "no tokens to cut": (tokenizer_without("tokenizer.json"), "no tokenizer.json, so that traces cannot be cut"),
    "another switch": (two_switches, "has 'enable_thinking', not 'x'"),
    "empty asked otherwise": (own_switch, "empty \"chat with x=false\" before"),
    "an empty block that is none": (flags(empty_block="<think>a</think>"), "--empty_block: an empty trace must hold"),
    "a written line break": (flags(empty_block=r"<think>\n</think>"), "found a backslash"),
    "short without thinking": (flags(modes="short", short_budget=4), "short cuts the traces of thinking samples"),
    "short without a budget": (flags(modes=("thinking", "short")), "short needs a budget"),
    "a short budget for nothing": (flags(short_budget=4), "is for the mode short"),
    "no samples": (flags(samples=0), "--samples: must be 1 or more, found 0"),
    "no prompts": (flags(limit=0), "--limit: must be 1 or more"),
    "a temperature below 0": (flags(temperature=-1), "--temperature: must be 0 or more"),
    "not a number": (flags(temperature="nan"), "--temperature: must be 0 or more, found nan"),
    "eight times the same": (flags(temperature=0), "all answers to a prompt are the same"),
    "top_p above 1": (flags(top_p=1.5), "--top_p: must be above 0 and at most 1"),
    "no time": (flags(timeout=0), "--timeout: must be above 0"),
    "no end of time": (flags(timeout="inf"), "--timeout: must be a finite number, found inf"),
    "more requests than open files": (flags(concurrency=10**12), "requests need more open files than"),
    "extra fields that are no JSON": (flags(extra_body="top_k=20"), "--extra_body: no JSON"),
    "extra fields that are a list": (flags(extra_body="[1]"), "--extra_body: expected an object"),
    "extra fields of our own": (flags(extra_body='{"n": 4}'), "n is set by the command itself"),
    "another limit of tokens": (flags(extra_body='{"max_completion_tokens": 4}'), "is set by the command itself"),
    "a template's variables that are none": (flags(extra_body='{"chat_template_kwargs": 3}'), "expected an object"),
    "a judge's option": (flags(judge="exact", judge_time_limit="nan"), "--judge_time_limit: must be 0 or more"),
    "an unknown judge": (flags(judge="oracle"), "--judge: no judge 'oracle'"),
    "a judge's name with a slash": (flags(judge="exact", judge_name="a/b"), "cannot name a judge"),
    "a judge of other settings": (judged_otherwise, "has judged with other settings"),
    "a budget without verdicts": (flags(budget="pairs"), "--budget: pairs needs verdicts"),
    "a pilot above the budget": (flags(budget="pairs", judge="exact", pilot=9), "9 is more than the 2 samples"),
    "a batch without results": (flags(batch="read"), "no results (*.results.jsonl)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, place, capsys):
    before = {sample.key: sample for sample in read_samples(place.out)}
    change, complaint = CASES[case]
    change(place)
    capsys.readouterr()
    try:
        assert place.run() == 2
    finally:
        if place.lock:
            place.lock.release()
        if hasattr(place, "other"):
            place.other.__exit__()
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and complaint in errors[0]
    assert "Traceback" not in said and "secret" not in said and "right" not in said
    if case not in ("a damaged shard", "a damaged journal"):
        assert {sample.key: sample for sample in read_samples(place.out)} == before


@pytest.mark.parametrize("flag", [["--modes", "loud"], ["--samples", "many"], ["--budget", "all"], ["--max_tokens"]])
def test_the_parser_refuses(flag, place, capsys):
    with pytest.raises(SystemExit) as ended:
        bvpo(["sample", str(place.prompts), "--out", str(place.out), "--model", "m", *flag])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bvpo sample: error: ")


def test_prompts_that_no_template_renders_are_recorded_as_failed(place):
    (place.root / "model").mkdir()
    folder = place.model()
    (folder / "chat_template.jinja").write_text(
        "{% if messages[-1].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}<think>"
    )
    place.without("thinking_switch")
    place.give("tokenizer", folder)
    place.give("out", place.root / "new")
    place.prompts = place.file("two.jsonl", '{"prompt": "bad"}\n{"prompt": "good"}\n')
    assert place.run() == 0
    errors = [s.error for s in read_samples(place.root / "new") if s.error]
    assert len(errors) == 2 and all("its chat template cannot render a prompt: no" in error for error in errors)
