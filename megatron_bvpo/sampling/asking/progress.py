"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import re
import sys
import time
from collections import Counter
from typing import TextIO

# Seconds between two lines where stderr is no terminal.
_EVERY = 30.0


class Progress:
    """Counts answers, tokens and right answers, and shows them.

    Args:
        total: samples that the run will have in the end.
        done: samples that are there already.
        stream: where to show it.
        every: seconds between lines where that is no terminal.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None, every: float = _EVERY) -> None:
        self.total, self.done, self.stream, self.every = total, done, stream or sys.stderr, every
        self.fresh = self.tokens = self.failed = self.right = self.judged = 0
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            form = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {postfix}"
            self._bar = tqdm(total=total, initial=done, file=self.stream, bar_format=form, mininterval=0.5)

    def add(self, answers: int, tokens: int, failed: int = 0) -> None:
        """Answers that are in the journal now."""
        self.done += answers
        self.fresh += answers
        self.tokens += tokens
        self.failed += failed
        self._show()

    def verdicts(self, right: int, judged: int) -> None:
        """Answers that a judge has looked at."""
        self.right += right
        self.judged += judged

    def grow(self, more: int) -> None:
        """The total is known better: it is `more` larger."""
        self.total += more
        if self._bar is not None:
            self._bar.total = self.total

    def line(self) -> str:
        """Where the run is, in words."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        parts = [f"{self.fresh / seconds:,.1f} answers/s", f"{self.tokens / seconds:,.0f} tokens/s"]
        if self.judged:
            parts.append(f"right {self.right / self.judged:.2f}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.fresh and self.done < self.total:
            parts.append(f"{_duration((self.total - self.done) * seconds / self.fresh)} left")
        return ", ".join(parts)

    def say(self, text: str) -> None:
        """A line for the user that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.n = self.done
            if now - self._shown > 0.5:
                self._shown = now
                self._bar.set_postfix_str(self.line())
        elif now - self._shown >= self.every:
            self._shown = now
            self.say(f"{self.done:,} of {self.total:,} samples, {self.line()}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.line())
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Reasons:
    """Why requests failed, counted; texts that differ in numbers alone ("you asked for 40123 tokens") are one."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._differ: set[str] = set()

    def add(self, reason: str) -> None:
        kind = re.sub(r"\d+", "#", reason)
        self._counts[kind] += 1
        if self._first.setdefault(kind, reason) != reason:
            self._differ.add(kind)

    def lines(self, most: int = 5) -> list[str]:
        """The commonest ones."""
        return [
            f"failed {count:,} times{', such as' if kind in self._differ else ''}: {self._first[kind]}"
            for kind, count in self._counts.most_common(most)
        ]
