"""Bytes on each pipeline stage's ranks: parameters, gradients, optimizer, a probe's copies, activations, and the rest.

Gradients, optimizer and kept shards follow Megatron's buffers (buffers.py) exactly; activations follow the operations
(activations.py). What a CUDA context, NCCL's buffers and a fragmented allocator take cannot be computed; the
constants below are allowances, said to be such in the report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from megatron_bvpo.planning.activations import Batch, chunks_in_flight, micro_batch_activations
from megatron_bvpo.planning.buffers import Buffer, make_buffer
from megatron_bvpo.planning.layout import Cluster, Groups, groups_of, stage_layers
from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.planning.tensors import Split, Tensor, chunk_tensors, lora_modules
from megatron_bvpo.streams import estimators

GIB = 2**30
# Allowances. A CUDA context with its libraries, and NCCL's channels for each communicator.
CUDA_CONTEXT = 0.8 * GIB
NCCL_PER_GROUP = 0.15 * GIB
# Share of what is allocated and freed in a step that the allocator cannot give out again.
FRAGMENTATION = 0.10
# Where the trace stream's length is the file's max_length, an empty trace's pair is assumed to be this long. Shortened
# traces and demonstrations are assumed to be as long as the longest trace.
EMPTY_LENGTH = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens a sequence: the longest trace and the longest empty-trace sequence, prompts included."""

    trace: int
    empty: int

    @classmethod
    def of(cls, run: RunSettings, *, trace: int | None = None, empty: int | None = None) -> Lengths:
        longest = trace or run.max_length or run.packing_length or 1
        return cls(longest, min(empty or EMPTY_LENGTH, longest))


def micro_batch(run: RunSettings, lengths: Lengths) -> Batch:
    """The longest micro-batch: every sequence at its longest, those of all streams packed together."""
    each = [lengths.empty if s == "empty" else lengths.trace for s in run.streams for _ in run.sides(s)]
    if run.packing:
        # ms-swift packs by the sum of a row's sequences; a row that is longer than a pack is a pack of its own.
        tokens = run.micro_batch_size * max(run.packing_length or run.max_length or 0, sum(each))
        return Batch(tokens, tokens * max(each))
    if not run.padding_free:
        each = [max(each)] * len(each)
    return Batch(run.micro_batch_size * sum(each), run.micro_batch_size * sum(n * n for n in each))


