"""Judges of this machine: verdicts on answers in odd forms, and what a judge that misbehaves costs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging import choices, final_answers, judge_pool
from megatron_bvpo.sampling.judging.judge_items import FAILED_REQUEST, NO_FINAL_ANSWER, NO_GOLD
from megatron_bvpo.sampling.judging.judge_pool import JudgePool
from megatron_bvpo.sampling.judging.judges import Item, item, judge_name, make_judge
from megatron_bvpo.sampling.samples import Prompt, Sample, SampleKey
from tests.unit import judged_answers as known

ROOT = Path(__file__).parents[2]
ODD = "tests.unit.odd_judges"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    """Processes of a judge find tests.unit.odd_judges as a user's find a file in their folder."""
    monkeypatch.chdir(ROOT)


def an_item(text, answer="42", number=0, columns=None, question="6 * 7?"):
    return Item(SampleKey("p", "empty", number), [{"role": "user", "content": question}], answer, text, columns or {})


def verdicts(judge, items):
    try:
        said = judge.judge(items)
    finally:
        judge.close()
    assert [one.key for one in said] == [one.key for one in items]
    return said


def of_rows(spec, rows):
    items = [an_item(row[1], row[0], number, row[3] if len(row) > 3 else None, "") for number, row in enumerate(rows)]
    return verdicts(make_judge(spec, workers=2), items)


@pytest.mark.parametrize("spec", ["math", "exact", "choice"])
def test_thirty_answers_with_known_verdicts(spec):
    rows = {"math": known.MATH, "exact": known.EXACT, "choice": known.CHOICE}[spec]
    assert len(rows) >= 30
    said = of_rows(spec, rows)
    assert [row[:3] for row, one in zip(rows, said, strict=True) if one.right is not row[2] or one.error] == []
    assert all(one.score == float(one.right) for one in said)
    # A right answer was read somewhere; the answer that was read is told without what wraps it.
    assert all(one.parsed for one in said if one.right)
    if spec == "choice":
        unread = {row[1] for row, one in zip(rows, said, strict=True) if one.parsed is None}
        assert unread == known.CHOICE_UNREAD


def test_reasoning_gyms_scorers_are_a_judge():
    import reasoning_gym

    items, wanted = [], []
    for task in ("chain_sum", "gcd", "leg_counting"):
        for at, entry in enumerate(reasoning_gym.create_dataset(task, size=10, seed=3)):
            right = at % 2 == 0
            final = entry["answer"] if right else str(int(entry["answer"]) + 1)
            text = [
                f"The answer is {final}.",
                f"\\boxed{{{final}}}",
                f"<answer>{final}</answer>",
                final,
                f"so\n#### {final}",
            ][at % 5]
            columns = {"metadata": json.loads(json.dumps(entry["metadata"], default=str))}
            items.append(an_item(text, entry["answer"], len(items), columns, entry["question"]))
            wanted.append(right)
    assert len(items) == 30
    said = verdicts(make_judge("megatron_bvpo.sampling.judging.gym_judge:score", workers=1), items)
    assert [(one.right, one.error) for one in said] == [(right, None) for right in wanted]
    (other,) = verdicts(make_judge("megatron_bvpo.sampling.judging.gym_judge:score", workers=1), [an_item("42")])
    assert "which task is it?" in other.error


def test_a_score_answer_is_given_the_models_answer_and_the_entry():
    judge = make_judge(f"{ODD}:score_answer", workers=1)
    said = verdicts(
        judge, [an_item("The answer is 42", columns={"level": 2}), an_item("43", number=1, columns={"level": 2})]
    )
    assert [(one.score, one.right) for one in said] == [(1.0, True), (0.01, False)]


