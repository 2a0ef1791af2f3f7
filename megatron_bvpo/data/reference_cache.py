"""Reference log-probs on disk: Parquet shards in one folder per reference, one row per preference pair.

    DIR/<key of the reference>/reference.json                 what the key was made of, for people
    DIR/<key of the reference>/<time>-<writer>.parquet        pair (16 bytes), chosen_logp, rejected_logp

The log-probs of a pair are a function of the reference model and of the pair's token ids and labels. The
folder's name stands for the first, `pair` for the second, so a changed weight, template or row finds nothing.

Any number of runs may write into a folder. A shard appears under its name when it is whole (written aside,
synced, renamed) and never changes, so a killed writer loses what it had not flushed. Where two shards hold a
pair, the older one wins, so that a run which goes on finds the value that it had before. A shard that cannot
be read is skipped with a warning: its pairs are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import numpy as np
from swift.utils import get_logger

logger = get_logger()

Values = tuple[float, float]  # log-probs of the chosen and of the rejected response
PAIR_BYTES = 16
_MAGIC = b"megatron-bvpo reference pair 1"


def pair_key(chosen_ids, chosen_labels, rejected_ids, rejected_labels) -> bytes:
    """16 bytes that stand for a tokenised pair: the token ids, and which of them count (labels, −100 elsewhere)."""
    digest = hashlib.sha256(_MAGIC)
    for part in (chosen_ids, chosen_labels, rejected_ids, rejected_labels):
        tokens = np.asarray(part, dtype=np.int64)
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.tobytes())
    return digest.digest()[:PAIR_BYTES]


class ReferenceShards:
    """The shards of one reference.

    Args:
        folder: DIR/<key>; made if it does not exist.
        description: what the key was made of; written beside the shards.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, description: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._put(folder / "reference.json", json.dumps(description, indent=2, sort_keys=True).encode())

    def read(self) -> dict[bytes, Values]:
        """Every pair of every readable shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found: dict[bytes, Values] = {}
        for path in sorted(self.folder.glob("*.parquet"), reverse=True):  # the oldest last, so that it wins
            try:
                table = pq.read_table(path, memory_map=False, page_checksum_verification=True)
                columns = [table.column(name).to_pylist() for name in ("pair", "chosen_logp", "rejected_logp")]
            except (OSError, pa.ArrowException, KeyError) as e:
                logger.warning(f"{path}: not a whole shard of reference log-probs, skipped ({_first_line(e)}).")
                continue
            for pair, chosen, rejected in zip(*columns, strict=True):
                if isinstance(pair, bytes) and len(pair) == PAIR_BYTES and _finite(chosen, rejected):
                    found[pair] = (chosen, rejected)
        return found

    def write(self, values: dict[bytes, Values]) -> Path:
        """One more shard with `values`; returns its path."""
        from datasets import Dataset, Features, Value

        features = Features(
            {"pair": Value("binary"), "chosen_logp": Value("float64"), "rejected_logp": Value("float64")}
        )
        columns = {
            "pair": list(values),
            "chosen_logp": [chosen for chosen, _ in values.values()],
            "rejected_logp": [rejected for _, rejected in values.values()],
        }
        path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        aside = path.with_suffix(".writing")
        Dataset.from_dict(columns, features).to_parquet(str(aside), write_page_checksum=True)
        _sync_and_rename(aside, path)
        return path

    def _put(self, path: Path, content: bytes) -> None:
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.writing")
        aside.write_bytes(content)
        _sync_and_rename(aside, path)


def _sync_and_rename(aside: Path, path: Path) -> None:
    """Give a whole file its name: after a crash it is there in full or not at all."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def _finite(*values) -> bool:
    return all(isinstance(v, float) and np.isfinite(v) for v in values)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