def kept_copies(run: RunSettings, experts: bool) -> int:
    """Copies of a rank's gradient shard that a probe step keeps (megatron_bvpo/training/probing.py): of the two passes
    of each stream that estimates the last one's stays in the buffers, unless a pass of the rest follows."""
    measured = estimators(run.streams)
    rest = (experts and run.router_losses) or measured != run.streams
    return 2 * len(measured) - (0 if rest else 1)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage.

    Attributes:
        stage, layers: which one, and how many layers it has.
        parameters: all that are stored, buffers' padding included; adapters among them.
        adapters: LoRA factors alone.
        reference_model: a frozen copy of the model (full tuning).
        gradients: Megatron's buffers.
        optimizer: float32 parameters, where the parameters are 16-bit, and Adam's two moments.
        host_optimizer: what optimizer_cpu_offload has moved to the node's own memory; not in the total.
        kept_shards: what a probe step keeps beside them.
        activations: saved by all micro-batches in flight.
        working: the largest of recomputation with its gradients, log-prob tiles, and the reference pass.
        log_probs, reference_pass: those two alone.
        fixed: CUDA context and NCCL, an allowance.
        fragmentation: an allowance.
    """

    stage: int
    layers: int
    parameters: float
    adapters: float
    reference_model: float
    gradients: float
    optimizer: float
    host_optimizer: float
    kept_shards: float
    activations: float
    working: float
    log_probs: float
    reference_pass: float
    fixed: float
    fragmentation: float

    @property
    def total(self) -> float:
        parts = asdict(self)
        counted_elsewhere = ("stage", "layers", "adapters", "host_optimizer", "log_probs", "reference_pass")
        return sum(v for k, v in parts.items() if k not in counted_elsewhere)


def split_of(run: RunSettings) -> Split:
    return Split(
        tp=run.tensor_model_parallel_size,
        etp=run.expert_tensor_parallel_size,
        ep=run.expert_model_parallel_size,
        pipeline=run.pipeline_model_parallel_size > 1,
        lora_rank=run.lora_rank if run.lora else 0,
        lora_modules=lora_modules(run.target_modules) if run.lora else (),
        reference_adapter=run.lora and bool(run.ref_adapters),
        router_frozen=run.router_frozen,
    )


def stage_chunks(shape: ModelShape, run: RunSettings, stage: int) -> list[tuple[Tensor, ...]]:
    """Parameters of each model chunk of a stage (one, or VPP of them)."""
    pp = run.pipeline_model_parallel_size
    vpp = run.vpp if pp > 1 else 1
    split, of_stages = split_of(run), [n // vpp for n in stage_layers(run, shape.layers)]
    found = []
    for chunk in range(vpp):
        trained = None
        if run.bvpo_new_layers_only:  # the stages take turns with their chunks
            before = chunk * sum(of_stages) + sum(of_stages[:stage])
            trained = tuple(n - before for n in shape.new_layers if before <= n < before + of_stages[stage])
        outer = stage == 0 and chunk == 0, stage == pp - 1 and chunk == vpp - 1
        found.append(chunk_tensors(shape, split, of_stages[stage], *outer, trained))
    return found


def stage_buffers(chunks: list[tuple[Tensor, ...]], run: RunSettings, groups: Groups, stage: int) -> list[Buffer]:
    """Megatron's gradient buffers of a stage: for each chunk the dense parameters', then the experts'."""
    found = []
    for i, chunk in enumerate(chunks):
        bucketed = (
            run.overlap_grad_reduce and stage == 0 and i == 0 and not run.overlap_param_gather_with_optimizer_step
        )
        for expert, ranks in ((False, groups.dp_cp), (True, groups.edp)):
            # ms-swift's rule (wrap_model), with the dense group for both kinds of buffers.
            size = max(40_000_000, 1_000_000 * groups.dp_cp) if bucketed else None
            sharded = run.use_distributed_optimizer
            buffer = make_buffer(chunk, expert=expert, ranks=ranks, sharded=sharded, bucket_size=size)
            if buffer.buckets:
                found.append(buffer)
    return found


def optimizer_bytes_per_element(run: RunSettings, *, host: bool = False) -> float:
    """For one parameter element that this rank owns: float32 copy and Adam's moments (SGD: momentum).

    On the GPU; with `host`, what optimizer_cpu_offload moved off it.
    """
    sizes = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    if run.optimizer == "sgd":
        states = 4
    else:
        states = 8
        if run.use_precision_aware_optimizer:
            states = sizes[run.exp_avg_dtype] + sizes[run.exp_avg_sq_dtype]
    main = 4 if run.dtype_bytes == 2 else 0
    on_host = run.optimizer_offload_fraction if run.optimizer_cpu_offload else 0.0
    if not host:
        return (main + states) * (1 - on_host)
    # HybridDeviceOptimizer: all in float32 whatever the dtypes, and a pinned copy of the gradient.
    return (4 + (4 if run.optimizer == "sgd" else 8) + 4) * on_host


