"""The only reader of Megatron's parallel_state. Everything else gets its groups as arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelGroups:
    """Process groups and coordinates of this rank.

    Attributes:
        world: all ranks that train the model, replicas and shards alike.
        dp: ranks that hold other samples (context parallelism not included).
        dp_cp: those and the context-parallel ranks: all that hold the same dense weights.
        expert_dp: ranks that hold the same experts.
        cp: ranks that hold other parts of the same sequences.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        tp_rank, dp_rank, cp_rank, ep_rank: this rank's coordinates.
        tp_size, pp_size, cp_size, dp_size, ep_size, etp_size: sizes; ep and etp are of the experts' own grid.
        last_stage: True on the last pipeline stage (of the last virtual chunk's rank).
    """

    world: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    tp_rank: int
    dp_rank: int
    cp_rank: int
    ep_rank: int
    tp_size: int
    pp_size: int
    cp_size: int
    dp_size: int
    ep_size: int
    etp_size: int
    last_stage: bool

    @staticmethod
    def current() -> ParallelGroups:
        """Groups of the initialised Megatron process; raises RuntimeError before `initialize_megatron`."""
        from megatron.core import parallel_state as ps

        if not ps.is_initialized():
            raise RuntimeError("Megatron's process groups do not exist yet; initialise Megatron first")
        return ParallelGroups(
            world=dist.group.WORLD,
            dp=ps.get_data_parallel_group(),
            dp_cp=ps.get_data_parallel_group(with_context_parallel=True),
            expert_dp=ps.get_expert_data_parallel_group(),
            cp=ps.get_context_parallel_group(),
            tp=ps.get_tensor_model_parallel_group(),
            pp=ps.get_pipeline_model_parallel_group(),
            tp_rank=ps.get_tensor_model_parallel_rank(),
            dp_rank=ps.get_data_parallel_rank(),
            cp_rank=ps.get_context_parallel_rank(),
            ep_rank=ps.get_expert_model_parallel_rank(),
            tp_size=ps.get_tensor_model_parallel_world_size(),
            pp_size=ps.get_pipeline_model_parallel_world_size(),
            cp_size=ps.get_context_parallel_world_size(),
            dp_size=ps.get_data_parallel_world_size(),
            ep_size=ps.get_expert_model_parallel_world_size(),
            etp_size=ps.get_expert_tensor_parallel_world_size(),
            last_stage=ps.is_pipeline_last_stage(ignore_virtual=True),
        )

    def any_rank(self, flag: bool, device: torch.device | int) -> bool:
        """True on every rank if `flag` is true on one: a decision that all ranks must take alike."""
        value = torch.tensor([int(flag)], dtype=torch.int32, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.world)
        return bool(value.item())
