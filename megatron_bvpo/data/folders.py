"""The files of a local folder that is given as a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_bvpo.data.scan import READ_HERE


def files_of_folder(folder: str, subset: str, splits: Sequence[str]) -> list[str] | None:
    """The files that datasets would read for these splits, in its order; None where they are not ours to read.

    Args:
        folder: a path, or the name of a hub data set.
        subset: name of the configuration; `default` for the only one.
        splits: such as `train`.
    """
    if not os.path.isdir(folder):
        return None
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(folder, name=subset)
    except Exception:  # whatever is wrong with the folder, ms-swift's own loading says it
        return None
    config = builder.config
    plain = getattr(config, "field", None) is None and getattr(config, "sep", ",") == ","
    found = getattr(config, "data_files", None) or {}
    if not plain or any(split not in found for split in splits):
        return None
    files = [str(file) for split in splits for file in found[split]]
    return files if files and all(file.endswith(READ_HERE) and os.path.isfile(file) for file in files) else None
