"""One server as the client sees it."""

import asyncio
import ipaddress
import random
import re
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

from megatron_bvpo.errors import UserError


@dataclass(eq=False)
class Server:
    """A server's address and state.

    Attributes:
        base: scheme, host and port, without `/v1`.
        proxy: the proxy to it; None for this machine, for names without a dot and for private addresses.
        up: whether it is asked. `why` it is not, and whether that is a `wrong` setting rather than an outage.
        wants: the path that must answer a request for one token before it is up again.
        asked: requests so far.
        asking: tasks that wait for it; `abandoned`: those of them that were told not to.
        paused_until, busy: when it may be asked again after 429 and the like, and how often in a row it said so.
        heard: when it last sent anything.
        look: a running request for its models.
    """

    base: str
    proxy: str | None = None
    up: bool = True
    why: str = "not asked yet"
    wrong: bool = False
    wants: str | None = None
    asked: int = 0
    asking: set[asyncio.Task] = field(default_factory=set)
    abandoned: set[asyncio.Task] = field(default_factory=set)
    paused_until: float = 0.0
    busy: int = 0
    heard: float = field(default_factory=time.monotonic)
    look: asyncio.Future | None = None

    @classmethod
    def at(cls, address: str) -> "Server":
        """The server at `http://host:port`, with or without `/v1`, or a route of it, behind it.

        Raises:
            UserError: that is no address.
        """
        given = address if "//" in address else f"http://{address}"
        try:
            parts = urllib.parse.urlsplit(given)
            good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise UserError(
                f"no address of a server: {address!r}", field="--server", remedy="write it as http://host:8000"
            )
        if parts.username or parts.password:
            raise UserError(
                "an address must not hold a password",
                field="--server",
                remedy="give the key in OPENAI_API_KEY or --api_key_file",
            )
        base = re.sub(r"/v1(/(chat/completions|completions|models))?$", "", given.rstrip("/"))
        return cls(base, None if _is_near(parts.hostname) else _proxy(parts))

    def pause(self, wait: float | None, why: str) -> None:
        """Leaves it alone for `wait` seconds, or for longer each time where it does not say how long."""
        now = time.monotonic()
        if now >= self.paused_until:  # the many answers of one busy moment count once
            self.busy += 1
            if wait is None:
                wait = random.uniform(0.5, 1) * min(0.5 * 2 ** min(self.busy, 7), 60)
        self.paused_until = max(self.paused_until, now + min(wait or 0, 600))
        self.why = why

    def back(self) -> None:
        """It answers again."""
        self.up, self.wrong, self.wants, self.why = True, False, None, "answers"
        self.paused_until, self.busy, self.heard = 0.0, 0, time.monotonic()


def _is_near(host: str) -> bool:
    """This machine, or a node beside it, which no proxy knows."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost"))
    return address.is_loopback or address.is_private or address.is_link_local or address.is_unspecified


def _proxy(parts: urllib.parse.SplitResult) -> str | None:
    if urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
