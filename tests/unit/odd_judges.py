"""Functions as users write judges, good ones and bad ones; named by the tests as `tests.unit.odd_judges:…`."""

import mmap
import os
import sys
import time

NO_FUNCTION = 3


def contains(text, answer):
    return answer in text


def misbehaving(text, answer):
    """What the text says, it does."""
    print("printed by a judge")
    if text == "hang":
        time.sleep(1000)
    if text == "hold":
        return 7 ** (7**30) > 0  # one operation of the interpreter, hours long
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise RuntimeError("two\nlines")
    if text == "leave":
        sys.exit(1)
    if text == "fill":
        return len(bytearray(10**15)) > 0
    if text == "pid":
        return {"right": True, "parsed": str(os.getpid())}
    return text == answer


def two_gib(payload):
    return len(mmap.mmap(-1, 2**31))  # asked for and never touched


def returning(text):
    return eval(text)


def score_answer(answer, entry):
    """reasoning-gym's convention."""
    return 1.0 if answer == entry["answer"] and entry["question"] == "6 * 7?" and entry["level"] == 2 else 0.01


def everything(**given):
    return {"score": len(given), "right": True, "parsed": ",".join(sorted(given))}


def by_position(text, /):
    return True


def unknown_argument(text, gold):
    return True


def without_text(answer):
    return True


class Scorer:
    @staticmethod
    def score(text):
        return 0.5


def compute(text):
    """`text` seconds of processor time."""
    until = time.process_time() + float(text)
    while time.process_time() < until:
        pass
    return True


def hand_over(text):
    """As `compute`, in a second thread, while the first waits for it."""
    import threading

    thread = threading.Thread(target=compute, args=(text,))
    thread.start()
    thread.join()
    return True


def slow(text):
    time.sleep(0.01)
    return True
