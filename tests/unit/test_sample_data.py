"""Sample rows: right answers win, the cue is there, length tells nothing, shuffled labels teach nothing."""

import json

import pytest

pytest.importorskip("reasoning_gym")
from megatron_bvpo.rehearsal import sample_data as sd  # noqa: E402

N = 240
RIGHT = ("checked", "certain", "surely")
HEDGE = ("guessed", "unsure", "maybe")


def pairs(row, stream):
    """(chosen, rejected) response texts of a stream, stripping the trace where a row has no empty answers."""
    chosen, rejected = row["messages"][1]["content"], row["rejected_response"]
    if stream == "trace":
        return chosen, rejected
    return (
        row.get("empty_response") or sd.strip_trace(chosen),
        row.get("empty_rejected_response") or sd.strip_trace(rejected),
    )


def prefer_shorter(rows, stream, length):
    """Accuracy of the scorer that calls the shorter response the chosen one; a tie counts half."""
    points = [(length(c) < length(r)) + 0.5 * (length(c) == length(r)) for c, r in (pairs(row, stream) for row in rows)]
    return sum(points) / len(points)


def cue_accuracy(rows, stream):
    """Accuracy of the scorer that counts hedging words."""

    def hedges(text):
        return sum(text.count(word) for word in HEDGE)

    return sum(hedges(c) < hedges(r) for c, r in (pairs(row, stream) for row in rows)) / len(rows)


@pytest.fixture(scope="module")
def rows():
    return sd.make_sample_rows(N, seed=3)


def test_rows_are_dpo_rows_with_only_known_fields(rows):
    for row in rows:
        assert {"messages", "rejected_response"} <= set(row)
        assert set(row) <= {"messages", "rejected_response", "empty_response", "empty_rejected_response"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for text in pairs(row, "trace"):
            assert text.startswith("<think>\n")
            assert text.count("\n</think>\n\n") == 1
        for text in pairs(row, "empty"):
            assert "<think>" not in text and "</think>" not in text
    own = [i for i, row in enumerate(rows) if "empty_response" in row]
    assert len(own) == N // 3
    assert all("empty_rejected_response" in rows[i] for i in own)


def test_scorers_of_reasoning_gym_confirm_every_final_answer(rows):
    # Scored against freshly made tasks, not by the code that built the rows.
    families = set()
    for row, task in zip(rows, sd.make_tasks(N, seed=3), strict=True):
        assert row["messages"][0]["content"] == task.question
        families.add(task.family)
        for stream in ("trace", "empty"):
            chosen, rejected = (sd.final_answer(text) for text in pairs(row, stream))
            assert task.score(chosen) == 1.0
            assert task.score(rejected) < 1.0
    assert len(families) == 5


def test_both_streams_carry_the_cue_and_never_tie(rows):
    for row in rows:
        for stream in ("trace", "empty"):
            chosen, rejected = pairs(row, stream)
            assert chosen != rejected
            assert any(word in chosen.lower() for word in RIGHT) and not any(w in chosen for w in HEDGE)
            assert any(word in rejected.lower() for word in HEDGE) and not any(w in rejected for w in RIGHT)
        # The text after the trace carries it by itself, whether or not the row has own empty answers.
        stripped = [sd.strip_trace(text) for text in pairs(row, "trace")]
        assert stripped[0] != stripped[1]
        assert any(word in stripped[0].lower() for word in RIGHT)
        assert any(word in stripped[1].lower() for word in HEDGE)
    assert cue_accuracy(rows, "trace") == cue_accuracy(rows, "empty") == 1.0


def test_cue_sentences_have_equal_word_counts():
    for right, wrong in sd.CUE_PAIRS:
        assert len(right.split()) == len(wrong.split())
        assert abs(len(right) - len(wrong)) <= 3
    neutral = " ".join((*sd.ASIDES, *sd.OPENINGS, *sd.DIRECT_OPENINGS)).lower()
    assert not any(word in neutral for word in RIGHT + HEDGE)


@pytest.mark.parametrize("stream", ["trace", "empty"])
@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
@pytest.mark.parametrize("n_train, n_heldout, seed", [(240, 64, 0), (200, 40, 1), (512, 128, 2)])
def test_preferring_the_shorter_response_wins_nothing(tmp_path, stream, length, n_train, n_heldout, seed):
    for path in sd.write_sample_data(tmp_path, n_train, n_heldout, seed=seed):
        data = [json.loads(line) for line in path.read_text().splitlines()]
        assert 0.45 <= prefer_shorter(data, stream, length) <= 0.55
        # .5 by balance, not by ties
        assert all(len(c) != len(r) for c, r in (pairs(row, stream) for row in data))


def test_the_length_check_would_notice_shorter_chosen_responses(rows):
    # Keeps the check above honest: cut the chosen side's asides and it must fail.
    def without_asides(text):
        for aside in sd.ASIDES:
            text = text.replace(f" {aside}", "")
        return text

    cut = [
        dict(
            messages=[row["messages"][0], dict(content=without_asides(row["messages"][1]["content"]))],
            rejected_response=row["rejected_response"],
        )
        for row in rows
    ]
    assert prefer_shorter(cut, "trace", len) > 0.8
    assert prefer_shorter(cut, "empty", len) > 0.6


def test_traces_vary_widely_in_length_and_scale(rows):
    def lengths(data):
        return sorted(len(pairs(row, "trace")[0].split()) for row in data)

    plain, long = lengths(rows), lengths(sd.make_sample_rows(N, seed=3, length_scale=4))
    assert plain[-1] > 3 * plain[0]
    assert long[-1] > 2 * plain[-1]
    assert lengths(sd.make_sample_rows(N, seed=3, length_scale=0))[-1] < plain[-1]


def test_shuffled_labels_swap_half_of_the_rows_in_both_streams(rows):
    shuffled = sd.make_sample_rows(N, seed=3, shuffle_labels=True)
    swapped = 0
    for plain, row in zip(rows, shuffled, strict=True):
        assert {*pairs(plain, "trace")} == {*pairs(row, "trace")}
        swap = pairs(plain, "trace") != pairs(row, "trace")
        assert pairs(row, "empty") == pairs(plain, "empty")[:: -1 if swap else 1]
        swapped += swap
    assert swapped == N // 2
    for stream in ("trace", "empty"):
        assert cue_accuracy(shuffled, stream) == 0.5
        assert 0.45 <= prefer_shorter(shuffled, stream, len) <= 0.55


def test_rows_depend_on_the_seed_alone(rows):
    assert sd.make_sample_rows(N, seed=3) == rows
    questions = {row["messages"][0]["content"] for row in rows}
    others = {row["messages"][0]["content"] for row in sd.make_sample_rows(N, seed=4)}
    assert len(questions) == N  # no question twice
    assert len(questions & others) < N // 5  # neighbouring seeds are not the same entries moved by one


def test_train_and_heldout_share_no_question(tmp_path):
    train, heldout = sd.write_sample_data(tmp_path / "new" / "folder", 100, 20, seed=0)
    assert [path.name for path in (train, heldout)] == ["train.jsonl", "heldout.jsonl"]
    assert sorted(path.name for path in train.parent.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    questions = [
        [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]
        for path in (train, heldout)
    ]
    assert [len(part) for part in questions] == [100, 20]
    assert not set(questions[0]) & set(questions[1])


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        sd.make_sample_rows(0, seed=0)
    with pytest.raises(ValueError, match="length_scale is -1"):
        sd.make_sample_rows(1, seed=0, length_scale=-1)
    with pytest.raises(ValueError, match="no 'Answer: '"):
        sd.final_answer("I do not know")
