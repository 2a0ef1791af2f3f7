"""Requests to the server of a judge: many in flight, repeated where that helps, failures told apart.

What fails for one item is in its judgement (`AskFailed`). What will fail for all of them (nobody listens, no such
route, no such model, a key is asked for) ends the judging as a user's error; what was judged before is kept.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging.judge_items import Item
from megatron_bvpo.sampling.samples import Judgement

API_KEY = "BVPO_JUDGE_API_KEY"
ATTEMPTS = 6
LONGEST_PAUSE_S = 30.0
FOR_ALL = {401: "a key is asked for or refused", 403: "a key is asked for or refused", 404: "no such route or model"}


class AskFailed(Exception):
    """A request failed for good, for a reason that is this item's own."""


class JudgeServer:
    """One server, and how it is asked.

    Args:
        base: its address, without a route.
        concurrency: requests in flight.
        time_limit: seconds for one request.
        first_pause: seconds before the first repetition; each later one waits twice as long.

    Attributes:
        answered: whether it has ever answered a request as wished.
    """

    def __init__(self, base: str, concurrency: int, time_limit: float, first_pause: float = 1.0) -> None:
        self.base, self.concurrency, self.time_limit, self.first_pause = base, concurrency, time_limit, first_pause
        self.answered = False
        self._session: Any = None

    def models(self) -> list[dict[str, Any]]:
        """What the server says of its models ([] where it has no such route).

        Raises:
            UserError: nobody answers at the address.
        """

        async def ask() -> list[dict[str, Any]]:
            async with self._connected() as session:
                async with session.get(f"{self.base}/v1/models") as reply:
                    if reply.status in (401, 403):
                        raise self._for_all(reply.status, "/v1/models", "")
                    found = await reply.json(content_type=None) if reply.status == 200 else {}
            return found.get("data") or [] if isinstance(found, dict) else []

        import aiohttp

        try:
            return asyncio.run(ask())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._gone(error) from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            return []

    def run(self, items: Iterable[Item], ask: Callable[[Item], Awaitable[Judgement]]) -> Iterator[Judgement]:
        """Ask for each item, `concurrency` at a time; judgements come in the order of their arrival."""
        loop = asyncio.new_event_loop()
        pending: set[asyncio.Task] = set()
        connection = self._connected()
        try:
            loop.run_until_complete(connection.__aenter__())
            items, more = iter(items), True
            while True:
                while more and len(pending) < self.concurrency:
                    item = next(items, None)
                    more = item is not None
                    if more:
                        pending.add(loop.create_task(ask(item)))
                if not pending:
                    return
                done, pending = loop.run_until_complete(
                    asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED, timeout=None)
                )
                for task in done:
                    yield task.result()
        finally:
            for task in pending:
                task.cancel()
            if pending:
                loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            loop.run_until_complete(connection.__aexit__(None, None, None))
            loop.close()

    async def post(self, route: str, body: dict[str, Any]) -> Any:
        """The reply to a request, as JSON.

        Raises:
            AskFailed: this request cannot be answered.
            UserError: no request can.
        """
        import aiohttp

        pause, last = self.first_pause, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
                pause *= 2
            try:
                async with self._session.post(self.base + route, json=body) as reply:
                    if reply.status == 200:
                        value = await reply.json(content_type=None)
                        self.answered = True
                        return value
                    said = _complaint(await reply.text())
            except aiohttp.ServerTimeoutError as error:  # while connecting: no other has a limit of its own
                if attempt == ATTEMPTS - 1:
                    raise self._gone(error) from error
                continue
            except TimeoutError:
                raise AskFailed(f"no answer within {self.time_limit:g} s") from None
            except aiohttp.ClientConnectorError as error:
                if attempt == ATTEMPTS - 1:
                    raise self._gone(error) from error
                continue
            except (aiohttp.ClientError, ValueError) as error:
                last = f"{type(error).__name__}: {error}"
                continue
            last = f"status {reply.status}: {said}"
            if reply.status in FOR_ALL:
                raise self._for_all(reply.status, route, said)
            if reply.status != 429 and reply.status < 500:
                if not self.answered:
                    # The first request is refused: so will be all that look like it.
                    raise UserError(f"{self.base}{route} refuses the request ({last})", field="--with")
                break
        raise AskFailed(last)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        import aiohttp

        key = os.environ.get(API_KEY)
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.time_limit, sock_connect=min(10.0, self.time_limit)),
        ) as self._session:
            yield self._session

    def _gone(self, error: Exception) -> UserError:
        return UserError(
            f"nobody answers at {self.base} ({type(error).__name__}: {error})".rstrip(),
            field="--with",
            remedy="start the server, or correct its address; what was judged is kept",
        )

    def _for_all(self, status: int, route: str, said: str) -> UserError:
        remedy = f"set {API_KEY}" if status != 404 else "see what the server offers at /v1/models and /openapi.json"
        return UserError(
            f"{self.base}{route} answers {status}, {FOR_ALL[status]}{f' ({said})' if said else ''}",
            field="--with",
            remedy=remedy,
        )


def split_address(url: str, routes: tuple[str, ...]) -> tuple[str, str]:
    """A server's address without a route, and the route that it names ('' for none)."""
    url = url.rstrip("/")
    for route in sorted(routes, key=len, reverse=True):
        if url.endswith(route):
            return url[: -len(route)], route
    return url.removesuffix("/v1"), ""


def served_model(server: JudgeServer, model: str) -> tuple[str, str]:
    """The model's name and the engine that serves it ('' where the server does not say).

    Raises:
        UserError: nobody answers, or the server names models and this is none of them.
    """
    models = [entry for entry in server.models() if isinstance(entry, dict) and entry.get("id")]
    names = [entry["id"] for entry in models]
    if model and names and model not in names:
        raise UserError(
            f"{server.base} does not serve {model!r}", field="--model", remedy=f"it serves {', '.join(names)}"
        )
    chosen = model or (names[0] if names else "")
    engine = next((str(entry.get("owned_by", "")) for entry in models if entry["id"] == chosen), "")
    return chosen, engine.lower()


def _complaint(text: str) -> str:
    """What an error reply says, in one line."""
    import json

    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return " ".join(str(found).split())[:300]
