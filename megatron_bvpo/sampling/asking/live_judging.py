"""Judging while sampling: answers are judged in groups in a thread of their own, and the verdicts written as shards."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bvpo.sampling.asking.account import Account
from megatron_bvpo.sampling.asking.journal import known_rows
from megatron_bvpo.sampling.asking.progress import Progress
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.judging.judge_items import Judge, item_of, judged_text
from megatron_bvpo.sampling.judging.judgement_folder import JudgementFolder
from megatron_bvpo.sampling.samples import SAMPLES, Judgement, Sample, SampleKey

_GROUP = 256
# Answers that may wait for the judge; the sampling waits behind them.
_WAITING = 4096


class LiveJudging:
    """Judges the answers of a run.

    Args:
        judge: the judge; it is closed with the run.
        folder: where its verdicts go, open.
        book: the prompts.
        progress: told of the verdicts.
        whole: the whole response is judged, its trace too.
        verdict: called with each judgement, those of earlier runs first.

    Raises:
        UserError: earlier judgements are damaged.
    """

    def __init__(
        self,
        judge: Judge,
        folder: JudgementFolder,
        book: PromptBook,
        progress: Progress,
        whole: bool = False,
        verdict: Callable[[Judgement], None] = lambda judgement: None,
    ) -> None:
        self.judge, self.folder, self.book, self.whole = judge, folder, book, whole
        self.progress, self.verdict = progress, verdict
        self._judged = Account(book)
        # What is judged of a sample: traces, a hundred kilobytes each, do not wait here.
        self._queue: deque[tuple[SampleKey, str | None]] = deque()
        self._wake = asyncio.Event()
        self._busy = False
        self._task: asyncio.Task | None = None
        self._catching_up: asyncio.Task | None = None
        # Later shards first: where two judged one sample, the later word counts.
        for row in known_rows(folder.path, ["prompt_id", "mode", "number", "right"], later_first=True):
            if self._judged.add(row["prompt_id"], row["mode"], row["number"]):
                self._count(Judgement(**row))

    def start(self, samples: Path) -> None:
        """Begins: with what an earlier run sampled and did not judge, and with whatever is offered."""
        self._task = asyncio.ensure_future(self._run())
        self._catching_up = asyncio.ensure_future(self._catch_up(samples))

    def offer(self, sample: Sample) -> None:
        """Takes an answer to judge."""
        self._queue.append((sample.key, judged_text(sample.text, self.whole)))
        self._wake.set()

    async def room(self) -> None:
        """Waits while too many answers wait for the judge.

        Raises:
            Exception: whatever ended the judging.
        """
        while len(self._queue) > _WAITING and not self._task.done():
            await asyncio.sleep(0.05)
        if self._task.done():
            self._task.result()

    async def drain(self) -> None:
        """Waits until everything that was offered is judged, and writes it."""
        await self._catching_up
        while (self._queue or self._busy) and not self._task.done():
            await asyncio.sleep(0.02)
        if self._task.done():
            self._task.result()
        self.folder.flush()

    async def close(self) -> None:
        """Writes the verdicts that there are; what is not judged yet is judged by the next run."""
        for task in (self._catching_up, self._task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        # A judge that is at work ends with its group: its verdicts are not waited for.
        self.folder.flush()
        self.judge.close()

    async def _catch_up(self, folder: Path) -> None:
        columns = ["prompt_id", "mode", "number", "text", "finish_reason", "error"]
        for row in known_rows(folder / SAMPLES, columns):
            index = self.book.place.get(row["prompt_id"])
            if index is not None and not self._judged.has(index, row["mode"], row["number"]):
                self.offer(Sample(**row))
                await self.room()

    async def _run(self) -> None:
        while True:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
            group = []
            while self._queue and len(group) < _GROUP:
                key, text = self._queue.popleft()
                if self._judged.add(*key):
                    group.append(item_of(self.book[self.book.place[key.prompt_id]], key, text))
            self._busy = True
            if group:
                judgements = await _in_thread(self.judge.judge, group)
                self.folder.add(judgements)
                for judgement in judgements:
                    self._count(judgement)
            self._busy = False

    def _count(self, judgement: Judgement) -> None:
        if judgement.right is not None:
            self.progress.verdicts(int(judgement.right), 1)
        self.verdict(judgement)


async def _in_thread(work: Callable[..., Any], *given: Any) -> Any:
    """Runs something that blocks; a thread that is still at it does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(result)

    def run() -> None:
        result = error = None
        try:
            result = work(*given)
        except BaseException as raised:  # handed to who waits
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop has ended

    threading.Thread(target=run, daemon=True, name="judge").start()
    return await done
