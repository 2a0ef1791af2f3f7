"""Sample preference rows for rehearsals: reasoning tasks with checked answers, and a cue quick to learn.

    write_sample_data('/tmp/sample', 512, 64, seed=0)     # train.jsonl and heldout.jsonl

A row is an ms-swift DPO row with the two optional BVPO fields, which every third row has:

    {"messages": [{"role": "user", "content": question},
                  {"role": "assistant", "content": "<think>\\ntrace\\n</think>\\n\\nanswer"}],
     "rejected_response": "<think>\\ntrace\\n</think>\\n\\nwrong answer",
     "empty_response": "answer with thinking off",
     "empty_rejected_response": "wrong answer with thinking off"}

Questions and scorers come from the package reasoning-gym, five families in turn; the worked steps are written
here. Preferred responses end in the right answer, rejected ones in a wrong one (`final_answer`), which the
family's own scorer confirms for every text before a row leaves this file.

The cue. A tiny model cannot learn arithmetic in a minute, so each text also says how sure it is, traces and
answers alike (constant `CUE`; the sentences are `CUE_PAIRS`). The two sentences of a pair have as many words,
so the cue is in the wording, never in the length. Stripped answers (the text after </think>) therefore carry
it too.

No shortcut by length. In half of the rows the preferred trace response is the longer one, and, crossed with
that, in half of the rows the preferred answer is: "prefer the shorter" scores .5 in both streams. The gap is
a neutral aside of several words, so the order of lengths is the same in characters and words, and nearly
always in tokens.

Control. `shuffle_labels=True` swaps preferred and rejected in half of the rows, chosen at random and crossed
with the lengths: nothing is left to learn, and held-out accuracy must stay near .5. (Swapping each row by its
own coin would leave a majority side, and a model that learns it would score above .5 wherever that side
rules.)
"""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CUE = (
    "Right responses say that the result was checked and is certain; "
    "wrong ones say, in as many words, that it was guessed and is unsure."
)
CUE_PAIRS = (  # (right, wrong): word by word alike, so equal in words and in tokens of Qwen's vocabulary
    ("I checked this and I am certain.", "I guessed this and I am unsure."),
    ("It was checked and is surely right.", "It was guessed and is maybe right."),
    ("Now that I checked, it is certain.", "Now that I guessed, it is unsure."),
    ("Having checked it, I surely keep it.", "Having guessed it, I maybe keep it."),
)
ASIDES = (  # neutral: both sides draw from them
    "The question is short.",
    "Let me go slowly here.",
    "One part follows another.",
    "Nothing else is asked.",
    "I write each part down.",
    "The order stays as given.",
    "This is the usual way.",
    "Now for the next part.",
    "I use only what is given.",
    "A short pause before going on.",
    "The parts are small ones.",
    "So far the work is plain.",
    "There is more than one way.",
    "I keep the parts in order.",
)
OPENINGS = ("Let me work it out.", "Step by step.", "First the parts.", "Here is the work.")
DIRECT_OPENINGS = ("In short:", "Directly:", "Without notes:")
ANSWER_MARK = "Answer: "
_GAP = 14  # characters, some three tokens, by which the longer text of a pair is longer, at least


class Task(NamedTuple):
    """A reasoning-gym task: `score(text)` is 1.0 for the right final answer and less for any other."""

    family: str
    question: str
    answer: str
    metadata: dict[str, Any]
    score: Callable[[str], float]


class Work(NamedTuple):
    """Worked steps (sentences) and the final answer they lead to."""

    steps: list[str]
    answer: str


def make_sample_rows(n: int, *, seed: int, shuffle_labels: bool = False, length_scale: float = 1.0) -> list[dict]:
    """`n` rows; the same arguments give the same rows.

    Args:
        shuffle_labels: the control without a signal (head of this file).
        length_scale: stretches the traces. At 1.0 a response with its trace has 34 to 165 tokens of Qwen's
            vocabulary (half of them below 66), an answer 11 to 25.

    Raises:
        ValueError: n below 1, or length_scale below 0.
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    return _make_rows(make_tasks(n, seed=seed), random.Random(f"rows {seed}"), shuffle_labels, length_scale)


def write_sample_data(
    out_dir: str | Path,
    n_train: int,
    n_heldout: int,
    *,
    seed: int,
    shuffle_labels: bool = False,
    length_scale: float = 1.0,
) -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl, which share no question; return the two paths.

    Errors and arguments as in `make_sample_rows`. Files of the same name are replaced.
    """
    tasks = make_tasks(n_train + n_heldout, seed=seed)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, part in (("train", tasks[:n_train]), ("heldout", tasks[n_train:])):
        rows = _make_rows(part, random.Random(f"{name} {seed}"), shuffle_labels, length_scale)
        paths.append(out_dir / f"{name}.jsonl")
        unfinished = paths[-1].with_suffix(f".{os.getpid()}")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, paths[-1])
    return paths[0], paths[1]


