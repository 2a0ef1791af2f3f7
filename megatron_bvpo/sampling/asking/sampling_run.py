"""One run of `bvpo sample`: asks for what is not there yet, journals what arrives, and ends cleanly however it ends."""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.account import Account, Work
from megatron_bvpo.sampling.asking.journal import Journal, compact_left, known_rows
from megatron_bvpo.sampling.asking.live_judging import LiveJudging
from megatron_bvpo.sampling.asking.modes import Asking, Request
from megatron_bvpo.sampling.asking.progress import Progress, Reasons
from megatron_bvpo.sampling.asking.prompt_check import PromptCheck
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.asking.rounds import Rounds
from megatron_bvpo.sampling.asking.servers import Refused, Reply, ServerPool
from megatron_bvpo.sampling.samples import SAMPLES, Sample

# So many refusals before any success mean a wrong setting, and not a wrong prompt.
_REFUSALS_AT_FIRST = 20


class Told(NamedTuple):
    """How a run ended.

    Attributes:
        stopped: the signal that stopped it.
        failures: why requests failed.
        marks: `mode: mark`, counted.
        left: samples that a budget did not spend.
    """

    stopped: signal.Signals | None
    failures: Reasons
    marks: Counter[str]
    left: int = 0


class SamplingRun:
    """Asks for the samples of a folder.

    Args:
        folder: prepared by `run_settings.prepare`, and locked.
        book: its prompts.
        asking: how samples are asked for.
        modes, samples: what is asked for each prompt.
        progress: told of each answer.
        judging: judges answers as they arrive.
        rounds: hands out the samples by a budget; None: `samples` for every prompt.

    Raises:
        UserError: what earlier runs left is damaged.
    """

    def __init__(
        self,
        folder: Path,
        book: PromptBook,
        asking: Asking,
        *,
        modes: Sequence[str],
        samples: int,
        progress: Progress,
        judging: LiveJudging | None = None,
        rounds: Rounds | None = None,
    ) -> None:
        self.folder, self.book, self.asking, self.modes, self.samples = folder, book, asking, modes, samples
        self.progress, self.judging, self.rounds = progress, judging, rounds
        self.failures = Reasons()
        self.marks: Counter[str] = Counter()
        self.account = Account(book)
        self._held: dict[str, list[Sample]] = {}
        self._answered: set[str] = set()  # modes
        self._in_flight: Counter[str] = Counter()  # by mode
        self._prompts = PromptCheck(asking)
        self._logprobs = self._ids = True
        self._stopped: signal.Signals | None = None
        self._failure: UserError | None = None
        self._take_stock()

    def _take_stock(self) -> None:
        compact_left(self.folder)
        columns = ["prompt_id", "mode", "number", "error", "gradient_norm"]
        for row in known_rows(self.folder / SAMPLES, columns):
            if self.account.add(row["prompt_id"], row["mode"], row["number"]):
                if row["error"] is None:
                    self.account.good += 1
                    self._answered.add(row["mode"])
                if self.rounds:
                    self.rounds.arrived(row["prompt_id"], row["mode"], row["gradient_norm"])
        self.progress.done = self.account.count

    # --- what to ask for ---

    def works(self) -> Iterator[Work]:
        """What is missing, prompt by prompt, so that the server finds the samples of one prompt in its cache."""
        base = [mode for mode in self.modes if mode != "short"]
        for index in range(len(self.book)):
            for number in range(self.samples):
                for mode in base:
                    if not self.account.has(index, mode, number):
                        yield Work(index, mode, number)

    def short_works(self) -> Iterator[Work]:
        """Short samples whose thinking sample came in an earlier run."""
        if "short" not in self.modes:
            return
        for row in known_rows(self.folder / SAMPLES, ["prompt_id", "mode", "number", "text"]):
            index = self.book.place.get(row["prompt_id"])
            if row["mode"] == "thinking" and index is not None and not self.account.has(index, "short", row["number"]):
                yield Work(index, "short", row["number"], row["text"])

    # --- asking ---

    async def run(self, pool: ServerPool, concurrency: int) -> Told:
        """Asks for everything that is missing; what arrived before an end of any kind is on disk.

        Raises:
            UserError: no server answers, all requests are refused, or the folder cannot be written.
        """
        self.pool, self.concurrency = pool, concurrency
        self.journal = Journal(self.folder, self._written, self._give_up)
        self._main = asyncio.ensure_future(self._everything())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        try:
            await self._main
        except asyncio.CancelledError:
            if self._stopped is None and self._failure is None:
                raise
        finally:
            # A second signal ends the process as it always would.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            await self.journal.close()
            if self.judging:
                await self.judging.close()
        if self._failure:
            raise self._failure
        left = 0 if self._stopped or self.rounds is None else self.progress.total - self.progress.done
        return Told(self._stopped, self.failures, self.marks, left)

    def _stop(self, number: int) -> None:
        self._stopped = signal.Signals(number)
        self._main.cancel()

    def _give_up(self, error: UserError) -> None:
        self._failure = error
        self._main.cancel()

    async def _everything(self) -> None:
        if self.judging:
            self.judging.start(self.folder)
        if self.rounds is None and self.progress.done >= self.progress.total:
            await self._judge_rest()
            return  # no server is needed
        async with self.pool:
            await self._ask_all(self.short_works())
            if self.rounds is None:
                await self._ask_all(self.works())
            else:
                await self._ask_rounds()
        self._settle_held()
        await self._judge_rest()

    async def _judge_rest(self) -> None:
        self.journal.flush()
        if self.judging:
            await self.judging.drain()

    async def _ask_rounds(self) -> None:
        left = self.rounds.unfinished(self.account)
        while True:
            await self._ask_all(left)
            await self._judge_rest()
            if (plan := self.rounds.next_round()) is None:
                return
            self.progress.say(plan.line)
            left = self.rounds.unfinished(self.account)

    async def _ask_all(self, works: Iterable[Work]) -> None:
        """Workers that take from one iterator: no more requests exist than are in flight."""
        works = iter(works)
        workers = [asyncio.ensure_future(self._worker(works)) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self, works: Iterator[Work]) -> None:
        for work in works:
            sample = await self._sample(work)
            if work.mode == "thinking" and "short" in self.modes:
                if not self.account.has(work.index, "short", work.number):
                    await self._sample(work._replace(mode="short", thinking=sample.text))
            if self.judging:
                await self.judging.room()

    async def _sample(self, work: Work) -> Sample:
        prompt = self.book[work.index]
        failed = Sample(prompt.prompt_id, work.mode, work.number, None, finish_reason="error")
        if work.mode == "short" and work.thinking is None:
            return self._follow(failed._replace(error="its thinking sample failed"))
        try:
            request = self._request(prompt, work)
            failed = failed._replace(seed=request.seed)
            self._in_flight[work.mode] += 1
            try:
                reply = await self._ask(request)
            finally:
                self._in_flight[work.mode] -= 1
            sample = self.asking.sample(request, reply.choice, reply.usage)
            sample = sample._replace(server=reply.server, seconds=round(reply.seconds, 3))
            if line := self._prompts.look(prompt, request, sample):
                self.progress.say(line)
            self._answered.add(work.mode)
            self._record_held(work.mode)
        except Refused as refusal:
            sample = failed._replace(error=str(refusal))
            if work.mode not in self._answered:
                await self._hold(sample)
                return sample
        self.journal.add(sample)
        return sample

    def _request(self, prompt, work: Work) -> Request:
        try:
            return self.asking.request(prompt, work.mode, work.number, work.thinking)
        except UserError as error:  # the template refuses this prompt
            raise Refused(str(error)) from None

    async def _ask(self, request: Request) -> Reply:
        """One request's reply; what a server does not know is left out, and said once."""
        while True:
            asked = request.by_text() if request.tokens and not self._ids else request
            body = asked.body
            if not self._logprobs:
                body = {key: value for key, value in body.items() if key != "logprobs"}
            try:
                return await self.pool.ask(request.path, body)
            except Refused as refusal:
                said = str(refusal).lower()
                if "logprobs" in body and "logprob" in said:
                    if self._logprobs:
                        self.progress.say(f"the server tells no log-probs, so samples have none ({refusal})")
                    self._logprobs = False
                elif isinstance(body.get("prompt"), list) and "prompt" in said and "str" in said:
                    if self._ids:
                        self.progress.say(f"the server takes no token ids; prompts are sent as text ({refusal})")
                    self._ids = False
                else:
                    raise

    async def _hold(self, sample: Sample) -> None:
        """Refusals before a mode's first success are not recorded: a wrong setting would spoil the folder.

        A prompt that is too long is refused at once, and an answer may take an hour: what is in flight is waited for.
        """
        held = self._held.setdefault(sample.mode, [])
        held.append(sample)
        while len(held) >= _REFUSALS_AT_FIRST and sample.mode not in self._answered:
            if not self._in_flight[sample.mode]:
                raise self._all_refused(sample.mode)
            await asyncio.sleep(0.05)

    def _follow(self, short: Sample) -> Sample:
        """A short sample whose thinking sample failed: recorded when that one is."""
        if (held := self._held.get("thinking")) is not None:
            held.append(short)
        else:
            self.journal.add(short)
        return short

    def _record_held(self, mode: str) -> None:
        for sample in self._held.pop(mode, ()):
            self.journal.add(sample)

    def _settle_held(self) -> None:
        """At the end: a few refusals among answers in other modes, or in other runs, are the prompts' own."""
        for mode in list(self._held):
            if not self._answered:
                raise self._all_refused(mode)
            self._record_held(mode)

    def _all_refused(self, mode: str) -> UserError:
        held = [sample for sample in self._held[mode] if sample.mode == mode]
        return UserError(
            f"the first {len(held)} {mode} requests failed, and none has succeeded: {held[-1].error}",
            field="--server",
            remedy="mend the settings or the server; nothing was recorded of these requests",
        )

    def _written(self, samples: list[Sample]) -> None:
        """Answers that the kernel has: only now they count."""
        failed = tokens = fresh = 0
        for sample in samples:
            fresh += self.account.add(*sample.key)
            tokens += sample.tokens or 0
            self.marks.update(f"{sample.mode}: {mark}" for mark in sample.marks)
            if sample.error is not None:
                failed += 1
                self.failures.add(sample.error)
            else:
                self.account.good += 1
            if self.rounds:
                self.rounds.arrived(sample.prompt_id, sample.mode, sample.gradient_norm)
            if self.judging:
                self.judging.offer(sample)
        self.progress.add(fresh, tokens, failed)
