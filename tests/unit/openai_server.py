"""A small OpenAI-compatible server that answers as it is told to: well, late, wrongly, or not at all.

Answers depend on the prompt and the seed alone, so that any two servers, and any two runs, give the same ones. In a
thread (`Served`) for tests that look at one behaviour; in a process (`ServerProcess`) that can be killed and started
again on its port.

Options (a JSON object): see `DEFAULTS`. A fault that is listed in `faults` hits a share of the requests the first time
each is made; `always` names a text in the prompt whose requests meet it every time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

DEFAULTS = {
    "model": "m",
    # Where the trace stands in a chat's answer: raw, opened (a tag in front of everything), closing (no opening tag),
    # reasoning, reasoning_content, r1 (vLLM's parser: all of an answer without a trace is `reasoning`).
    "style": "raw",
    "delay": 0.0,
    "faults": {},  # e.g. {"429": .1, "429_after": .1, "500": .1, "503": .1, "drop": .1, "json": .1, "empty": .1}
    "always": {},  # e.g. {"poison": "500"}; it comes without delay
    "logprobs": True,  # or "refused", or false
    "models": True,  # whether /v1/models is there
    "key": None,
    "thinks_on": False,  # an answer without thinking thinks
    "finish": "stop",
    "say": {},  # a text in the prompt → the answer to it
    "cut": "",  # a text in the prompt whose answers reach the limit
    "quick": False,  # one answer for all, at once
    "ids": True,  # whether completions may be token ids
    "tokenizer": None,  # folder of the chat template by which it counts a chat's tokens
    "around": 0,  # tokens that it puts around a prompt
    "silent": False,  # takes requests and says nothing
}


def text_of(body: dict) -> str:
    """What a request asks, as one text."""
    return json.dumps(body.get("messages", body.get("prompt")))


def answer_of(body: dict, thinking: bool) -> tuple[str, str]:
    """Trace ('' without) and answer of a request."""
    number = int(hashlib.sha256(f"{text_of(body)}{body.get('seed')}".encode()).hexdigest()[:8], 16)
    trace = f"I try {number}.\nThen {number % 7}." if thinking else ""
    return trace, f"The answer is {number % 3}."


class Behaviour:
    """One server's options, log and counters."""

    def __init__(self, options: dict, log: str | None = None) -> None:
        unknown = set(options) - set(DEFAULTS)
        assert not unknown, unknown
        self.options = {**DEFAULTS, **options}
        self.seen: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None

    def app(self):
        from aiohttp import web

        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completion)
        return app

    async def health(self, request):
        from aiohttp import web

        return web.Response()

    async def models(self, request):
        from aiohttp import web

        if self.options["silent"]:
            await asyncio.sleep(3600)
        if self.options["key"] and request.headers.get("Authorization") != f"Bearer {self.options['key']}":
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        if not self.options["models"]:
            return web.Response(status=404)
        return web.json_response({"data": [{"id": self.options["model"]}]})

    async def chat(self, request):
        return await self.answer(request, await request.json(), chat=True)

    async def completion(self, request):
        return await self.answer(request, await request.json(), chat=False)

    async def answer(self, request, body: dict, chat: bool):
        from aiohttp import web

        if self.options["quick"]:
            return web.Response(body=QUICK[chat], content_type="application/json")
        self.requests.append({"path": request.path, **body})
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if self.log is not None and body.get("max_tokens") != 1:
            os.write(self.log, f"{key} {body.get('seed')}\n".encode())
        self.seen[key] += 1
        if self.options["silent"]:
            await asyncio.sleep(3600)
        if self.options["delay"] and not any(text in json.dumps(body) for text in self.options["always"]):
            await asyncio.sleep(self.options["delay"])
        if self.options["model"] != body["model"]:
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        if body.get("logprobs") is not None and self.options["logprobs"] == "refused":
            return web.json_response({"error": {"message": "logprobs are not supported"}}, status=400)
        if isinstance(body.get("prompt"), list) and not self.options["ids"]:
            detail = [{"type": "string_type", "loc": ["body", "prompt"], "msg": "Input should be a valid string"}]
            return web.json_response({"detail": detail}, status=422)
        if (fault := self.fault(body, key)) is not None:
            return await self.fail(request, fault)
        return web.json_response(self.good(body, chat))

    def count(self, messages: list, thinking: bool) -> int:
        from megatron_bvpo.sampling.asking.chat_templates import ChatTemplate

        template = ChatTemplate(self.options["tokenizer"])
        return len(template.encode(template.render(messages, thinking=thinking)))

    def fault(self, body: dict, key: str) -> str | None:
        for text, fault in self.options["always"].items():
            if text in json.dumps(body):
                return fault
        if self.seen[key] > 1:
            return None
        share = int(key[:8], 16) / 2**32
        for fault, part in self.options["faults"].items():
            if share < part:
                return fault
            share -= part
        return None

    async def fail(self, request, fault: str):
        from aiohttp import web

        error = {"error": {"message": f"a fault: {fault}", "type": "test"}}
        if fault == "drop":
            request.transport.close()
            return web.Response()
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "429_after":
            return web.json_response(error, status=429, headers={"Retry-After": "0.2"})
        if fault == "json":
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        if fault == "empty":
            return web.json_response({"choices": []})
        return web.json_response(error, status=int(fault))

    def good(self, body: dict, chat: bool) -> dict:
        switch = (body.get("chat_template_kwargs") or {}).get("enable_thinking", True)
        thinking = (chat and switch) or self.options["thinks_on"]
        trace, answer = answer_of(body, thinking)
        answer = next((said for text, said in self.options["say"].items() if text in text_of(body)), answer)
        style = self.options["style"]
        raw = f"<think>\n{trace}\n</think>\n\n{answer}" if thinking else answer
        tokens = raw.split(" ")
        usage = {"prompt_tokens": len(text_of(body).split(" ")), "completion_tokens": len(tokens)}
        if not chat:
            usage["prompt_tokens"] = len(body["prompt"]) + self.options["around"]
            if isinstance(body["prompt"], str):
                del usage["prompt_tokens"]
        elif self.options["tokenizer"]:
            usage["prompt_tokens"] = self.count(body["messages"], switch)
        cut = self.options["cut"] and self.options["cut"] in text_of(body)
        choice = {"index": 0, "finish_reason": "length" if cut else self.options["finish"]}
        logprob = -0.5
        if style == "opened" and not raw.startswith("<think>"):
            raw = "<think>\n" + raw
        if style == "closing":
            raw = raw.removeprefix("<think>\n")
        if not chat:
            choice["text"] = raw
            if self.options["logprobs"] is True and body.get("logprobs"):
                choice["logprobs"] = {"tokens": tokens, "token_logprobs": [logprob] * len(tokens)}
            return {"choices": [choice], "usage": usage}
        message = {"role": "assistant", "content": raw}
        if style in ("reasoning", "reasoning_content") and thinking:
            message = {"role": "assistant", "content": "\n\n" + answer, style: f"\n{trace}\n"}
        if style == "r1":
            message["reasoning"] = trace if thinking else answer
            message["content"] = answer if thinking else None
        choice["message"] = message
        if self.options["logprobs"] is True and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": token, "logprob": logprob} for token in tokens]}
        return {"choices": [choice], "usage": usage}