def static_memory(shape: ModelShape, run: RunSettings, ranks: int, stage: int, *, dp_rank: int = 0, edp_rank: int = 0):
    """Parameters, adapters, reference model, gradients, optimizer and kept shards, in bytes, as a dict.

    `host_optimizer` alone is in the node's own memory.

    Args:
        dp_rank, edp_rank: this rank's place in the groups that reduce dense and expert gradients.
    """
    groups = groups_of(run, ranks)
    chunks = stage_chunks(shape, run, stage)
    buffers = stage_buffers(chunks, run, groups, stage)
    tensors = [t for chunk in chunks for t in chunk]
    frozen = sum(t.elements for t in tensors if not t.trained)
    trained = sum(t.elements for t in tensors if t.trained)
    # The distributed optimizer stores the trained parameters in buffers of the gradients' layout.
    stored = sum(b.elements for b in buffers) if run.use_distributed_optimizer else trained
    owned = sum(b.owned_elements(edp_rank if b.expert else dp_rank) for b in buffers)
    kept = 0
    if run.probes:
        kept = kept_copies(run, shape.experts > 0) * sum(b.shard_elements for b in buffers) * run.grad_bytes
    has_reference = not run.lora and run.uses_reference and not run.bvpo_new_layers_only
    return {
        "parameters": (frozen + stored) * run.dtype_bytes,
        "adapters": sum(t.elements for t in tensors if t.adapter) * run.dtype_bytes,
        "reference_model": (frozen + trained) * run.dtype_bytes if has_reference else 0,
        "gradients": sum(b.elements for b in buffers) * run.grad_bytes,
        "optimizer": owned * optimizer_bytes_per_element(run),
        "host_optimizer": owned * optimizer_bytes_per_element(run, host=True),
        "kept_shards": kept,
    }


@lru_cache(maxsize=4096)
def _static_memory(shape: ModelShape, run: RunSettings, ranks: int, stage: int) -> dict[str, float]:
    return static_memory(shape, run, ranks, stage)


def saved_activations(
    shape: ModelShape, run: RunSettings, ranks: int, stage: int, batch: Batch, imbalance: float = 1.0
) -> tuple[float, float]:
    """(bytes saved by the micro-batches in flight, bytes that recomputation adds for a moment) on one rank."""
    pp = run.pipeline_model_parallel_size
    vpp = run.vpp if pp > 1 else 1
    layers = stage_layers(run, shape.layers)[stage] // vpp
    one = micro_batch_activations(shape, run, batch, layers=layers, imbalance=imbalance)
    micro_batches = run.global_batch_size // (run.micro_batch_size * groups_of(run, ranks).dp)
    flying = chunks_in_flight(run, pp=pp, stage=stage, micro_batches=micro_batches)
    last = stage == pp - 1
    # Every chunk of a pipeline but the very first gets its input from another stage, reference and policy in one.
    inputs = 0.0 if pp == 1 else one.chunk_input * (vpp - (stage == 0)) / vpp
    saved = flying * (layers * one.kept + inputs)
    if last:
        saved += one.head  # its backward pass follows at once, so no second one is in flight
    # The head's own tensors are free when the first layer is recomputed.
    return saved, max(0.0, one.recomputed - (one.head if last else 0.0)) if one.recomputed else 0.0


def log_prob_bytes(shape: ModelShape, run: RunSettings, batch: Batch) -> float:
    """Scratch of the target log-probs on the last stage: tiles of logits and hidden states in float32."""
    t = batch.tokens / run.context_parallel_size
    tp, h = run.tensor_model_parallel_size, shape.hidden
    if run.bvpo_logp_impl == "te" or run.rlhf_type != "bvpo":
        return t * shape.vocab / tp * 4
    gathered = t * h * run.dtype_bytes if tp > 1 else 0.0
    tiles = 0.0 if run.rehearsal else run.bvpo_logp_memory * GIB  # kernels/tile_sizes.py
    if run.head_frozen:
        products = t * h * (4 if tp > 1 else run.dtype_bytes)
        return tiles + gathered + products
    weight = shape.vocab / tp * h * run.dtype_bytes
    return tiles + gathered + t * h * 4 + weight


