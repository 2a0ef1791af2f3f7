"""Trainer classes for tests: the real trainer, plus a look at its gradients and its data."""

from __future__ import annotations

import contextlib
import itertools
import zlib

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import LoraLayer

from megatron_bvpo.host.replicas import tell_unequal
from tests.distributed.full_gradients import export_gradients, shared_factor, true_norm
from tests.distributed.hooks import around


def nothing(base, folder):
    return base


def fill_lora_b(trainer, scale: float = 0.02) -> None:
    """Random, non-zero A and B, the same in every layout: made by Hugging Face name and loaded by the bridge."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    names = {
        name: tensor.shape
        for name, tensor in trainer.bridge.export_weights(
            list(trainer.unwrapped_models), target_device="cpu", only_master_rank=False, peft_format=True
        )
        if tensor is not None
    }
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    shapes = {name: shape for part in gathered for name, shape in part.items()}
    tensors = {}
    for name in sorted(shapes):
        # One seed for q, k and v and one for gate and up: Megatron fuses them, with one A for all.
        generator = torch.Generator().manual_seed(zlib.crc32(shared_factor(name).encode()))
        tensors[name] = torch.randn(shapes[name], generator=generator) * scale
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, str(Path(folder) / "adapter_model.safetensors"))
        trainer.bridge.load_weights(list(trainer.unwrapped_models), folder, peft_format=True, adapter_name="default")


def exported_adapter(trainer) -> dict[str, torch.Tensor]:
    """LoRA factors by peft name, gathered; on rank 0 alone."""
    exported = trainer.bridge.export_weights(
        list(trainer.unwrapped_models), target_device="cpu", only_master_rank=True, peft_format=True
    )
    return {name: tensor.clone() for name, tensor in exported if tensor is not None}


def written_in_place(wrapped_models) -> list[str]:
    """Parameters whose gradient a layer wrote into main_grad itself."""
    return [n for m in wrapped_models for n, p in m.named_parameters() if getattr(p, "grad_added_to_main_grad", False)]


def record_first_step(
    base,
    folder,
    lora_scale: float = 0.02,
    gradients: bool = True,
    all_steps: bool = False,
    save: bool = False,
    spread_seeds: bool = False,
):
    """Fill the adapters, and keep the full gradients of the first step (or of all).

    Without `save` no checkpoint is written: its writer processes cost more time than the steps. `spread_seeds` gives
    every rank's default generator a seed of its own before the adapters are made, and keeps what they start from.
    """

    class Recorder(base):
        def save_checkpoint(self):
            if save:
                super().save_checkpoint()
            else:
                if hasattr(self, "replicas"):  # ms-swift's own trainer has none
                    tell_unequal(self.replicas)
                self.state.last_model_checkpoint = str(folder)

        def _prepare_peft_model(self, models):
            if spread_seeds:
                torch.manual_seed(1000 + dist.get_rank())
            peft_models = super()._prepare_peft_model(models)
            if self.args.tuner_type == "lora" and lora_scale and not self.args.mcore_adapter:
                fill_lora_b(self, lora_scale)
            return peft_models

        def setup_model_training(self):
            super().setup_model_training()
            if not gradients:
                return
            self.recorded = {"gradients": [], "true_norm": [], "written_in_place": []}
            if spread_seeds:
                self.recorded["start"] = exported_adapter(self)
            step = self.optimizer.step
            trainer = self
            calls = itertools.count()

            def recording_step(*args, **kwargs):
                if next(calls) == 0 or all_steps:
                    found = export_gradients(trainer)
                    if dist.get_rank() == 0:
                        trainer.recorded["gradients"].append(found)
                        trainer.recorded["true_norm"].append(true_norm(found))
                        trainer.recorded["written_in_place"].append(written_in_place(trainer.wrapped_models))
                        torch.save(trainer.recorded, folder / "recorded.pt")
                return step(*args, **kwargs)

            self.optimizer.step = recording_step

    return Recorder


def record_reference(base, folder, save: bool = True):
    """Keep the reference's and the policy's sequence log-probs of every row at every step, in full precision, and the
    dropouts and scalings of the adapted layers."""

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.recorded = {"reference": {}, "policy": {}}
            around(self.passes.losses, "of", self._keep)

        def save_checkpoint(self):
            if save:
                super().save_checkpoint()
            else:
                self.state.last_model_checkpoint = str(folder)

        def _keep(self, stock, stream, responses, layout):
            chosen, rejected = layout.slices(stream)
            for what, values in (("reference", responses.ref_logps_Q), ("policy", responses.logps_Q.detach())):
                pairs = torch.stack([values[chosen], values[rejected]], dim=1).clone()
                for row, pair in zip(layout.rows[stream], pairs, strict=True):
                    self.recorded[what].setdefault((row, stream), []).append(pair)
            return stock(stream, responses, layout)

        def finalize_training(self):
            super().finalize_training()
            layers = [m for model in self.unwrapped_models for m in model.modules() if isinstance(m, LoraLayer)]
            dropouts = {getattr(m.lora_dropout["default"], "p", 0.0) for m in layers}
            self.recorded |= {"dropouts": dropouts, "scalings": {m.scaling["default"] for m in layers}}
            torch.save(self.recorded, folder / "recorded.pt")

    return Recorder


def record_probe(base, folder, mutation: str | None = None, lora_scale: float = 0.02, at_step: int = 0):
    """Keep the gathered full gradients of one probe's passes, and the mixed ones up to it.

    `mutation` breaks the code on purpose.
    """
    recording = record_first_step(base, folder, lora_scale=lora_scale, all_steps=at_step > 0)

    class Recorder(recording):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.of_passes = None
            around(self.probes, "run", self._probe)
            around(self.passes, "run", self._pass)
            if mutation == "same batch's alpha":
                self.mixture.learn = lambda grams, step: None
                around(self.probes, "run", measure_and_learn(self.mixture))

        def _probe(self, stock, chunks, probe, *rest):
            self.of_passes = [] if self.state.iteration == at_step else None
            finalize = self.config.finalize_model_grads_func
            if mutation == "local gradients":
                self.config.finalize_model_grads_func = lambda *args, **kwargs: None
            with mutated(mutation):
                done = stock(chunks, probe, *rest)
            self.config.finalize_model_grads_func = finalize
            if self.of_passes and dist.get_rank() == 0:
                counts = {**probe.counts.members, "both": probe.counts.shared["trace", "empty"]}
                found = {"passes": self.of_passes, "counts": counts, "shared": probe.counts.shared}
                torch.save(found, folder / "passes.pt")
            self.of_passes = None
            return done

        def _pass(self, stock, *args, **more):
            done = stock(*args, **more)
            if self.of_passes is not None:
                self.of_passes.append(export_gradients(self))
            return done

    return Recorder


def measure_and_learn(mixture):
    """The fault that MATH.md §3 warns of: alpha from the very gradients that it mixes."""
    import megatron_bvpo.training.probing as probing

    def run(stock, *args):
        measure = probing.measure_grams

        def measure_first(*args, **kwargs):
            grams = measure(*args, **kwargs)
            mixture.estimator.update(grams.moments())
            return grams

        probing.measure_grams = measure_first
        try:
            return stock(*args)
        finally:
            probing.measure_grams = measure

    return run


@contextlib.contextmanager
def mutated(mutation: str | None):
    """Faults that a person could make in gradients/, for tests that must notice them."""
    from megatron_bvpo.gradients import moments, shards

    saved = (shards._counted_here, moments._sums, shards.gradient_slices, moments.StreamCounts.factor)
    if mutation == "replicas counted on every rank":
        shards._counted_here = lambda param, tp_rank: not getattr(param, "shared", False)
    elif mutation == "cross term dropped":

        def without_cross_terms(g, counts):
            sums = saved[1](g, counts).clone()
            pairs = moments.pairs_of(counts.streams)
            for place, (one, other) in enumerate(pairs, start=len(sums) - len(pairs)):
                if one != other:
                    sums[place] = 0
            return sums

        moments._sums = without_cross_terms
    elif mutation == "a stream turned around":
        moments._sums = lambda g, counts: saved[1](
            {key: -value if key[0] == counts.streams[-1] else value for key, value in g.items()}, counts
        )
    elif mutation == "one factor for all":
        moments.StreamCounts.factor = lambda counts, one, other: saved[3](counts, counts.streams[0], counts.streams[0])
    elif mutation == "experts forgotten":

        def dense_only(models, *, tp_rank):
            return [
                s if _in_dense_buffer(s, models) else shards.Slice(s.grad_E, (), s.copies)
                for s in saved[2](models, tp_rank=tp_rank)
            ]

        shards.gradient_slices = dense_only
    elif mutation == "copies not divided":

        def undivided(models, *, tp_rank):
            return [shards.Slice(s.grad_E, s.counted, 1) for s in saved[2](models, tp_rank=tp_rank)]

        shards.gradient_slices = undivided
    try:
        yield
    finally:
        shards._counted_here, moments._sums, shards.gradient_slices, moments.StreamCounts.factor = saved


def _in_dense_buffer(s, models) -> bool:
    address = s.grad_E.data_ptr()
    ranges = [
        (b.grad_data.data_ptr(), b.grad_data.numel() * b.grad_data.element_size()) for m in models for b in m.buffers
    ]
    return any(start <= address < start + size for start, size in ranges)


def record_cached(base, folder, forget_on_rank: int | None = None, flush_steps: int = 1, save: bool = False):
    """Count this rank's reference forwards; one rank may forget its first micro-batch's pairs."""
    import megatron_bvpo.training.referencing as referencing

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            referencing.FLUSH_STEPS = flush_steps
            self.recorded = {"reference_forwards": 0, "shards_at_save": []}
            super().__init__(*args, **kwargs)
            self.forgets = dist.get_rank() == forget_on_rank
            self.listening = False
            around(self.references, "attach", self._attach)
            around(self.passes, "reference_forward", self._count)
            around(self.passes, "listen", self._listen)

        def _attach(self, stock, chunks):
            if self.forgets:
                for key in chunks[0][0]["bvpo_layout"].all_keys():
                    del self.references.table[key]
                self.forgets = False
            return stock(chunks)

        def save_checkpoint(self):
            if not save:
                self.state.last_model_checkpoint = str(folder)
                return
            super().save_checkpoint()
            self.recorded["shards_at_save"].append(len(list(self.references.shards.folder.glob("*.parquet"))))

        def _prepare_peft_model(self, models):
            peft_models = super()._prepare_peft_model(models)
            if self.args.tuner_type == "lora":
                fill_lora_b(self)
            return peft_models

        def _count(self, stock, *args):
            self.recorded["reference_forwards"] += not self.listening  # not the canaries' own
            return stock(*args)

        def _listen(self, stock, chunks):
            self.listening = True
            found = stock(chunks)
            self.listening = False
            return found

        def train(self, *args):
            super().train(*args)
            if dist.get_rank() == 0:
                torch.save(self.recorded, folder / "recorded.pt")

    return Recorder


def peak(base, folder):
    """The most bytes alive at once in the first step's passes, beside what was there before, and the largest tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class LiveStorages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.alive = WeakIdKeyDictionary()
            self.peak = self.largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.alive[storage] = storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
            self.peak = max(self.peak, sum(self.alive.values()))
            return found

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.passes, "run", self._measure)

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def _measure(self, stock, chunks, *args, **kwargs):
            if kwargs.get("listening"):
                return stock(chunks, *args, **kwargs)
            tokens = sum(batch["input_ids"].numel() for batch in chunks[0])
            with LiveStorages() as live:
                done = stock(chunks, *args, **kwargs)
            torch.save({"peak": live.peak, "largest": live.largest, "tokens": tokens}, folder / "recorded.pt")
            return done

    return Recorder
