"""A trainer that weighs itself: live tensors of a rank by kind, and what autograd keeps during a step."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import HybridDeviceOptimizer

from megatron_bvpo.gradients import shards
from tests.distributed.hooks import around


def record_memory(base, folder):
    """Step 1 is one pass, weighed while it runs; step 2 is a probe, whose kept shards are counted."""

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.probes, "plan", self._plan)
            around(self.probes, "run", self._probe)
            around(self.step, "one_pass", self._one_pass)

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def _plan(self, stock, batches, iteration):
            probe = stock(batches, iteration)
            return None if iteration == 0 else probe

        def _one_pass(self, stock, chunks, iteration):
            batches = chunks[0]
            self.weighed = {
                "kept_shards": 0,
                "tokens": [b["input_ids"].numel() for b in batches],
                "lengths": _lengths(batches[0]),
            }
            saved = SavedTensors(_storages(self._stored()))
            with saved:
                done = stock(chunks, iteration)
            self.weighed |= {"activations": saved.peak, "left": saved.live, "kept_shards": 0}
            return done

        def _stored(self):
            """Everything that a rank holds between steps, so that it is not counted as an activation."""
            for model in (*self.unwrapped_models, *self.ref_models):
                yield from model.parameters()
            for buffer in self._buffers():
                yield buffer.grad_data

        def _buffers(self):
            return [b for m in self.wrapped_models for b in (*m.buffers, *m.expert_parallel_buffers)]

        def _probe(self, stock, *args):
            taken = []
            take = shards.take

            def counting_take(slices):
                found = take(slices)
                taken.append(_bytes(found))
                return found

            shards.take = counting_take
            try:
                return stock(*args)
            finally:
                shards.take = take
                self.weighed["kept_shards"] = sum(taken)

        def finalize_training(self):
            super().finalize_training()
            self._weigh_parameters()
            self._weigh_optimizer()
            torch.save(self.weighed, folder / f"weighed{dist.get_rank()}.pt")

        def _weigh_parameters(self):
            params = [(n, p) for m in self.unwrapped_models for n, p in m.named_parameters()]
            self.weighed |= {
                "parameters": _bytes(p for _, p in params),
                "adapters": sum(p.numel() * p.element_size() for n, p in params if ".lora_" in n),
                "reference_model": _bytes(p for m in self.ref_models for p in m.parameters()),
                "gradients": _bytes(b.grad_data for b in self._buffers()),
                "rank": dist.get_rank(),
                "stage": parallel_state.get_pipeline_model_parallel_rank(),
                "dp_rank": dist.get_group_rank(self._buffers()[0].data_parallel_group, dist.get_rank()),
                "edp_rank": self._expert_rank(),
            }

        def _expert_rank(self) -> int:
            buffers = [b for m in self.wrapped_models for b in m.expert_parallel_buffers]
            return dist.get_group_rank(buffers[0].data_parallel_group, dist.get_rank()) if buffers else 0

        def _weigh_optimizer(self):
            """Adam's states, and float32 parameters where they are no views of the model's own; on a GPU, they would
            be in its memory, and those of `--optimizer_cpu_offload`, with copies of the gradients, in the node's."""
            own = _storages(p for m in self.unwrapped_models for p in m.parameters())
            device, host = [], []
            for chained in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                optimizer = chained.optimizer
                device += [p for group in optimizer.param_groups for p in group["params"]]
                states = [t for state in optimizer.state.values() for t in state.values()]
                if isinstance(optimizer, HybridDeviceOptimizer):
                    host += [*states, *optimizer.cpu_copys_map_gpu_param, *optimizer.cpu_copy_map_grad.values()]
                else:
                    device += states
            for name, tensors in (("optimizer", device), ("host_optimizer", host)):
                tensors = [t for t in tensors if torch.is_tensor(t) and t.dim()]
                self.weighed[name] = _bytes(t for t in tensors if t.untyped_storage().data_ptr() not in own)

    return Recorder


def _lengths(batch) -> list[int]:
    """Lengths of the sequences in a packed micro-batch."""
    starts = (batch["position_ids"].reshape(-1) == 0).nonzero().squeeze(1).tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], batch["position_ids"].numel()], strict=True)]


def _storages(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _bytes(tensors) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of all storages that autograd holds, and the largest number that there were at a time.

    A tensor that several operations save counts once, as long as one of them holds it. `stored` are addresses of
    storages that live anyway.
    """

    def __init__(self, stored: set[int]):
        super().__init__(self._pack, self._unpack)
        self.stored = stored
        self.holders: Counter[int] = Counter()
        self.live = self.peak = 0

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.stored:
            return tensor
        held = _Held(tensor.detach())  # detached: an operation's own output would hold its own graph
        if not self.holders[address]:
            self.live += size
            self.peak = max(self.peak, self.live)
        self.holders[address] += 1
        weakref.finalize(held, self._release, address, size)
        return held

    def _release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            self.live -= size

    @staticmethod
    def _unpack(held):
        return held.tensor if isinstance(held, _Held) else held


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor
