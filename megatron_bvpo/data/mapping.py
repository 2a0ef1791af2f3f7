"""One pass over all rows of a data set for all ranks: rank 0 makes it, and the others read what it has written."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version

import torch.distributed as dist
from datasets import Dataset, Features, concatenate_datasets
from datasets.fingerprint import Hasher
from swift.utils import is_local_master, is_master

from megatron_bvpo.data.shared_cache import VISIBLE_S, all_visible, cache_folder, is_shared, require_room


def made_by() -> tuple[str, ...]:
    """Versions that have a say in what a pass writes: a pass is read from the disk by later starts, too."""
    found = []
    for name in ("megatron-bvpo", "ms-swift", "transformers", "tokenizers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # a checkout that is not installed
            found.append(name)
    return tuple(found)


def map_rows(dataset: Dataset, function, features: Features, *, num_proc: int | None, load_from_cache_file: bool):
    """A pass over a dataset whose columns have the given types, whatever its first rows look like.

    `function` takes a batch as `{column: list}` and the rows' indices, and returns all columns of the same rows.
    Rank 0 makes the pass and tells the others the names of its files. A node that does not see them, because its disk
    is another one, makes the pass again, by one of its ranks. Collective.

    Raises:
        UserError: the disk has no room for what the pass writes.
    """
    folder = cache_folder()
    cache = None
    if not dataset.cache_files:  # in memory: datasets would give each rank a file of its own
        key = hashlib.sha256(f"{dataset._fingerprint}|{Hasher.hash(function)}".encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder / f"map-{key}.arrow")

    def one_pass(from_cache: bool) -> Dataset:
        return dataset.map(
            function,
            with_indices=True,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            # datasets starts a worker process even for one, and a light pass is done before that is up.
            num_proc=num_proc if (num_proc or 1) > 1 else None,
            load_from_cache_file=from_cache,
            cache_file_name=cache,
        )

    if is_master():
        require_room(folder, dataset.data.nbytes, "the rows with their lengths")
        made = one_pass(load_from_cache_file)
        told = [[file["filename"] for file in made.cache_files], made._fingerprint]
    else:
        made, told = None, [None, None]
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return made
    dist.broadcast_object_list(told, src=0)  # the others wait here
    files, fingerprint = told
    if made is None and files and all_visible(files, VISIBLE_S if is_shared() else 0.0):
        made = concatenate_datasets([Dataset.from_file(file) for file in files])
        made._fingerprint = fingerprint  # what is made of it next has one name on all ranks
    if made is None and is_local_master():
        made = one_pass(True)
    dist.barrier()
    return one_pass(True) if made is None else made
