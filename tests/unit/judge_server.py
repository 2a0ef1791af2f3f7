"""A server for the tests of judges: a function answers each request, in a thread."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

# From path and body to status and reply; a reply that is text is sent as it is.
Answer = Callable[[str, Any], tuple[int, Any]]


class JudgeServerInAThread:
    """Listens on a port of its own while the context is open.

    Args:
        answer: called for each POST; a negative status drops the connection, a status of 0 never answers.
        models: what /v1/models gives; None for a server without that route.
        together: so many requests are answered at a time, when so many are there.
    """

    def __init__(self, answer: Answer, models: list[dict] | None = None, together: int = 1) -> None:
        self.answer, self.models, self.together = answer, models, together
        self.requests: list[tuple[str, Any, dict]] = []
        self.most_at_once = self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "JudgeServerInAThread":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _serve(self) -> None:
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._stop, self._all_there = asyncio.Event(), asyncio.Barrier(self.together)
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/{path:.*}", self._post)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()
        for task in (left := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _models(self, request: web.Request) -> web.Response:
        if self.models is None:
            return web.Response(status=404)
        return web.json_response({"object": "list", "data": self.models})

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.path, body, dict(request.headers)))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._all_there.wait()
            status, reply = self.answer(request.path, body)
            if status == 0:
                await asyncio.sleep(1000)
            if status < 0:
                request.transport.close()
                return web.Response()
            return (
                web.Response(text=reply, status=status)
                if isinstance(reply, str)
                else web.json_response(reply, status=status)
            )
        finally:
            self._at_once -= 1
