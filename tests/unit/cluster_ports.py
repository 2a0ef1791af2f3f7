"""Ports for tests: a port whose next one is free too."""

from __future__ import annotations

import socket


def free_pair() -> int:
    """A port p such that p and p + 1 were free just now."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