@pytest.mark.parametrize(
    "text, score, right, parsed",
    [
        ("True", 1.0, True, "True"),
        ("False", 0.0, False, "False"),
        ("1.0", 1.0, True, "1.0"),
        ("0.99", 0.99, False, "0.99"),
        ("-3", -3.0, False, "-3"),
        ("{'score': .2, 'right': True, 'parsed': 5}", 0.2, True, "5"),
        ("{'right': False, 'parsed': None}", 0.0, False, None),
        ("{'score': 2}", 2.0, True, "{'score': 2}"),
        ("__import__('numpy').bool_(True)", 1.0, True, "__import__('numpy').bool_(True)"),
        ("__import__('numpy').float32(.5)", 0.5, False, "__import__('numpy').float32(.5)"),
    ],
)
def test_what_a_function_returns(returning, text, score, right, parsed):
    (one,) = returning.judge([an_item(text)])
    assert (one.score, one.right, one.parsed, one.error) == (score, right, parsed, None)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("'yes'", "found str"),
        ("None", "found NoneType"),
        ("float('nan')", "nan"),
        ("{'correct': 1}", "has correct"),
        ("{'parsed': 'x'}", "neither score nor right"),
        ("{'right': 'yes'}", "right must be a truth value"),
        ("1/0", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_function_must_not_return_marks_the_sample(returning, text, complaint):
    (one,) = returning.judge([an_item(text)])
    assert (one.score, one.right, one.parsed) == (None, None, None) and complaint in one.error


@pytest.fixture(scope="module")
def returning():
    here = os.getcwd()
    os.chdir(ROOT)
    judge = make_judge(f"{ODD}:returning", workers=1)
    os.chdir(here)
    yield judge
    judge.close()


def test_a_threshold_of_ones_own_and_nested_names():
    (one,) = verdicts(make_judge(f"{ODD}:Scorer.score", workers=1, threshold=0.5), [an_item("x")])
    assert (one.score, one.right) == (0.5, True)
    (one,) = verdicts(make_judge(f"{ODD}:everything", workers=1), [an_item("x")])
    assert one.parsed == "answer,columns,messages,mode,prompt_id,question,text"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_judge_that_never_returns_costs_its_limit_and_no_more(workers):
    limit = 1.5

    def judged(texts):
        began = time.monotonic()
        judge = make_judge(f"{ODD}:misbehaving", workers=workers, time_limit=limit)
        said = verdicts(judge, [an_item(text, number=number) for number, text in enumerate(texts)])
        return said, time.monotonic() - began

    # What this machine takes at this time for as many that return: other work on it makes nothing fail here.
    _, calm = judged(["42"] * 66)
    said, took = judged(["42"] * 5 + ["hang"] + ["42"] * 60 + ["43"])
    assert said[5].error == "no verdict within 1.5 s" and said[5].right is None and said[5].parsed is None
    assert [one.right for one in said[:5] + said[6:]] == [True] * 65 + [False]
    assert limit <= said[5].seconds < limit + 5 + 5 * calm
    # A new process is started for those that wait behind it, of which none has paid: 61 limits are 91 s.
    assert took < limit + 10 + 10 * calm


@pytest.mark.parametrize("computing", ["compute", "hand_over"])
def test_a_busy_machine_is_no_reason_for_no_verdict(computing):
    """Three others on the one processor that it may use: a second of computing takes four, in whichever thread."""
    judge = make_judge(f"{ODD}:{computing}", workers=1, time_limit=1.5)
    (worker,) = judge._pool._workers
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(worker.process.pid, core)
    spin = f"import os; os.sched_setaffinity(0, {core}); print(flush=True)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for other in others:
            other.stdout.readline()  # it spins now, however long its start took
        (one,) = judge.judge([an_item("1")])
        assert one.right and one.seconds > 1.5  # it took longer than its limit by the clock
        (one,) = judge.judge([an_item("1000", number=1)])
        assert one.error == "no verdict within 1.5 s"
    finally:
        for other in others:
            other.kill()
            other.communicate()
        judge.close()


def test_sympy_that_does_not_hear_an_alarm_is_ended():
    judge = make_judge("math", workers=1, time_limit=2)
    rows = [("42", r"\boxed{42}"), ("1", r"\boxed{9^{9^{9^{9}}}}"), ("42", r"\boxed{42}")]
    said = verdicts(judge, [an_item(text, answer, number) for number, (answer, text) in enumerate(rows)])
    assert [one.right for one in said] == [True, None, True] or [one.right for one in said] == [True, False, True]


def test_what_goes_wrong_in_one_item_is_its_own():
    judge = make_judge(f"{ODD}:misbehaving", workers=2, time_limit=5)
    texts = ["42", "die", "raise", "leave", "fill", "43", "42"]
    said = verdicts(judge, [an_item(text, number=number) for number, text in enumerate(texts)])
    assert [one.right for one in said] == [True, None, None, None, None, False, True]
    assert [one.error for one in said[1:5]] == [
        "the judge's process died (exit code 3)",
        "RuntimeError: two lines",
        "the judge called exit(1)",
        "out of memory",
    ]


def test_a_process_has_no_more_memory_than_it_may():
    for gib, error in ((1.0, "OSError: [Errno 12] Cannot allocate memory"), (0, None)):
        pool = JudgePool(f"{ODD}:two_gib", {}, 1, 10, gib)
        try:
            assert [outcome.error for _, outcome in pool.run([("key", None)])] == [error]
        finally:
            pool.close()


def test_a_pool_works_in_a_thread_and_after_a_listener_that_left():
    judge = make_judge(f"{ODD}:misbehaving", workers=2, time_limit=5)
    items = [an_item(str(number), str(number), number) for number in range(50)]
    # Answers of processes that nobody listens to any more must not be taken for those of the next run.
    judge.judge(items)  # both processes are there
    left = [an_item("hang", number=101), an_item("x", number=100)]
    assert next(judge.stream(left)).right is False
    said = []
    thread = threading.Thread(target=lambda: said.extend(judge.stream(items)))
    thread.start()
    thread.join()
    judge.close()
    assert sorted(one.key.number for one in said) == list(range(50)) and all(one.right for one in said)


@pytest.mark.parametrize("how", ["hang", "hold"])
def test_no_process_outlives_a_killed_parent(how):
    """Neither one that sleeps nor one that computes and lets no thread of its own run."""
    code = f"""
from tests.unit.test_judges import an_item, make_judge
judge = make_judge("{ODD}:misbehaving", workers=1, time_limit=0.5)
print(judge.judge([an_item("pid")])[0].parsed, flush=True)
judge._pool.time_limit = 1000  # as if this process stood still at the limit
judge.judge([an_item("{how}")])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        worker = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        until = time.monotonic() + 120
        while _runs(worker) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _runs(worker)
    finally:
        parent.kill()
        parent.stdout.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("spec", ["exact", "choice", "math", f"{ODD}:contains"])
def test_texts_that_no_judge_need_see(spec):
    texts = {0: None, 1: "", 2: " \n"}
    said = verdicts(make_judge(spec, workers=1), [an_item(text, "B", number) for number, text in texts.items()])
    assert [(one.score, one.right, one.parsed, one.error) for one in said] == [
        (None, None, None, FAILED_REQUEST),
        (0.0, False, None, NO_FINAL_ANSWER),
        (0.0, False, None, NO_FINAL_ANSWER),
    ]


@pytest.mark.parametrize("spec", ["exact", "choice", "math"])
def test_a_prompt_without_an_answer_has_no_verdict(spec):
    (one,) = verdicts(make_judge(spec, workers=1), [an_item("B", None)])
    assert (one.right, one.error) == (None, NO_GOLD)


@pytest.mark.parametrize(
    "spec, answer, complaint",
    [("choice", "Paris", "no letter A to J"), ("math", "?!", "cannot be read as mathematics")],
)
def test_a_right_answer_that_cannot_be_read_is_no_verdict(spec, answer, complaint):
    (one,) = verdicts(make_judge(spec, workers=1), [an_item("The answer is (B) 3", answer)])
    assert one.right is None and complaint in one.error


def test_only_the_final_answer_is_judged():
    prompt = Prompt("p", [{"role": "user", "content": "?"}], "42", "f:1", {"options": []})
    text = "<think>\nThe answer is 42.\n</think>\n\nThe answer is 43."
    sample = Sample("p", "thinking", 3, text)
    assert item(prompt, sample) == (sample.key, prompt.messages, "42", "The answer is 43.", prompt.columns)
    assert item(prompt, sample, whole=True).text == text
    assert item(prompt, Sample("p", "thinking", 0, "<think>\n42, so \\boxed{42}")).text == ""
    assert item(prompt, Sample("p", "thinking", 0, None, error="gone")).text is None


@pytest.mark.parametrize(
    "spec, options, complaint",
    [
        ("maths", {}, "no judge 'maths'; there are math, exact, choice"),
        ("", {}, "no judge ''"),
        ("exact:1", {}, "no judge 'exact:1'"),
        ("no_such_package.judge:right", {}, "cannot import no_such_package.judge"),
        (f"{ODD}:absent", {}, "has no absent"),
        (f"{ODD}:NO_FUNCTION", {}, "is no function, but a int"),
        (f"{ODD}:by_position", {}, "by position only"),
        (f"{ODD}:unknown_argument", {}, "needs gold, which is not given"),
        (f"{ODD}:without_text", {}, "does not take text"),
        ("reward:localhost:8000", {}, "expected an address such as reward:http://host:8000"),
        ("llm:", {}, "expected an address such as llm:http://host:8000"),
        ("math", {"workers": -1}, "--workers: must be 0 or more, found -1"),
        ("exact", {"concurrency": 0}, "--concurrency: must be 1 or more"),
    ],
)
def test_a_specification_that_cannot_be_met(spec, options, complaint):
    with pytest.raises(UserError) as raised:
        make_judge(spec, **options)
    assert complaint in str(raised.value)


def test_names():
    assert [judge_name(spec) for spec in ("math", "llm:http://a:1", "reward:https://b/c", "a.b:c", "a:B.c")] == [
        "math",
        "llm",
        "reward",
        "c",
        "c",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000 + "answer is " * 20_000,
        "#### a" + " " * 100_000 + "b" + "\n" * 100_000,
        "the answer is " + ". " * 100_000,
        "the answer is " + "$" * 200_000,
        "**" * 100_000,
        "(" * 100_000 + "\n" + "(b) or " * 30_000,
        "\\text{" * 50_000,
        "<answer>" * 50_000,
        "the answer is option" + " " * 100_000 + "?",
    ],
    ids=lambda text: text[:12],
)
def test_a_text_that_repeats_itself_is_read_in_a_moment(text):
    """Models that loop write such texts; these judges have no time limit."""
    began = time.process_time()
    assert of_rows("exact", [("1", text, False)])[0].right is False
    assert of_rows("choice", [("A", text, False)])[0].right is False
    assert time.process_time() - began < 1


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="aB1 .$*`\\(){}<>#\n答えは:is−", max_size=30),
    st.sampled_from(["\\boxed{%s}", "%s", "answer is %s", "**%s**"]),
)
def test_any_text_can_be_read(text, form):
    text = form % text
    normal = final_answers.normalised(text)
    assert final_answers.normalised(f" {text}\n") == normal
    for found in (final_answers.boxed(text), final_answers.stated(text), final_answers.final(text)):
        assert found is None or isinstance(found, str)
    assert choices.letter(text, ["a", "B"]) in (None, *choices.LETTERS)


def test_two_threads_may_end_a_worker():
    """As a signal and the thread that reads do: a handle that is closed twice may be another's by then."""
    ours, theirs = Pipe()
    close = ours._close
    ours._close = lambda: (time.sleep(0.2), close())
    worker = judge_pool._Worker(subprocess.Popen(["sleep", "100"]), ours)
    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(worker.end) for _ in range(2)]:
            ended.result()
    assert ours.closed and worker.process.poll() is not None
    theirs.close()