_USAGE = {"completion_tokens": 40}
_LOGPROBS = [{"token": "word ", "logprob": -0.25, "bytes": [119], "top_logprobs": []}] * 40
QUICK = {
    True: json.dumps(
        {
            "choices": [
                {
                    "finish_reason": "stop",
                    "message": {"content": "<think>\n" + "word " * 30 + "\n</think>\n\nThe answer is 4."},
                    "logprobs": {"content": _LOGPROBS},
                }
            ],
            "usage": _USAGE,
        }
    ).encode(),
    False: json.dumps(
        {
            "choices": [
                {
                    "finish_reason": "stop",
                    "text": "The answer is 4.",
                    "logprobs": {"tokens": ["word "] * 40, "token_logprobs": [-0.25] * 40},
                }
            ],
            "usage": _USAGE,
        }
    ).encode(),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    """A server in a thread of this process: `with Served(style="r1") as server: server.address`."""

    def __init__(self, port: int = 0, **options) -> None:
        self.behaviour = Behaviour(options)
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    @property
    def requests(self) -> list[dict]:
        """Bodies of the requests so far, each with its path."""
        return self.behaviour.requests

    def __enter__(self) -> Served:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        from aiohttp import web

        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self.behaviour.app(), access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()


class ServerProcess:
    """A server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, log: Path | None = None, **options) -> None:
        self.port, self.log, self.options = free_port(), log, options
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> ServerProcess:
        command = [sys.executable, __file__, str(self.port), str(self.log or ""), json.dumps(self.options)]
        self.process = subprocess.Popen(command)
        while wait:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.02)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, *_) -> None:
        self.kill()


def main(port: str, log: str, options: str, host: str = "127.0.0.1") -> None:
    from aiohttp import web

    app = Behaviour(json.loads(options), log or None).app()
    web.run_app(app, host=host, port=int(port), print=None, access_log=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
