"""Arithmetic of a step: tokens, FLOPs, bytes over the wires, pipeline bubble, and a range of seconds.

FLOPs and bytes are counted. Seconds are not: they rest on the shares of a GPU's and a link's peak below, which are
assumptions and are printed with the result.

A step runs every micro-batch through the reference (one forward pass) and through the policy (forward and backward).
A frozen matrix costs 2 FLOPs an element and token forward and 2 backward, a trained one 2 and 4; recomputation adds
a forward pass. The head's log-probs take two products forward with a frozen head and none backward, and one forward
and three backward with a trained one (MATH.md §4).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bvpo.planning.activations import Batch
from megatron_bvpo.planning.layout import Cluster, Groups, groups_of, stage_layers
from megatron_bvpo.planning.memory import Lengths, micro_batch, stage_buffers, stage_chunks
from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings

# H100 SXM, dense bf16. Share of it that a run reaches: (slow, fast).
PEAK_FLOPS = 989e12
EFFICIENCY = {"dense": (0.25, 0.45), "experts": (0.10, 0.25)}
# One direction, a GPU, in bytes a second: NVLink 4, and one 400 Gb/s InfiniBand port; and the share that is reached.
NVLINK, INFINIBAND = 450e9, 50e9
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step for one kind of parallelism, and whether they cross nodes."""

    kind: str
    bytes: float
    between_nodes: bool

    @property
    def seconds(self) -> float:
        return self.bytes / ((INFINIBAND if self.between_nodes else NVLINK) * LINK_EFFICIENCY)


@dataclass(frozen=True)
class Costs:
    """One optimizer step.

    Attributes:
        micro_batches: a step, for each data-parallel rank.
        tokens: of all ranks together, every sequence at its longest.
        flops: of all ranks together.
        bubble: share of a step in which a pipeline stage waits.
        probe_bubble: the same of a step that measures.
        traffic: what one rank sends.
        seconds: (fast, slow) a step; fast hides all communication behind arithmetic, slow hides none.
    """

    micro_batches: int
    tokens: float
    flops: float
    bubble: float
    probe_bubble: float
    traffic: tuple[Traffic, ...]
    seconds: tuple[float, float]


def step_costs(shape: ModelShape, run: RunSettings, cluster: Cluster, lengths: Lengths) -> Costs:
    groups = groups_of(run, cluster.ranks)
    batch = micro_batch(run, lengths)
    n = run.global_batch_size // (run.micro_batch_size * groups.dp)
    flops = n * groups.dp * micro_batch_flops(shape, run, batch)
    waiting = (groups.pp - 1) / (run.vpp if groups.pp > 1 else 1)
    bubble = waiting / (n + waiting)
    traffic = tuple(t for t in step_traffic(shape, run, cluster, groups, batch, n) if t.bytes)
    slow, fast = EFFICIENCY["experts" if shape.experts else "dense"]
    per_rank = flops / cluster.ranks / PEAK_FLOPS / (1 - bubble)
    wires = sum(t.seconds for t in traffic)
    seconds = (per_rank / fast, per_rank / slow + wires)
    tokens = n * groups.dp * batch.tokens
    return Costs(n, tokens, flops, bubble, probe_bubble(run, groups, n), traffic, seconds)


def micro_batch_flops(shape: ModelShape, run: RunSettings, batch: Batch) -> float:
    """FLOPs of one micro-batch on all the ranks of a replica together."""
    forward = 2 * batch.tokens * shape.active_matrices + attention_flops(shape, batch)
    head = 2 * batch.tokens * shape.vocab * shape.hidden
    adapters, new = 0.0, new_share(shape, run)
    if run.lora or run.bvpo_new_layers_only:
        passes, products = 2 + new, 2  # the policy forward; gradients of the inputs, and of the new layers' weights
        if run.lora:
            adapters = 6 * batch.tokens * lora_elements_a_token(shape, run) * (1 - new)
    else:
        passes, products = 3, 4
    total = forward * passes + head * products + adapters
    if run.runs_reference:
        total += forward * (1 - new) + head
    if run.measures_baselines:
        total += 2 * (forward + head)
    if run.recompute == "full":
        total += forward * recomputed_share(shape, run)
    elif run.recompute == "selective" and "core_attn" in run.recompute_modules:
        total += attention_flops(shape, batch)
    return total


