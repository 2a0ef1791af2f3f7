"""The file of figures: one JSON object a line, written the moment a figure is known.

A line is appended in one write and then synced, so that a kill at any moment leaves whole lines. Should a machine
die in that write, what is torn is the last line: readers leave it out, and the next line starts on a new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class Lines:
    """`file` need not exist; its folder is made with the first line."""

    def __init__(self, file: Path):
        self.file = Path(file)

    def append(self, line: dict) -> None:
        """Raises TypeError for what JSON cannot hold, before anything is written."""
        text = json.dumps(line, allow_nan=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (("\n" if torn else "") + text + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> list[dict]:
        """Every whole line, in order."""
        if not self.file.exists():
            return []
        found = []
        for text in self.file.read_text(errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:  # empty, or torn
                continue
            if isinstance(line, dict):
                found.append(line)
        return found

    def figures(self, machine: str) -> dict[str, dict]:
        """Key → the newest line of it that was measured on this machine (a card's name)."""
        newest = {line["key"]: line for line in self.read() if "key" in line and line.get("on") == machine}
        return {key: line for key, line in newest.items() if not line.get("again")}
