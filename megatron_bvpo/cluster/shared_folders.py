"""Does every node see what the other nodes write: one small file a node in each shared folder."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from megatron_bvpo.cluster.findings import OK, PROBLEM, Finding
from megatron_bvpo.errors import or_bound

PREFIX = ".bvpo-preflight-"


class SharedFolders:
    """This node's marks in the shared folders.

    Args:
        folders: made where they are missing.
        rank: this node's number, part of the file's name.
    """

    def __init__(self, folders: list[Path], rank: int):
        self.folders = folders
        self.name = f"{PREFIX}{rank}-{uuid.uuid4().hex[:12]}"
        self.findings: list[Finding] = []

    def write(self) -> dict[str, str]:
        """Leave a mark in each folder; returns the name of the mark for each folder that took it."""
        written = {}
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / self.name, "x") as file:
                    file.write("bvpo preflight; may be removed\n")
                    file.flush()
                    os.fsync(file.fileno())
                written[str(folder)] = self.name
            except OSError as e:
                self.findings.append(
                    Finding(
                        "shared folder",
                        PROBLEM,
                        f"{folder} cannot be written: {e.strerror}",
                        f"Check that it is mounted here{or_bound()}, and that this user may write it",
                    )
                )
        return written

    def look_for(self, written: dict[int, dict[str, str]], labels: dict[int, str], deadline: float) -> list[Finding]:
        """Findings after looking for all nodes' marks until `deadline` (time.monotonic): NFS shows them late."""
        wanted = {(rank, Path(folder, name)) for rank, marks in written.items() for folder, name in marks.items()}
        unseen = set(wanted)
        while True:
            for folder in {path.parent for _, path in unseen}:
                try:
                    os.listdir(folder)  # makes NFS ask the server again
                except OSError:
                    pass
            unseen = {(rank, path) for rank, path in unseen if not path.exists()}
            if not unseen or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        findings = list(self.findings)
        for folder in sorted({path.parent for _, path in unseen}):
            others = ", ".join(labels[rank] for rank, path in sorted(unseen) if path.parent == folder)
            findings.append(
                Finding(
                    "shared folder",
                    PROBLEM,
                    f"{folder} is not shared: what {others} wrote is not seen here",
                    "Name a folder of the cluster's file system (--output_dir, BVPO_SHARED_FOLDERS)",
                )
            )
        if not findings and self.folders:
            findings.append(
                Finding(
                    "shared folder",
                    OK,
                    f"{', '.join(map(str, self.folders))}: all {len(written)} nodes write and see it",
                )
            )
        return findings

    def remove(self) -> None:
        for folder in self.folders:
            try:
                (folder / self.name).unlink(missing_ok=True)
            except OSError:
                pass