def new_share(shape: ModelShape, run: RunSettings) -> float:
    """The share of the layers that are trained whole, and that the reference leaves out; 0 in other runs."""
    return len(shape.new_layers) / shape.layers if run.bvpo_new_layers_only else 0.0


def recomputed_share(shape: ModelShape, run: RunSettings) -> float:
    """The share of the layers that `recompute_granularity: full` runs again: all, or the first ones of each chunk."""
    if run.recompute_method != "block":
        return 1.0
    chunks = [n / run.vpp for n in stage_layers(run, shape.layers)]
    return sum(min(run.recompute_num_layers or 1, n) for n in chunks) / sum(chunks)


def probe_bubble(run: RunSettings, groups: Groups, micro_batches: int) -> float:
    """The share of a probe step in which a pipeline stage waits: its passes have half the micro-batches each."""
    waiting = (groups.pp - 1) / (run.vpp if groups.pp > 1 else 1)
    a_pass = micro_batches / 2 if micro_batches % 2 == 0 else micro_batches
    return waiting / (a_pass + waiting)


def attention_flops(shape: ModelShape, batch: Batch) -> float:
    """Both products of causal attention, half of each square."""
    return 2 * 2 * shape.layers * shape.heads * shape.head_dim * batch.squares / 2


def lora_elements_a_token(shape: ModelShape, run: RunSettings) -> float:
    """Elements of the LoRA factors that one token is multiplied with, all layers."""
    h, d, k = shape.hidden, shape.head_dim, max(shape.experts_per_token, 1)
    q, qkv = shape.heads * d, (shape.heads + 2 * shape.kv_heads) * d
    return shape.layers * run.lora_rank * ((h + qkv) + (q + h) + k * ((h + 2 * shape.ffn) + (shape.ffn + h)))


def step_traffic(
    shape: ModelShape, run: RunSettings, cluster: Cluster, groups: Groups, batch: Batch, micro_batches: int
) -> list[Traffic]:
    """Bytes that a rank of the first stage sends in a step, by kind."""
    t = batch.tokens / groups.cp
    s = t / groups.tp
    hidden = t * shape.hidden * run.dtype_bytes
    layers = shape.layers / groups.pp
    # Forward, backward, and what else runs forward.
    passes = 2 + run.runs_reference + 2 * run.measures_baselines + (run.recompute == "full")
    # All-gather before and reduce-scatter behind each column- and row-parallel pair; a ring sends (n-1)/n of it.
    pairs = 1 if shape.experts else 2
    tp = passes * 2 * pairs * layers * hidden * (groups.tp - 1) / groups.tp
    # Out to the experts and back; ranks of the group that are this one keep their part.
    rows = s * shape.experts_per_token * shape.hidden * run.dtype_bytes
    ep = passes * 2 * layers * rows * (groups.ep - 1) / groups.ep
    kv = t * 2 * max(shape.kv_heads / groups.tp, 1) * shape.head_dim * run.dtype_bytes
    cp = passes * layers * kv * (groups.cp - 1)
    streams = 2 if run.runs_reference else 1
    pp = 2 * streams * run.vpp * s * shape.hidden * run.dtype_bytes if groups.pp > 1 else 0.0
    found = [
        Traffic("tensor parallel", micro_batches * tp, False),
        Traffic("expert parallel", micro_batches * ep, groups.ep * groups.etp > cluster.gpus),
        Traffic("context parallel", micro_batches * cp, groups.tp * groups.cp > cluster.gpus),
        Traffic("pipeline", micro_batches * pp, cluster.nodes > 1),
    ]
    data = experts = 0.0
    for buffer in stage_buffers(stage_chunks(shape, run, 0), run, groups, 0):
        share = (buffer.ranks - 1) / buffer.ranks
        gather = run.dtype_bytes if run.use_distributed_optimizer else run.grad_bytes
        sent = buffer.elements * (run.grad_bytes + gather) * share
        data, experts = (data, experts + sent) if buffer.expert else (data + sent, experts)
    wide = cluster.ranks // groups.pp > cluster.gpus
    return [*found, Traffic("data parallel", data, wide), Traffic("data parallel, experts", experts, wide)]
