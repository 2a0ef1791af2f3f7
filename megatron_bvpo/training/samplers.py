"""Which rows each data-parallel rank reads, in training and in evaluation."""

from __future__ import annotations

import math
from typing import Any

from swift.megatron.trainers.batch_sampler import MegatronPretrainingRandomSampler
from torch.utils.data import Dataset

from megatron_bvpo.data.batches import WEIGHT_KEY
from megatron_bvpo.gradients.groups import ParallelGroups


class TrainSampler(MegatronPretrainingRandomSampler):
    """ms-swift's sampler, with the same number of batches on every rank.

    The stock one hands the rows left over at the end of an epoch to the first ranks only. They then start
    the next epoch one batch later and at another offset than the others, and a resumed run cannot follow.
    """

    def __iter__(self):
        per_step = self.micro_batch_times_data_parallel_size
        batches_in_epoch = self.total_samples // per_step
        done = (self.consumed_samples % (batches_in_epoch * per_step)) // per_step
        for i, batch in enumerate(super().__iter__()):
            if done + i >= batches_in_epoch:
                # What super() counted for a batch that is not used:
                self.consumed_samples -= per_step
                return
            yield batch


def train_sampler(args: Any, dataset, consumed_samples: int, groups: ParallelGroups) -> TrainSampler:
    """Batches of dataset indices for this rank, from `consumed_samples` (global) on."""
    return TrainSampler(
        dataset,
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=groups.dp_rank,
        data_parallel_size=groups.dp_size,
        data_sharding=args.data_sharding,
        shuffle=args.train_dataloader_shuffle,
        group_by_length=args.group_by_length,
        seed=args.data_seed,
    )


class FilledDataset(Dataset):
    """A dataset made longer with copies of its rows that have weight 0."""

    def __init__(self, dataset, length: int):
        self.dataset = dataset
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        item = self.dataset[index % len(self.dataset)]
        if index < len(self.dataset):
            return item
        if isinstance(item, list):  # a pack of rows
            return [{**row, WEIGHT_KEY: 0.0} for row in item]
        return {**item, WEIGHT_KEY: 0.0}


class EvalSampler:
    """Each index once, in order; every rank gets the same number of batches."""

    def __init__(self, length: int, micro_batch_size: int, rank: int, ranks: int):
        assert length % (micro_batch_size * ranks) == 0, (length, micro_batch_size, ranks)
        self.length, self.micro_batch_size, self.rank, self.ranks = length, micro_batch_size, rank, ranks

    def __len__(self) -> int:
        return self.length // (self.micro_batch_size * self.ranks)

    def __iter__(self):
        step = self.micro_batch_size * self.ranks
        for start in range(self.rank * self.micro_batch_size, self.length, step):
            yield list(range(start, start + self.micro_batch_size))


def eval_dataloader_parts(args: Any, dataset, groups: ParallelGroups) -> tuple[FilledDataset, EvalSampler]:
    """A dataset filled up to whole global batches, and the sampler that reads it once."""
    length = math.ceil(len(dataset) / args.global_batch_size) * args.global_batch_size
    filled = FilledDataset(dataset, length)
    return filled, EvalSampler(length, args.micro_batch_size, groups.dp_rank, groups.dp_size)
