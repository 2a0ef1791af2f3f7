"""How long a sampling job takes, by arithmetic: tokens over the rate of an engine that is bound by its memory.

An engine generates one token for each of B running sequences a step. A step reads the weights that these B tokens touch
and the keys and values of all B sequences, and multiplies B tokens with the active weights:

    seconds a step = max((weights + B · context · kv) / (GPUs · HBM · share), 2 · B · active / (GPUs · FLOP/s · share))
    tokens a second of an engine = B / seconds a step

B is what the client keeps running, or as many as the memory beside the weights has keys and values for. Reading the
prompts is left out (once a prompt: engines keep its keys and values). The shares of the peaks that engines reach are
assumptions, printed with the result; nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.costs import PEAK_FLOPS
from megatron_bvpo.planning.layout import Cluster
from megatron_bvpo.planning.model_shapes import ModelShape

HBM = 3.35e12  # bytes a second, H100 SXM
SHARES = (0.3, 0.6)  # of both peaks: (slow, fast)
GIB = 2**30
PROMPT, EMPTY, PROMPTS = 256, 512, 10_000  # tokens, tokens, prompts; where nobody says
TRACE_SHARE = 0.5  # of max_tokens, a whole response on average; where nobody says
RESERVED = 0.05  # of a GPU's memory: activations, CUDA graphs, NCCL


@dataclass(frozen=True)
class SamplingJob:
    """What decides the time of a sampling job.

    Attributes:
        prompts, samples: how many, and answers of each in each mode.
        modes: of `thinking`, `empty`, `short`.
        tokens: mean generated tokens of an answer, by mode.
        concurrency: requests that the client keeps running on all engines together.
        gpus_an_engine: tensor parallel size × pipeline parallel size.
        engines_a_node: data parallel size.
        most_running: sequences that an engine runs at most (vLLM's max_num_seqs).
        utilization: share of a GPU's memory that the engine may take.
        weight_bytes, kv_bytes: of an element: 2 in bf16, 1 in fp8.
    """

    prompts: int
    samples: int
    modes: tuple[str, ...]
    tokens: dict[str, float]
    concurrency: int
    gpus_an_engine: int
    engines_a_node: int
    most_running: int
    utilization: float
    weight_bytes: int = 2
    kv_bytes: int = 2

    @property
    def answers(self) -> int:
        return self.prompts * self.samples * len(self.modes)

    @property
    def generated(self) -> float:
        """Tokens of all answers."""
        return self.prompts * self.samples * sum(self.tokens[mode] for mode in self.modes)


@dataclass(frozen=True)
class SamplingCosts:
    """The estimate.

    Attributes:
        engines: on all nodes.
        running: sequences that an engine runs at a time.
        room: sequences of mean length whose keys and values fit beside the weights; None: the weights alone do not fit.
        rate: (slow, fast) tokens a second of a node.
        hours: (fast, slow) of the whole job.
    """

    engines: int
    running: int
    room: int | None
    rate: tuple[float, float]
    hours: tuple[float, float]


def job_from(values: dict[str, Any], engine: dict[str, Any], prompts: int | None, trace: float | None) -> SamplingJob:
    """The job of a file's keys.

    Args:
        values, engine: as `sampling.job_file.read_job` returns them; defaults are `bvpo sample`'s and vLLM's.
        prompts: how many; None: `limit`, else 10,000.
        trace: mean tokens of a thinking answer; None: half of max_tokens.

    Raises:
        UserError: a number that is none.
    """
    modes = values.get("modes") or ["thinking", "empty"]
    modes = tuple(modes.split() if isinstance(modes, str) else (str(mode) for mode in modes))
    most = _number(values, "max_tokens", 32768)
    tokens = {"thinking": trace or TRACE_SHARE * most, "empty": min(EMPTY, most), "short": min(EMPTY, most)}
    for mode in modes:
        if mode not in tokens:
            raise UserError(f"{mode!r} is no mode", field="modes", remedy=f"write of {', '.join(tokens)}")
    return SamplingJob(
        prompts=prompts or int(_number(values, "limit", PROMPTS)),
        samples=int(_number(values, "samples", 8)),
        modes=modes,
        tokens=tokens,
        concurrency=int(_number(values, "concurrency", 256)),
        gpus_an_engine=int(_number(engine, "tensor_parallel_size", 1) * _number(engine, "pipeline_parallel_size", 1)),
        engines_a_node=int(_number(engine, "data_parallel_size", 1)),
        most_running=int(_number(engine, "max_num_seqs", 256)),
        utilization=_number(engine, "gpu_memory_utilization", 0.9),
        weight_bytes=1 if "fp8" in f"{engine.get('quantization')} {values.get('model')}".lower() else 2,
        kv_bytes=1 if "fp8" in str(engine.get("kv_cache_dtype")) else 2,
    )


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"is {value!r}; expected a number above 0", field=key)
    return value


def weights_touched(shape: ModelShape, tokens: int) -> float:
    """Elements of the matrices that a step with this many tokens reads: an expert counts with the chance that one of
    them goes through it, were the router even."""
    head = shape.vocab * shape.hidden
    if not shape.experts:
        return shape.active_matrices + head
    touched = 1 - (1 - shape.experts_per_token / shape.experts) ** tokens
    return shape.layers * (shape.layer_matrices + shape.experts * touched * shape.expert_matrices) + head


def kv_elements(shape: ModelShape, gpus: int) -> int:
    """Of a token's keys and values in all layers, on all GPUs of an engine: each has one head at least."""
    return 2 * shape.layers * max(shape.kv_heads, gpus) * shape.head_dim


def sampling_costs(shape: ModelShape, job: SamplingJob, cluster: Cluster) -> SamplingCosts:
    """The estimate of a job on a cluster of H100 SXM.

    Raises:
        UserError: an engine that no node has the GPUs for.
    """
    if job.gpus_an_engine * job.engines_a_node > cluster.gpus:
        raise UserError(
            f"{job.engines_a_node} engine(s) of {job.gpus_an_engine} GPU(s) a node, and a node has {cluster.gpus}",
            field="engine.tensor_parallel_size",
            remedy="tensor × pipeline × data parallel size must not exceed a node's GPUs",
        )
    engines = cluster.nodes * job.engines_a_node
    # Longer answers run longer: among the sequences at one time, an answer is met in proportion to its tokens.
    met = sum(job.tokens[mode] ** 2 for mode in job.modes) / sum(job.tokens[mode] for mode in job.modes)
    context = PROMPT + met / 2
    weights = shape.total_parameters * job.weight_bytes
    room = job.gpus_an_engine * cluster.memory * GIB * (job.utilization - RESERVED) - weights
    if room <= 0:
        return SamplingCosts(engines, 0, None, (0.0, 0.0), (float("inf"), float("inf")))
    kv = kv_elements(shape, job.gpus_an_engine) * job.kv_bytes
    fitting = int(room / (kv * context))
    running = max(min(fitting, job.most_running, job.concurrency // engines, job.answers), 1)
    read = weights_touched(shape, running) * job.weight_bytes + running * context * kv
    multiplied = 2 * running * (shape.active_matrices + shape.vocab * shape.hidden)
    rates = []
    for share in SHARES:
        step = max(read / (job.gpus_an_engine * HBM), multiplied / (job.gpus_an_engine * PEAK_FLOPS)) / share
        rates.append(engines * running / step)
    hours = tuple(job.generated / rate / 3600 for rate in reversed(rates))
    return SamplingCosts(engines, running, fitting, tuple(rate / cluster.nodes for rate in rates), hours)


def verdict(shape: ModelShape, job: SamplingJob, costs: SamplingCosts) -> str:
    """One line: tokens, rate and hours."""
    if costs.room is None:
        gib = shape.total_parameters * job.weight_bytes / GIB
        return f"DOES NOT FIT: {gib:.0f} GiB of weights on {job.gpus_an_engine} GPU(s) an engine"
    low, high = costs.rate
    fast, slow = costs.hours
    return (
        f"{job.answers:,} answers, {job.generated / 1e6:,.0f} million tokens; an estimate: {low:,.0f} to {high:,.0f} "
        f"tokens a second and node, {fast:.1f} to {slow:.1f} hours"
    )


def report(shape: ModelShape, job: SamplingJob, costs: SamplingCosts, cluster: Cluster) -> str:
    """The estimate in words."""
    means = ", ".join(f"{job.tokens[mode]:,.0f} tokens an answer in mode {mode}" for mode in job.modes)
    lines = [
        f"{shape.name} on {cluster.nodes} node(s) of {cluster.gpus} GPUs",
        verdict(shape, job, costs),
        f"  {job.prompts:,} prompts × {job.samples} samples × {len(job.modes)} modes; {means} (assumed)",
    ]
    if costs.room is not None:
        lines += [
            f"  {costs.engines} engine(s) of {job.gpus_an_engine} GPU(s); each runs {costs.running} sequences at a "
            f"time; keys and values of about {costs.room:,} fit",
            "  seconds a step = max(bytes read / HBM, products / FLOP/s) / share; "
            f"share {SHARES[0]:g} to {SHARES[1]:g} of {HBM / 1e12:g} TB/s and {PEAK_FLOPS / 1e12:.0f} TFLOP/s a GPU "
            "(assumed)",
        ]
        idle = cluster.gpus - job.gpus_an_engine * job.engines_a_node
        if idle:
            lines.append(f"  {idle} GPU(s) a node are idle: raise engine.data_parallel_size")
        full = min(costs.room, job.most_running) * costs.engines
        if job.concurrency < full:
            lines.append(f"  more would fit: concurrency {full:,} keeps the engines full")
    return "\n".join(lines)