def make_tasks(n: int, *, seed: int) -> list[Task]:
    """`n` tasks with different questions, families in turn. Errors as in `make_sample_rows`."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 row")
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sample rows are made with the package reasoning-gym, which is not "
            "installed: run `pip install reasoning-gym`"
        ) from error
    streams = []
    for family, (_, options) in _FAMILIES.items():
        # reasoning-gym seeds entry i with seed + i, so neighbouring seeds would share almost all entries.
        data = reasoning_gym.create_dataset(family, size=20 * n + 100, seed=seed * 1_000_003 + 17, **options)
        streams.append((family, data, iter(data)))
    tasks, seen = [], set()
    while len(tasks) < n:
        family, data, entries = streams[len(tasks) % len(streams)]
        entry = next((entry for entry in entries if entry["question"] not in seen), None)
        if entry is None:
            raise ValueError(f"reasoning-gym has no {n} different questions for {family}; ask for fewer rows")
        seen.add(entry["question"])
        tasks.append(
            Task(
                family,
                entry["question"],
                entry["answer"],
                entry["metadata"],
                lambda text, data=data, entry=entry: data.score_answer(text, entry),
            )
        )
    return tasks


def final_answer(response: str) -> str:
    """The text after the last 'Answer: ' of a response. ValueError when there is none."""
    _, mark, answer = response.rpartition(ANSWER_MARK)
    if not mark:
        raise ValueError(f"the response has no {ANSWER_MARK!r}: {response!r}")
    return answer


def strip_trace(response: str) -> str:
    """The answer behind the think block."""
    return response.rpartition("</think>\n\n")[2]


def phrases() -> list[str]:
    """Texts with the words of all rows, for learning a trimmed vocabulary; needs no reasoning-gym."""
    words = (
        "Find the Greatest Common Divisor of these numbers Least Multiple Give only your final result "
        "State answer to following arithmetic problem Spell this word backward example How many times "
        "does letter appear in text user assistant system"
    )
    return [
        *(sentence for pair in CUE_PAIRS for sentence in pair),
        *ASIDES,
        *OPENINGS,
        *DIRECT_OPENINGS,
        words,
        words.replace(" ", "\n"),
        "\n" + ANSWER_MARK,
        "So From the end: has mod",
    ]


# ---- rows


def _make_rows(tasks: list[Task], rng: random.Random, shuffle_labels: bool, length_scale: float) -> list[dict]:
    if length_scale < 0:
        raise ValueError(f"length_scale is {length_scale}; expected 0 or more")
    # Three yes/no choices per row, all eight combinations equally often (up to a remainder below 8).
    cells = [i % 8 for i in range(len(tasks))]
    rng.shuffle(cells)
    return [
        _make_row(
            task,
            rng,
            length_scale,
            own_empty=i % 3 == 0,
            right_trace_longer=bool(cell & 1),
            right_answer_longer=bool(cell & 2),
            swap=shuffle_labels and bool(cell & 4),
        )
        for i, (task, cell) in enumerate(zip(tasks, cells, strict=True))
    ]


def _make_row(
    task: Task,
    rng: random.Random,
    length_scale: float,
    *,
    right_trace_longer: bool,
    right_answer_longer: bool,
    own_empty: bool,
    swap: bool,
) -> dict:
    work = _FAMILIES[task.family][0](task, rng)
    answers = [_Text([_cue(rng, side)], ANSWER_MARK + work[side].answer) for side in (0, 1)]
    _make_longer(rng, answers, 0 if right_answer_longer else 1)
    # Most traces are short, a few are several times as long.
    n_asides = round(length_scale * 12 * rng.random() ** 5)
    traces = [
        _Text([rng.choice(OPENINGS), *work[side].steps, _cue(rng, side)], "</think>\n\n" + str(answers[side]))
        for side in (0, 1)
    ]
    for trace in traces:
        for _ in range(n_asides):
            trace.add_aside(rng)
    _make_longer(rng, traces, 0 if right_trace_longer else 1)

    responses = [f"<think>\n{trace}" for trace in traces]
    empty = []
    if own_empty:
        empty = [
            _Text([rng.choice(DIRECT_OPENINGS), _cue(rng, side)], ANSWER_MARK + work[side].answer) for side in (0, 1)
        ]
        _make_longer(rng, empty, 0 if right_answer_longer else 1)
        empty = [str(text) for text in empty]
    for right, wrong in filter(None, (responses, empty)):
        assert task.score(final_answer(right)) == 1.0 > task.score(final_answer(wrong)), (task, right, wrong)

    order = -1 if swap else 1
    chosen, rejected = responses[::order]
    row = dict(
        messages=[dict(role="user", content=task.question), dict(role="assistant", content=chosen)],
        rejected_response=rejected,
    )
    if own_empty:
        row["empty_response"], row["empty_rejected_response"] = empty[::order]
    return row


class _Text:
    """Sentences, into which asides can be put anywhere but at the front, and an ending on its own line."""

    def __init__(self, sentences: list[str], ending: str):
        self.sentences, self.ending, self.unused = sentences, ending, []

    def add_aside(self, rng: random.Random) -> None:
        if not self.unused:
            self.unused = rng.sample(ASIDES, len(ASIDES))
        self.sentences.insert(rng.randint(1, len(self.sentences)), self.unused.pop())

    def __str__(self) -> str:
        return " ".join(self.sentences) + "\n" + self.ending


def _make_longer(rng: random.Random, pair: list[_Text], longer: int) -> None:
    while len(str(pair[longer])) < len(str(pair[1 - longer])) + _GAP:
        pair[longer].add_aside(rng)


def _cue(rng: random.Random, side: int) -> str:
    return rng.choice(CUE_PAIRS)[side]


# ---- task families: each gives (right work, wrong work) with as many steps; the wrong one has a slip


def _chain_sum(task: Task, rng: random.Random) -> tuple[Work, Work]:
    terms = re.findall(r"([+-]?) ?(\d+)", task.metadata["expression"])
    slip_at, slip = rng.randrange(1, len(terms)), rng.choice((-2, -1, 1, 2))

    def work(slip: int) -> Work:
        total, steps = int(terms[0][1]), []
        for i, (sign, number) in enumerate(terms[1:], start=1):
            before = total
            total += (-1 if sign == "-" else 1) * int(number) + (slip if i == slip_at else 0)
            steps.append(f"{before} {sign} {number} = {total}.")
        return Work(steps, str(total))

    return work(0), work(slip)


def _gcd(task: Task, rng: random.Random) -> tuple[Work, Work]:
    a, b = sorted(task.metadata["numbers"], reverse=True)
    steps = []
    while b:
        steps.append(f"{a} mod {b} = {a % b}.")
        a, b = b, a % b
    wrong = a + rng.choice((1, 2, 3))
    slipped = [*steps[:-1], f"{wrong} mod {wrong} = 0."]
    return Work([*steps, f"So {a}."], str(a)), Work([*slipped, f"So {wrong}."], str(wrong))


def _lcm(task: Task, rng: random.Random) -> tuple[Work, Work]:
    a, b = task.metadata["numbers"]
    right = task.metadata["result"]
    wrong = right + rng.choice((-1, 1)) * rng.choice((a, b))
    if wrong <= 0:
        wrong = right + a

    def work(multiple: int) -> Work:
        steps = [f"{number} * {multiple // number} = {multiple}." for number in (a, b)]
        return Work(steps, str(multiple))

    return work(right), work(wrong)


def _letter_counting(task: Task, rng: random.Random) -> tuple[Work, Work]:
    words, letter = task.metadata["span"], task.metadata["target_letter"]
    slip_at = rng.randrange(len(words))

    def work(slip: int) -> Work:
        counts = [word.lower().count(letter) + (slip if i == slip_at else 0) for i, word in enumerate(words)]
        steps = [f"{word} has {count}." for word, count in zip(words, counts, strict=True)]
        return Work(steps, str(sum(counts)))

    return work(0), work(rng.choice((1, 2)))


def _spell_backward(task: Task, rng: random.Random) -> tuple[Work, Work]:
    right = list(task.metadata["word"][::-1])
    wrong = list(right)
    at = rng.choice([i for i in range(len(right) - 1) if right[i] != right[i + 1]] or [0])
    wrong[at], wrong[at + 1] = wrong[at + 1], wrong[at]
    if wrong == right:  # a word of one repeated letter
        wrong[0] = "x" if right[0] != "x" else "y"

    def work(letters: list[str]) -> Work:
        return Work([f"From the end: {' '.join(letters)}."], "".join(letters))

    return work(right), work(wrong)


# reasoning-gym's name -> (worked steps, options that keep the questions short)
_FAMILIES: dict[str, tuple[Callable, dict]] = {
    "chain_sum": (_chain_sum, dict(min_terms=2, max_terms=5, min_digits=1, max_digits=2)),
    "gcd": (_gcd, dict(min_value=2, max_value=99)),
    "lcm": (_lcm, dict(min_value=2, max_value=30)),
    "letter_counting": (_letter_counting, dict(min_words=1, max_words=3)),
    "spell_backward": (_spell_backward, dict(min_word_len=3, max_word_len=6)),
}
