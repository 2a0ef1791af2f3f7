"""`bvpo pairs` on folders: the rows it writes, and what it says of them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.rows import RowRules, check_row
from megatron_bvpo.sampling.pairing.pairs_report import histogram
from megatron_bvpo.sampling.samples import NO_TRACE_END, THINKS, TRUNCATED, Judgement
from tests.unit.pairs_runs import folder_of, pairs_command, small
from tests.unit.sample_folders import answered, ask, synthetic, write_folder


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    return pairs_command(tmp_path, monkeypatch, capsys)


def test_rows(make, tmp_path):
    small(tmp_path / "s")
    code, rows, said, err = make("s", picture=True)
    assert code == 0 and not err
    both, alone = rows["pairs.jsonl"]
    assert [m["role"] for m in both["messages"]] == ["user", "assistant"]
    assert "It is 4" in both["messages"][1]["content"] and "It is 5" in both["rejected_response"]
    assert "4" in both["empty_response"] and "5" in both["empty_rejected_response"]
    assert [m["role"] for m in alone["messages"]] == ["user"] and "rejected_response" not in alone
    assert (both["accept_rate"], both["empty_accept_rate"]) == (0.5, 0.5)
    assert (alone["accept_rate"], alone["empty_accept_rate"]) == (1.0, 0.5)
    assert (both["prompt_id"], both["judge"], both["answer"]) == ("q1", "math", "4")
    for mode, prefix in (("thinking", ""), ("empty", "empty_")):
        chosen, rejected = both["numbers"][mode]
        text = both[f"{prefix}rejected_response"]
        assert chosen % 2 == 0 and rejected % 2 == 1 and text.endswith("It is 5" + "." * rejected)
    assert "thinking: 1 all right" in said and "1 row with an empty pair alone" in said
    assert (tmp_path / "pairs.report.md").read_text().strip() == said.strip()
    assert (tmp_path / "pairs.report.png").read_bytes()[:4] == b"\x89PNG"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    options=st.lists(
        st.sampled_from(
            ["--match_length", "--keep_truncated", "--rejected=likely", "--max_pairs_per_prompt=3", "--heldout=.3"]
        ),
        unique=True,
    ),
    policy=st.sampled_from(["right_wrong", "best_worst"]),
)
def test_every_row_passes_the_trainers_checks_and_says_what_its_samples_say(seed, options, policy, make, tmp_path):
    if policy == "best_worst":
        options = [option for option in options if "rejected" not in option]
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    folder = tmp_path / f"s{seed}"
    synthetic(folder, 40, seed=seed)
    code, rows, _, err = make(folder, "--policy", policy, *options)
    assert code == 0, err
    prompts = {name: {row["messages"][0]["content"] for row in found} for name, found in rows.items()}
    if "--heldout=.3" in options:
        assert rows["pairs_heldout.jsonl"] and not prompts["pairs.jsonl"] & prompts["pairs_heldout.jsonl"]
    for row in (row for found in rows.values() for row in found):
        canonical, verdict = Reading(RowRules()).canonical(row)
        assert verdict == check_row(row, RowRules()) and not verdict.problems or "thinking" in row["numbers"]
        assert verdict.trace_ok == ("thinking" in row["numbers"]) and canonical["messages"]
        assert (verdict.empty_source == "own") == ("empty" in row["numbers"])
        answer = row["answer"]
        for mode in row["numbers"]:
            prefix = {"thinking": "", "empty": "empty_"}[mode]
            chosen = row["empty_response"] if prefix else row["messages"][-1]["content"]
            rejected = row[f"{prefix}rejected_response"]
            assert re.search(rf"The result is {answer}\b", chosen)
            assert not re.search(rf"The result is {answer}\b", rejected)
            assert "</think>" not in chosen + rejected or not prefix


def test_the_same_start_writes_the_same_bytes(make, tmp_path):
    synthetic(tmp_path / "a", 60)
    make("a", "--heldout", "9", out="one.jsonl")
    make("a", "--heldout", "9", out="two.jsonl")
    make("a", "--heldout", "9", "--seed", "1", out="other.jsonl")
    for one, two in (("one", "two"), ("one_heldout", "two_heldout")):
        assert (tmp_path / f"{one}.jsonl").read_bytes() == (tmp_path / f"{two}.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() != (tmp_path / "other.jsonl").read_bytes()


def test_what_cannot_be_used_is_counted(make, tmp_path):
    """A sample that thinks with thinking off never gets into D_e, nor one without an end into D_t."""
    thinks = "Let me see.\n</think>\n\nIt is 5"
    folder_of(
        tmp_path,
        answered("q1", 0, True, mode="empty"),
        answered("q1", 1, False, mode="empty", text=thinks, marks=(THINKS,)),
        answered("q1", 2, False, mode="empty", text=thinks),  # not marked
        answered("q1", 3, False, mode="empty", text=None, finish_reason="error"),
        answered("q1", 4, False, mode="empty"),
        answered("q1", 5, False, mode="empty", text="It is 5...."),  # as number 4
        answered("q1", 0, True),
        answered("q1", 1, False, text="<think>\nTwo and", marks=(TRUNCATED,), finish_reason="length"),
        answered("q1", 2, False, text="<think>\nTwo and", marks=(NO_TRACE_END,)),
        answered("q1", 3, False, text="It is 5."),
        answered("q1", 4, False, parsed=None),
    )
    code, rows, said, _ = make("s")
    assert code == 0 and len(rows["pairs.jsonl"]) == 1
    assert rows["pairs.jsonl"][0]["numbers"] == {"empty": [0, 4]}
    assert "- thinking: 1 no answer was read out of the wrong ones" in said
    for line in (
        "- empty: 2 thinks although thinking was off, 1 whose request failed, 1 the same text as another sample",
        "- thinking: 1 truncated, 1 no end of its trace, 1 no trace, neither <think> nor </think>",
        "empty: 2 samples (33%) think although thinking was off",
        "few distinct prompts: 1.",
    ):
        assert line in said


def test_truncated_answers_are_kept_where_they_can_be(make, tmp_path):
    cut = {"marks": (TRUNCATED,), "finish_reason": "length"}
    folder_of(tmp_path, answered("q1", 0, True), answered("q1", 1, False, **cut))
    assert "no pair at all (thinking: 1 the wrong ones cannot be used: truncated)" in make("s")[3]
    code, rows, said, _ = make("s", "--keep_truncated")
    assert code == 0 and rows["pairs.jsonl"][0]["numbers"] == {"thinking": [0, 1]} and "truncated samples kept" in said


def test_short_pairs_stand_beside_others_and_not_alone(make, tmp_path):
    made = [answered(q, n, n == 0, mode="short") for q in ("q1", "q2") for n in range(2)]
    made += [answered("q1", n, n == 0) for n in range(2)]
    folder_of(tmp_path, *made, prompts=("q1", "q2"))
    code, rows, _, _ = make("s")
    (row,) = rows["pairs.jsonl"]
    assert code == 0 and row["short_response"].endswith("It is 4") and row["short_accept_rate"] == 0.5
    assert row["numbers"] == {"thinking": [0, 1], "short": [0, 1]}


def test_several_pairs_of_a_prompt(make, tmp_path):
    made = [answered("q1", n, n < 3) for n in range(6)] + [answered("q1", n, n < 1, mode="empty") for n in range(4)]
    folder_of(tmp_path, *made)
    _, rows, _, _ = make("s", "--max_pairs_per_prompt", "5")
    numbers = [row["numbers"] for row in rows["pairs.jsonl"]]
    assert [list(n) for n in numbers] == [["thinking", "empty"], ["thinking"], ["thinking"]]
    assert sorted(i for n in numbers for i in n["thinking"]) == list(range(6))


def test_one_prompt_in_two_folders_joins_its_samples(make, tmp_path):
    """Under other ids, too; and the same id with other words is another prompt."""
    right, wrong = answered("mine", 0, True), answered("yours", 0, False)
    text = "What is two and two?"
    write_folder(tmp_path / "a", [ask("mine", text), ask("x", "One?")], [right[0]], [right[1]])
    other = [answered("x", n, n == 0) for n in range(2)]
    write_folder(
        tmp_path / "b",
        [ask("yours", text), ask("x", "Two?")],
        [wrong[0], *(s for s, _ in other)],
        [wrong[1], *(j for _, j in other)],
        settings={"model": "other", "temperature": 0.8, "seed": 7},
    )
    (tmp_path / "b" / "judgements" / "math" / "settings.json").write_text('{"text": "whole"}')
    code, rows, said, err = make("a", "b")
    assert code == 0, err
    assert [(r["prompt_id"], r["folders"]["thinking"]) for r in rows["pairs.jsonl"]] == [
        ("mine", ["a", "b"]),
        ("x", ["b", "b"]),
    ]
    assert 'may compare models and not answers: model: a "tiny", b "other"; text: a null, b "whole".' in said


def test_samples_without_a_verdict_are_told_by_what_helps(make, tmp_path):
    """A response that never ended is wrong, and that is a verdict."""
    cut = {"marks": (TRUNCATED,), "finish_reason": "length", "text": "<think>\nTwo and"}
    folder_of(
        tmp_path,
        answered("q1", 0, True),
        answered("q1", 1, False),
        (answered("q1", 2, False, **cut)[0], Judgement("q1", "thinking", 2, 0.0, False, error="no final answer")),
        (answered("q1", 3, True)[0], Judgement("q1", "thinking", 3, error="no verdict within 10 s")),
        (answered("q1", 4, True, text=None, finish_reason="error")[0], Judgement("q1", "thinking", 4, error="no text")),
        (answered("q1", 5, True)[0], Judgement("q2", "thinking", 5)),  # of another prompt
    )
    _, rows, said, _ = make("s")
    assert rows["pairs.jsonl"][0]["accept_rate"] == round(1 / 3, 6)
    assert [line for line in said.splitlines() if " of 6 " in line] == [
        "- thinking: 1 of 6 samples are not judged yet; bvpo judge goes on where it was stopped.",
        "- thinking: the judge came to no verdict on 1 of 6 samples; bvpo judge --again failed tries again.",
        "- thinking: 1 of 6 requests failed; bvpo sample --retry_failed asks for these answers again.",
    ]


def test_a_mode_that_one_folder_lacks_is_no_other_setting(make, tmp_path):
    for name, mode, budget in (("a", "thinking", 12), ("b", "empty", None), ("c", "thinking", 24)):
        samples, judged = zip(*(answered(name, n, n == 0, mode=mode) for n in range(2)), strict=True)
        settings = {"model": "tiny", "short_budget": budget, "empty": "chat" if mode == "empty" else None}
        write_folder(tmp_path / name, [ask(name)], list(samples), list(judged), settings=settings)
    assert "may compare models" not in make("a", "b", out="one.jsonl")[2]
    assert "may compare models and not answers: short_budget: a 12, c 24." in make("a", "b", "c")[2]


def test_a_mix_by_the_names_of_folders(make, tmp_path):
    synthetic(tmp_path / "one" / "samples", 60, samples=8)
    synthetic(tmp_path / "two" / "samples", 60, samples=8, seed=1)
    code, rows, said, _ = make("DS1=one/samples", "DS2=two/samples/", "--mix", "DS1=0.25", "DS2=75%")
    names = [next(iter(row["folders"].values()))[0] for row in rows["pairs.jsonl"]]
    assert code == 0 and abs(names.count("DS1") / len(names) - 0.25) < 0.02
    assert re.search(r"Rows by folder: DS1 \d+ \(0.25\), DS2 \d+ \(0.75\)", said)


# --- evaluation sets ---

LONG = "A train leaves the station at noon and runs at forty miles an hour. When does it arrive in the town?"
SETS = {
    "bench.jsonl": json.dumps({"question": f"Please read this with care. {LONG}", "id": "b1"}) + "\n",
    "bench.json": json.dumps([{"messages": [{"role": "user", "content": LONG.upper()}]}]),
    "bench.txt": f"Something else.\n{LONG}\n",
    "bench.csv": f'id,problem\n1,"{LONG}"\n',
    "other-columns.jsonl": json.dumps({"aufgabe": LONG}) + "\n",
}


@pytest.mark.parametrize("name", SETS)
def test_prompts_in_an_evaluation_set_are_dropped_and_named(name, make, tmp_path):
    (tmp_path / name).write_text(SETS[name])
    asked = [ask("q1", f"Once more: {LONG}"), ask("q2", "A train leaves the station."), ask("q3", "When?")]
    made = [answered(f"q{q}", n, n == 0) for q in (1, 2, 3) for n in range(2)]
    write_folder(tmp_path / "s", asked, [s for s, _ in made], [j for _, j in made])
    code, rows, said, err = make(
        "s",
        "--exclude",
        name,
    )
    assert code == 0, err
    assert [row["prompt_id"] for row in rows["pairs.jsonl"]] == ["q2", "q3"]
    assert f"1 prompts stand in an evaluation set and are dropped: stands in {name}: 'a train leaves" in said


def test_short_prompts_must_be_equal_as_a_whole_and_japanese_has_words(make, tmp_path):
    (tmp_path / "bench.txt").write_text("When?\n東京から大阪まで新幹線で何時間かかりますか\n")
    asked = [
        ask("q1", "when"),
        ask("q2", "When then?"),
        ask("q3", "では、東京から大阪まで新幹線で何時間かかりますか。"),
    ]
    made = [answered(f"q{q}", n, n == 0) for q in (1, 2, 3) for n in range(2)]
    write_folder(tmp_path / "s", asked, [s for s, _ in made], [j for _, j in made])
    _, rows, said, _ = make("s", "--exclude", "bench.txt")
    assert [row["prompt_id"] for row in rows["pairs.jsonl"]] == ["q2"] and "2 prompts stand in" in said


def test_one_phrase_that_drops_most_is_told(make, tmp_path):
    rule = "Think step by step and give the final answer at the end of your response in a box."
    (tmp_path / "bench.txt").write_text(f"What is a prime? {rule}\n")
    asked = [ask(f"q{i}", f"What is {i}? {rule}") for i in range(6)] + [ask("q9", "Why?")]
    made = [answered(p.prompt_id, n, n == 0) for p in asked for n in range(2)]
    write_folder(tmp_path / "s", asked, [s for s, _ in made], [j for _, j in made])
    assert "6 of the 6 dropped prompts share one phrase, 'think step by step" in make("s", "--exclude", "bench.txt")[2]


# --- what to fear ---


def test_what_gives_the_sides_away_is_told(make, tmp_path):
    """Right answers say `checked` and are longer: words and lengths find them."""
    made = []
    for i in range(160):
        made += [answered(f"q{i}", 0, True, words=f"I have checked {i} twice, and then again once more.")]
        made += [answered(f"q{i}", 1, False, words=f"A guess: {i}.")]
    folder_of(tmp_path, *made, prompts=[f"q{i}" for i in range(160)])
    _, _, said, _ = make("s")
    assert "thinking: preferring the shorter scores 0.00 in characters and 0.00 in tokens" in said
    found = re.search(r"thinking: words alone find the chosen side in (\S+) ± (\S+) of (\d+) pairs", said)
    assert float(found[1]) > 0.95 and 50 < int(found[3]) < 110 and "'checked'" in said


def test_accept_rates_fall_into_their_bins():
    assert histogram([0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.76, 0.999, 1, 1]) == [1, 2, 2, 1, 2, 2]


def test_nothing_is_feared_of_words_that_say_nothing(make, tmp_path):
    synthetic(tmp_path / "s", 300)
    assert "words alone" not in make("s")[2]
