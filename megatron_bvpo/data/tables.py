"""Rows of Parquet and Arrow files, read in batches."""

from collections.abc import Iterator
from typing import Any

from megatron_bvpo.errors import UserError

TABLES = (".parquet", ".arrow")
# Rows that are in memory at a time: a row of long traces takes a hundred kilobytes.
_BATCH = 256


def read_table(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .parquet or .arrow file with their numbers, from 1 on.

    Raises:
        UserError: the file is no such table, or is damaged.
        OSError: it cannot be opened.
    """
    import pyarrow as pa  # half a second, and most data are text

    number = 0
    try:
        with pa.OSFile(path) as source:
            for batch in _batches(pa, source, path):
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield number, row
    except pa.ArrowInvalid as error:
        said = str(error).splitlines()[0]
        remedy = "Write it again, or check that this is the file you meant."
        raise UserError(f"cannot be read as a table: {said}", file=path, remedy=remedy) from None


def _batches(pa, source, path: str) -> Iterator[Any]:
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        yield from ParquetFile(source).iter_batches(batch_size=_BATCH)
        return
    try:
        reader = pa.ipc.open_stream(source)  # as datasets writes them
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader
