"""Where the nodes of a job meet: a small HTTP server on node 0 and one request at a time from the others.

Not torch's TCPStore, because its clients can hang on a host that is cut off, and what is written here must
notice just that; and because a node whose torch is broken must still be able to say so. Bodies are JSON, so
that nothing is run that a stranger sends. Proxies of the environment are not asked.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.errors import UserError

# Bytes; a report with eight GPUs and fifty versions has a few thousand.
LARGEST_BODY = 4_000_000


class MeetingLost(OSError):
    """Node 0 did not answer."""


class MeetingRefused(UserError):
    """Node 0 answered that this is not the meeting we look for."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # all nodes may come in the same moment

    def handle_error(self, request, client_address):
        pass  # a visitor that has not waited for its answer comes again


class Meeting:
    """Node 0's side. `answer(topic, rank, body)` is called for each request, one at a time.

    Args:
        job: the nodes; its `run` must be the visitors' too.
        purpose: `preflight` or `run`: a visitor for the other one is refused.
        answer: gives what goes back to the visitor.
    """

    def __init__(self, job: Job, purpose: str, answer: Callable[[str, int, Any], Any]):
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_POST(self):  # noqa: N802  (the library's name)
                try:
                    length = int(self.headers.get("Content-Length", "0"))
                    if length > LARGEST_BODY:
                        raise ValueError("too long")
                    asked = json.loads(self.rfile.read(length))
                    mismatch = _mismatch(asked, job, purpose)
                    topic, rank, body = str(asked["topic"]), int(asked["rank"]), asked["body"]
                    if not 0 <= rank < job.nodes:
                        mismatch = f"node 0 expects {job.nodes} nodes and was asked by node {rank}"
                except (ValueError, KeyError, TypeError):
                    self.send_error(400)
                    return
                if mismatch:
                    self._reply(409, mismatch)
                    return
                with lock:
                    told = answer(topic, rank, body)
                self._reply(200, told)

            def _reply(self, code: int, told: Any) -> None:
                data = json.dumps(told).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass  # a line for each beat would fill the log

        try:
            self._server = _Server(("", job.meeting_port), Handler)
        except OSError as e:
            raise UserError(
                f"port {job.meeting_port} on {job.label} cannot be opened: {e.strerror}",
                field="MASTER_PORT",
                remedy="another job uses it: choose another MASTER_PORT (it and the next one must be free)",
            ) from None
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _mismatch(asked: dict, job: Job, purpose: str) -> str | None:
    if asked["run"] != job.run:
        return "node 0 belongs to another job that uses this port; choose another MASTER_PORT"
    if asked["purpose"] != purpose:
        return f"node 0 is at its {purpose} and this node at its {asked['purpose']}"
    if asked["nodes"] != job.nodes:
        return f"NNODES is {job.nodes} on node 0 and {asked['nodes']} on this node"
    return None


class Visitor:
    """A node's side of the meeting."""

    def __init__(self, job: Job, purpose: str):
        self.job, self.purpose = job, purpose

    def ask(self, topic: str, body: Any = None, *, timeout: float = 5.0) -> Any:
        """One request; raises MeetingLost without an answer in `timeout` seconds, MeetingRefused for a refusal."""
        job = self.job
        asked = {
            "run": job.run,
            "purpose": self.purpose,
            "nodes": job.nodes,
            "rank": job.rank,
            "topic": topic,
            "body": body,
        }
        connection = http.client.HTTPConnection(job.address, job.meeting_port, timeout=timeout)
        try:
            connection.request("POST", "/", json.dumps(asked))
            response = connection.getresponse()
            told = response.read()
            if response.status == 409:
                raise MeetingRefused(json.loads(told), field="MASTER_PORT")
            if response.status != 200:
                raise MeetingLost(f"answer {response.status}")
            return json.loads(told)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if isinstance(e, (UserError, MeetingLost)):
                raise
            raise MeetingLost(str(e) or type(e).__name__) from None
        finally:
            connection.close()

    def ask_until(self, topic: str, body: Any, deadline: float) -> Any:
        """As `ask`, again and again until `deadline` (time.monotonic); refusals too, as node 0 may come to it."""
        while True:
            try:
                return self.ask(topic, body)
            except (MeetingLost, MeetingRefused):
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)
