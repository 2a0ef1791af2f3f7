"""What a check says about a node."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: ok, warning (the run may start) or PROBLEM (it may not).
        found: what was found, with numbers.
        remedy: what to do, where something is to be done.
    """

    check: str
    level: str
    found: str
    remedy: str = ""

    @property
    def text(self) -> str:
        return f"{self.check}: {self.found}" + (f". {self.remedy}" if self.remedy else "")


@dataclass
class NodeReport:
    """What one node found out about itself.

    Attributes:
        rank, name: the node.
        facts: what must be compared with other nodes.
        findings: what can be judged by itself.
    """

    rank: int
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"node {self.rank} ({self.name})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> NodeReport:
        return NodeReport(
            rank=int(data["rank"]),
            name=str(data["name"]),
            facts=dict(data["facts"]),
            findings=[Finding(**finding) for finding in data["findings"]],
        )
