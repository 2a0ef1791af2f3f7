"""Whether ranks that should hold copies of a parameter do hold the same bits.

Copies are: dense parameters over data and context parallelism, an expert's over its own data-parallel group, and over
tensor parallelism what that does not cut (norms, routers, LoRA's A of a column-parallel layer and B of a row-parallel
one). They begin alike and take the same steps, since every rank gets the same bits from an all-reduce; nothing brings
them together again once they differ, no metric shows it, and a checkpoint holds one of them.

The comparison is of integers, the sums of the values' bits: exact, and the same in any order of summation. One
all-reduce of 32 bytes a parameter in each of the three kinds of group, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from swift.utils import get_logger
from torch import Tensor, nn

from megatron_bvpo.errors import UserError
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.lora_start import whole_name
from megatron_bvpo.host.parallel_attributes import is_expert, tensor_parallel_shards

logger = get_logger()

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.iinfo(torch.int64).min  # never the largest
# Parameters that are looked at closely, in each kind of group; the others are counted.
LISTED = 20
# So many steps of the type, at the largest value, are rounding and no fault.
ROUNDING_STEPS = 4
_CHUNK = 2**22


@dataclass(frozen=True)
class Difference:
    """A parameter whose copies are not equal.

    Attributes:
        name: in the whole model.
        ranks: the ranks that should hold the same, in sets that do.
        apart: the largest difference of one element.
        largest: the largest value.
        rounding: the difference is of the size of rounding.
    """

    name: str
    ranks: tuple[tuple[int, ...], ...]
    apart: float
    largest: float
    rounding: bool

    def __str__(self) -> str:
        sets = " | ".join(", ".join(map(str, ranks)) for ranks in self.ranks)
        return f"{self.name} by up to {self.apart:.1e} (largest value {self.largest:.1e}) between ranks {sets}"


class Replicas:
    """The parameters of this rank's model chunks, and who else holds them.

    Args:
        models: unwrapped chunks, with their adapters.
        groups: this rank's place.
    """

    def __init__(self, models: Sequence[nn.Module], groups: ParallelGroups):
        self._groups = groups
        self._dense: list[tuple[str, nn.Parameter]] = []
        self._experts: list[tuple[str, nn.Parameter]] = []
        cut: list[bool] = []
        for model in models:
            shards = tensor_parallel_shards(model) if groups.tp_rank else {}
            for path, param in model.named_parameters():
                owner, _, attribute = path.rpartition(".")
                name = f"{whole_name(model, owner, groups.ep_rank)}.{attribute}"
                if is_expert(path):
                    self._experts.append((name, param))
                else:
                    self._dense.append((name, param))
                    # What no checkpoint holds is not known to be a copy.
                    cut.append(bool(groups.tp_rank) and shards.get(param.data_ptr(), True))
        self._cut = torch.tensor(cut, dtype=torch.bool)

    def differences(self) -> list[Difference]:
        """Parameters whose copies differ, the same list on all ranks. Collective over all ranks."""
        groups = self._groups
        dense, experts = checksums(self._dense), checksums(self._experts)
        hidden = dense.new_full((), _NOTHING)
        cut = self._cut.to(dense.device)[:, None]
        found = []
        for params, sums, shown, group in (
            (self._dense, dense, None, groups.dp_cp),
            (self._dense, dense, ~cut, groups.tp),
            (self._experts, experts, None, groups.expert_dp),
        ):
            if dist.get_world_size(group) > 1 and params:
                # The least of s is what the largest of ~s is the complement of: one reduction gives both.
                lanes = torch.stack([sums, ~sums])
                lanes = lanes if shown is None else torch.where(shown, lanes, hidden)
                dist.all_reduce(lanes, op=dist.ReduceOp.MAX, group=group)
                unlike = (lanes[0] != ~lanes[1]).any(dim=-1).nonzero().flatten().tolist()
                found.append((group, [(*params[i], tuple(sums[i].tolist())) for i in unlike]))
        if not groups.any_rank(any(unlike for _, unlike in found), dense.device):
            return []
        mine = [told for group, unlike in found for told in _look_closely(group, unlike)]
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        return _by_parameter(gathered)


def require_equal(replicas: Replicas) -> None:
    """Before the first step, when nothing is lost by an end: raise UserError on all ranks. Collective."""
    found = replicas.differences()
    if found:
        raise UserError(
            f"ranks that must begin with the same weights do not: {_list(found)}",
            remedy="compare the model's and the adapter's files on all nodes (sha256sum); if they are the same, please "
            "report this",
        )


def tell_unequal(replicas: Replicas) -> None:
    """At a save: warn, and let it be written. Collective.

    What is written is the first copy, a whole and consistent checkpoint, which a run can go on from with equal copies;
    without it the steps since the last one would be lost, too. So this is no error, and it is told at each save.
    """
    found = replicas.differences()
    if not found:
        return
    if all(difference.rounding for difference in found):
        logger.info(f"Copies of parameters differ between ranks by rounding: {_list(found)}.")
        return
    logger.warning(
        f"Canary: ranks that hold the same weights have drifted apart: {_list(found)}. The checkpoint holds the first "
        'copy: stop this run, and go on from one that was written before. docs/troubleshooting.md, "Canaries", has '
        "what to do."
    )


def _list(found: list[Difference]) -> str:
    worst = max(found, key=lambda difference: difference.apart)
    return f"{worst}" + (f", and {len(found) - 1} more parameters" if len(found) > 1 else "")


def checksums(params: Sequence[tuple[str, Tensor]]) -> Tensor:
    """[parameters, 2] int64: the sum of each one's bits, and of its rows' weighted by their number (wrapping)."""
    rows = [_bits(param).sum(dim=-1, dtype=torch.int64) for _, param in params]
    if not rows:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.stack([torch.stack([r.sum(), (r * _numbers(r)).sum()]) for r in rows])


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(1, rows.numel() + 1, device=rows.device)


def _bits(param: Tensor) -> Tensor:
    """[rows, elements] of integers; a vector has a row for each element."""
    values = param.detach()
    if type(values) is not Tensor:  # an 8-bit weight in its wrapper
        values = values.float()
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    return bits.reshape(-1, 1) if bits.dim() < 2 else bits.reshape(-1, bits.shape[-1])


def _look_closely(group: dist.ProcessGroup, unlike: list[tuple[str, Tensor, tuple]]) -> list[tuple]:
    """How far apart the copies are. The ranks of a group have the same list, so each reduces at the same places."""
    ranks = tuple(dist.get_process_group_ranks(group))
    told = []
    for i, (name, param, sums) in enumerate(unlike):
        apart = largest = 0.0
        for part in param.detach().float().flatten().split(_CHUNK) if i < LISTED else ():
            lanes = torch.stack([part, -part])
            dist.all_reduce(lanes, op=dist.ReduceOp.MAX, group=group)
            apart = max(apart, (lanes[0] + lanes[1]).max().item())
            largest = max(largest, lanes.max().item())
        rounding = i < LISTED and apart <= ROUNDING_STEPS * torch.finfo(param.dtype).eps * largest
        told.append(((name, ranks), sums, apart, largest, rounding))
    return told


def _by_parameter(gathered: list[list[tuple]]) -> list[Difference]:
    copies: dict[tuple, dict[tuple, list[int]]] = {}
    sizes: dict[tuple, tuple] = {}
    for rank, told in enumerate(gathered):
        for key, sums, *size in told:
            copies.setdefault(key, {}).setdefault(sums, []).append(rank)
            sizes.setdefault(key, tuple(size))
    return [
        Difference(key[0], tuple(tuple(ranks) for ranks in held.values()), *sizes[key]) for key, held in copies.items()
    ]
