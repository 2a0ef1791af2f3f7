"""Requests to one or more OpenAI-compatible servers: even load, waiting, asking again, and servers that come and go.

What a server does, and what becomes of the request:

- It refuses connections, or answers 401, 403, 404: it is down and named; the request goes to another, uncounted.
- It drops the connection, is too slow, answers 500, broken JSON or nothing: the request is made again after a wait,
  elsewhere if there is another server; a try is counted.
- 429, 502, 503, 504: nothing is asked of it for as long as `Retry-After` says, or longer each time; uncounted.
- Another 4xx: `Refused`; every server would say the same.

A request that used up its tries has failed for good only if the servers answer others: another request's success since
its first try, or a request for one token. Where no server answers at all for `patience` seconds, `NoServer` is raised.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.modes import CHAT
from megatron_bvpo.sampling.asking.server_replies import (
    Outcome,
    choice_of,
    outcome_of_status,
    refusal_text,
    retry_after,
)
from megatron_bvpo.sampling.asking.server_state import Server

MODELS = "/v1/models"
# Busy answers that one request takes before it counts as failing while others are served.
_MOST_BUSY = 200


class Reply(NamedTuple):
    """A good answer: which server gave it, its choice, its usage, and the seconds it took."""

    server: str
    choice: dict[str, Any]
    usage: dict[str, Any] | None
    seconds: float


class Refused(Exception):
    """The servers will not answer this request, ever; the text says why."""


class NoServer(UserError):
    """No server has answered for too long."""


class ServerPool:
    """Several servers of one model.

    Args:
        addresses: base addresses, with or without `/v1`.
        model: the model's name at the servers.
        key: the API key, sent as a bearer token.
        timeout: seconds that one answer may take.
        tries: how often one request may fail.
        patience: seconds without any server that answers, after which `NoServer` is raised.
        say: takes a line for the user.
        probe_every: seconds between two looks at a server that is down, at most; a silent one is looked at every
            six times as long.

    Raises:
        UserError: an address is none.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        model: str,
        *,
        key: str | None = None,
        timeout: float = 3600,
        tries: int = 8,
        patience: float = 600,
        say: Callable[[str], None] = print,
        probe_every: float = 10,
    ) -> None:
        self.servers = list({server.base: server for server in map(Server.at, addresses)}.values())
        self.model, self.timeout, self.tries, self.patience = model, timeout, tries, patience
        self.say, self.probe_every = say, probe_every
        self.successes = 0
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._session = None
        self._helpers: set[asyncio.Task] = set()
        self._none_since: float | None = None
        self._waited = 0.0
        self._told_waiting = False

    async def __aenter__(self) -> "ServerPool":
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        limits = aiohttp.ClientTimeout(total=self.timeout, sock_connect=10)
        # Proxies are settled server by server: nodes of a cluster must not be asked through one.
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=limits, headers=self._headers, trust_env=False, read_bufsize=2**20
        )
        await asyncio.gather(*(self._look(server) for server in self.servers))
        if all(server.wrong for server in self.servers):
            await self.__aexit__()
            raise self._all_wrong()
        self._help(self._watch())
        return self

    async def __aexit__(self, *_) -> None:
        for task in list(self._helpers):
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        await self._session.close()

    async def ask(self, path: str, body: dict[str, Any]) -> Reply:
        """One request's answer, however long it takes.

        Raises:
            Refused: it was refused, or failed too often while the servers answered others.
            NoServer: no server answers.
        """
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        first, tries, busy, last = self.successes, 0, 0, None
        while True:
            server = await self._pick(last)
            started = time.monotonic()
            outcome = await self._once(server, path, data)
            if outcome.kind == "good":
                self._succeeded(server)
                return Reply(server.base, outcome.choice, outcome.usage, time.monotonic() - started)
            last = server
            if outcome.kind == "refused":
                raise Refused(outcome.why)
            if outcome.kind == "down":
                self._lose(server, outcome.why, wrong=outcome.wrong, wants=path if outcome.wrong else None)
                continue
            if outcome.kind == "busy":
                busy += 1
                server.pause(outcome.wait, outcome.why)
                if busy >= _MOST_BUSY and self.successes > first:
                    raise Refused(f"{busy} times in a row: {outcome.why}")
                continue
            tries += 1
            if outcome.lost:
                await self._look(server)
            if tries >= self.tries and await self._answers_others(server, path, first):
                raise Refused(f"failed {tries} times, the last time: {outcome.why}")
            await asyncio.sleep(random.uniform(0.5, 1) * min(0.25 * 2 ** min(tries, 7), 20))

    async def _answers_others(self, server: Server, path: str, first: int) -> bool:
        """Whether it is the request that fails, and not the servers; a server that does not answer is down."""
        if self.successes > first:
            return True
        if not server.up:
            return False
        outcome = await self._once(server, path, self._one_token(path))
        if outcome.kind == "good":
            return True
        if outcome.kind != "busy":
            self._lose(server, f"does not answer a request for one token: {outcome.why}", wants=path)
        return False

    def _one_token(self, path: str) -> bytes:
        what = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
        return json.dumps({"model": self.model, "max_tokens": 1, **what}).encode()

    async def _once(self, server: Server, path: str, data: bytes) -> Outcome:
        import aiohttp

        task = asyncio.current_task()
        server.asking.add(task)
        try:
            async with self._session.post(server.base + path, data=data, proxy=server.proxy) as response:
                raw = await response.read()
                server.heard = time.monotonic()
                if response.status != 200:
                    wait = retry_after(response.headers.get("Retry-After"))
                    return outcome_of_status(response.status, refusal_text(raw), wait)
                return choice_of(raw, path)
        except asyncio.CancelledError:
            if task not in server.abandoned or task.uncancel():
                raise
            return Outcome("failed", f"{server.base} has gone silent")
        except aiohttp.ClientConnectorError as error:
            return Outcome("down", f"no connection: {error.os_error.strerror or error.os_error}")
        except aiohttp.ServerTimeoutError:
            return Outcome("down", "no connection in 10 s")
        except TimeoutError:
            return Outcome("failed", f"no answer in {self.timeout:g} s (--timeout)", lost=True)
        except (aiohttp.ClientError, OSError) as error:
            return Outcome("failed", f"the connection was lost ({type(error).__name__})", lost=True)
        finally:
            server.asking.discard(task)
            server.abandoned.discard(task)

    # --- which server ---

    async def _pick(self, last: Server | None) -> Server:
        """The least loaded server that is up; after a failure preferably another than the last."""
        while True:
            now = time.monotonic()
            ready = [server for server in self.servers if server.up and server.paused_until <= now]
            if ready:
                if self._none_since is not None:
                    self._waited += now - self._none_since
                    self._none_since = None
                found = min(ready, key=lambda server: (server is last, len(server.asking), server.asked))
                found.asked += 1
                return found
            self._check_patience(now)
            await asyncio.sleep(0.1)

    def _check_patience(self, now: float) -> None:
        if self._none_since is None:
            self._none_since = now
        waited = self._waited + now - self._none_since
        if not self.successes and all(server.wrong for server in self.servers):
            raise self._all_wrong()
        states = self._states()
        if waited > self.patience:
            raise NoServer(
                f"no server has answered for {waited:.0f} s ({states})",
                field="--server",
                remedy="start the servers and give the same command again: it goes on where it was",
            )
        if waited > 1 and not self._told_waiting:
            self._told_waiting = True
            self.say(f"no server answers ({states}); waiting for up to {self.patience:g} s, nothing is lost")

    def _states(self) -> str:
        return "; ".join(f"{server.base}: {server.why}" for server in self.servers)

    def _all_wrong(self) -> UserError:
        """No waiting mends this."""
        return NoServer(
            self._states(),
            field="--server",
            remedy="mend --model, the address or the key (OPENAI_API_KEY, --api_key_file)",
        )

    def _succeeded(self, server: Server) -> None:
        self.successes += 1
        server.busy = 0
        self._waited, self._none_since = 0.0, None
        if self._told_waiting:
            self._told_waiting = False
            self.say("servers answer again")

    # --- servers that come and go ---

    def _lose(self, server: Server, why: str, wrong: bool = False, wants: str | None = None) -> None:
        """A server is down: named, left alone, and looked at until it is back."""
        server.why, server.wrong = why, wrong
        server.wants = wants or server.wants
        if not server.up:
            return
        server.up = False
        others = sum(other.up for other in self.servers)
        goes_on = f"; its requests go to the other {others}" if others else ""
        self.say(f"server {server.base} is down: {why}{goes_on}")
        self._abandon(server)
        self._help(self._bring_back(server))

    def _abandon(self, server: Server) -> None:
        for task in server.asking - {asyncio.current_task()}:
            server.abandoned.add(task)
            task.cancel()

    async def _bring_back(self, server: Server) -> None:
        wait = min(0.25, self.probe_every)
        while not server.up:
            await asyncio.sleep(wait)
            wait = min(wait * 2, self.probe_every)
            problem = await self._problem(server)
            if problem is None and server.wants:
                outcome = await self._once(server, server.wants, self._one_token(server.wants))
                problem = None if outcome.kind == "good" else (outcome.why, False)
            if problem is None:
                server.back()
                self.say(f"server {server.base} is back")
            else:
                server.why, server.wrong = problem

    async def _look(self, server: Server) -> None:
        """Asks a server for its models; many askers share one look. One that fails to answer is down."""
        if not server.up:
            return
        if server.look is None:
            server.look = asyncio.ensure_future(self._problem(server))
            server.look.add_done_callback(lambda _: setattr(server, "look", None))
        problem = await asyncio.shield(server.look)
        if problem:
            self._lose(server, *problem)

    async def _problem(self, server: Server) -> tuple[str, bool] | None:
        """What keeps a server from being used, and whether waiting will hardly mend it."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=max(3.0, 3 * self.probe_every))
        try:
            async with self._session.get(server.base + MODELS, proxy=server.proxy, timeout=limit) as response:
                raw = await response.read()
        except TimeoutError:
            return "does not answer", False
        except (aiohttp.ClientError, OSError) as error:
            cause = getattr(error, "os_error", None)
            return f"no connection: {getattr(cause, 'strerror', None) or error}", False
        if response.status in (401, 403):
            return f"{response.status}: {refusal_text(raw)}", True
        if response.status >= 500:
            return f"{response.status}: {refusal_text(raw)}", False
        served = _served(raw)
        if response.status == 200 and served and self.model not in served:
            return f"serves {', '.join(served[:5])}, not {self.model!r}", True
        return None

    async def _watch(self) -> None:
        """A machine that vanished sends nothing: who has been silent for long is asked for its models."""
        silent = 6 * self.probe_every
        while True:
            await asyncio.sleep(silent / 3)
            now = time.monotonic()
            for server in self.servers:
                if server.up and server.asking and now - server.heard > silent:
                    self._help(self._look(server))

    def _help(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)


def _served(raw: bytes) -> list[str]:
    try:
        return [str(card["id"]) for card in json.loads(raw)["data"]]
    except (ValueError, TypeError, KeyError):
        return []