def stage_memory(
    shape: ModelShape, run: RunSettings, ranks: int, stage: int, batch: Batch, imbalance: float = 1.0
) -> StageMemory:
    """All of one stage's memory, on its fullest rank."""
    groups = groups_of(run, ranks)
    static = _static_memory(
        shape,
        replace(run, recompute_granularity="none", recompute_method=None, max_length=1, packing_length=None),
        ranks,
        stage,
    )
    saved, again = saved_activations(shape, run, ranks, stage, batch, imbalance)
    one = micro_batch_activations(shape, run, batch, layers=1, imbalance=imbalance)
    last = stage == run.pipeline_model_parallel_size - 1
    logps = log_prob_bytes(shape, run, batch) if last else 0.0
    reference = one.reference if run.uses_reference else 0.0
    working = max(again + one.backward, logps, reference)
    widths = (groups.tp, groups.pp, groups.cp, groups.dp, groups.ep, groups.edp)
    fixed = 0.0 if run.rehearsal else CUDA_CONTEXT + NCCL_PER_GROUP * (1 + sum(n > 1 for n in widths))
    return StageMemory(
        stage=stage,
        layers=stage_layers(run, shape.layers)[stage],
        activations=saved,
        working=working,
        log_probs=logps,
        reference_pass=reference,
        fixed=fixed,
        fragmentation=0.0 if run.rehearsal else FRAGMENTATION * (saved + working),
        **static,
    )


def all_stages(
    shape: ModelShape, run: RunSettings, ranks: int, lengths: Lengths, imbalance: float = 1.0
) -> list[StageMemory]:
    batch = micro_batch(run, lengths)
    stages = range(run.pipeline_model_parallel_size)
    return [stage_memory(shape, run, ranks, stage, batch, imbalance) for stage in stages]


def host_bytes(shape: ModelShape, run: RunSettings, ranks: int) -> float:
    """Bytes of a node's own memory for each of its GPUs: an offloaded optimizer, or base weights kept while merging."""
    found = 0.0
    for stage in range(run.pipeline_model_parallel_size):
        on_host = _static_memory(shape, run, ranks, stage)["host_optimizer"]
        if run.lora and run.merge_lora is not False:
            chunks = stage_chunks(shape, run, stage)
            on_host += sum(t.elements for c in chunks for t in c if not t.trained) * run.dtype_bytes
        found = max(found, on_host)
    return found


def fullest(shape: ModelShape, run: RunSettings, ranks: int, lengths: Lengths, imbalance: float = 1.0) -> float:
    """Bytes on the fullest rank. Of the stages between the first and the last, the second holds most, where all layers
    are trained alike."""
    batch = micro_batch(run, lengths)
    last = run.pipeline_model_parallel_size - 1
    stages = set(range(last + 1)) if run.bvpo_new_layers_only else {0, min(1, last), last}
    return max(stage_memory(shape, run, ranks, stage, batch, imbalance).total for stage in stages)


def least_recomputed(
    shape: ModelShape, run: RunSettings, ranks: int, lengths: Lengths, room: float, imbalance: float = 1.0
) -> RunSettings | None:
    """`run` with the fewest recomputed layers a chunk whose fullest rank takes `room` bytes; None where none does.

    Layers of one kind: `recompute_method: block` runs the first n of each chunk again.
    """

    def with_layers(n: int) -> RunSettings:
        modes = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=n)
        return replace(run, **modes)

    def fits(n: int) -> bool:
        return fullest(shape, with_layers(n), ranks, lengths, imbalance) <= room

    low, high = 1, max(stage_layers(run, shape.layers)) // run.vpp
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return with_layers(low)


def longest_trace(
    shape: ModelShape, run: RunSettings, cluster: Cluster, lengths: Lengths, imbalance: float = 1.0
) -> int:
    """The longest trace (with packing: the longest pack) whose micro-batch fits every stage; 0 where nothing fits."""

    def fits(n: int) -> bool:
        longer = replace(run, max_length=n, packing_length=n if run.packing else None)
        tried = Lengths(n, min(lengths.empty, n))
        if run.packing:  # sequences that a pack of n tokens holds
            most = max(n // run.sequences, 1)
            tried = Lengths(min(lengths.trace, most), min(lengths.empty, most))
        return fullest(shape, longer, cluster.ranks, tried, imbalance) <= cluster.memory * GIB

    step = 64
    # Positions count from 0 in each sequence of a pack, so a pack may have more tokens than the model positions.
    longest = (shape.max_positions or 2**17) * (8 if run.packing else 1)
    low, high = 0, max(longest // step, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step
