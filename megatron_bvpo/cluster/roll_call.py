"""Are all nodes still there, and how did each one end: a beat from every node to node 0, some seconds apart.

A node whose network or power is gone lets all others wait in a collective until the timeout, half an hour later,
and then every rank reports a timeout and none knows why. Here its silence is noticed within a minute and told
with its name. Pure but for the clock that is handed in; supervise.py does the sending.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# A node is one of these.
RUNNING, ENDED = "running", "ended"


@dataclass
class NodeState:
    """What node 0 knows of a node.

    Attributes:
        name: as the node told, or the scheduler.
        heard: when, on node 0's monotonic clock; None: never yet.
        state: RUNNING or ENDED.
        code: exit code of the run there, when it has ended.
        message: the first error in its logs.
    """

    name: str
    heard: float | None = None
    state: str = RUNNING
    code: int | None = None
    message: str = ""
    told: bool = False


@dataclass
class RollCall:
    """Node 0's book.

    Args:
        names: node → what it is called before it tells.
        silence: seconds without a beat after which a node is lost.
        now: monotonic clock.
    """

    names: dict[int, str]
    silence: float
    now: Callable[[], float] = time.monotonic
    nodes: dict[int, NodeState] = field(init=False)
    start: float = field(init=False)

    def __post_init__(self):
        self.start = self.now()
        self.nodes = {rank: NodeState(name) for rank, name in self.names.items()}

    def answer(self, topic: str, rank: int, body: Any) -> dict[str, Any]:
        """A beat of node `rank`: {"name", "state", "code", "message"}; the answer says what the node must know."""
        node = self.nodes[rank]
        node.heard, node.name, node.state = self.now(), f"node {rank} ({body['name']})", body["state"]
        node.code, node.message = body.get("code"), body.get("message") or ""
        trouble = self.trouble()
        told = {"trouble": trouble, "lost": bool(self.lost()), "over": self.over()}
        node.told = node.told or told["over"] or trouble is not None
        return told

    def lost(self) -> list[tuple[int, float]]:
        """Nodes that are silent for too long, and for how many seconds."""
        found = []
        for rank, node in self.nodes.items():
            quiet = self.now() - (self.start if node.heard is None else node.heard)
            if node.state == RUNNING and quiet > self.silence:
                found.append((rank, quiet))
        return found

    def trouble(self) -> str | None:
        """The reason for all nodes to end, as a sentence that names the node."""
        lost = self.lost()
        if lost:
            who = ", ".join(self.nodes[rank].name for rank, _ in lost)
            return f"{who}: not heard of for {max(quiet for _, quiet in lost):.0f} s"
        for node in self.nodes.values():
            if node.state == ENDED and node.code not in (0, None):
                return f"{node.name} ended with exit code {node.code}" + (f": {node.message}" if node.message else "")
        return None

    def over(self) -> bool:
        """All nodes have ended."""
        return all(node.state == ENDED for node in self.nodes.values())

    def all_told(self) -> bool:
        """Every node that is left knows how it ended."""
        lost = {rank for rank, _ in self.lost()}
        return all(node.told or rank in lost for rank, node in self.nodes.items())

    def table(self) -> list[dict[str, Any]]:
        """One row a node, for the summary."""
        lost = dict(self.lost())
        return [
            {
                "node": node.name,
                "state": f"lost, silent for {lost[rank]:.0f} s" if rank in lost else node.state,
                "code": node.code,
                "message": node.message,
            }
            for rank, node in self.nodes.items()
        ]
