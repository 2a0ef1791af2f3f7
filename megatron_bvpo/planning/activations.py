"""Bytes that autograd keeps between a micro-batch's forward and backward pass, operation by operation.

Each entry is one tensor, or a few of the same kind, that an operation saves for its backward pass. Most are the same
wherever the model runs. Where Transformer Engine and the rehearsal's stand-ins save different ones, `Engine` tells
them apart: attention (flash attention keeps its output and one number a row; plain PyTorch keeps the matrix of
weights twice), norms, and the gather under sequence parallelism. The stand-ins' side is compared with what autograd
saves on real ranks (tests/distributed/test_plan_memory.py). Transformer Engine's side follows its source and has not
been measured on a GPU.

Symbols: t tokens of this context-parallel rank, s those of this tensor-parallel rank (t / TP under sequence
parallelism), h hidden, f MLP width, k experts a token, r LoRA rank, D bytes of an element.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.planning.tensors import lora_modules


@dataclass(frozen=True)
class Batch:
    """One micro-batch, before context parallelism cuts it.

    Attributes:
        tokens: of all its sequences together.
        squares: sum of the squared lengths of its sequences; plain attention keeps a matrix of them.
    """

    tokens: float
    squares: float


@dataclass(frozen=True)
class Engine:
    """Who runs the layers.

    Attributes:
        stand_in: the rehearsal's plain PyTorch instead of Transformer Engine.
    """

    stand_in: bool


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank, for one micro-batch.

    Attributes:
        layer: what one layer saves without recomputation.
        kept: what one layer saves with the run's recomputation.
        chunk_input: what a chunk keeps of its input beyond that (a stage's input holds reference and policy).
        head: final norm, log-probs and losses on the last stage.
        recomputed: what comes back for a moment while a recomputed part runs backward.
        backward: gradients of the largest operation while it runs backward.
        reference: what the reference's forward pass holds at a time.
    """

    layer: float
    kept: float
    chunk_input: float
    head: float
    recomputed: float
    backward: float
    reference: float


class LayerSizes:
    """Saved bytes of one layer, by part. `imbalance`: tokens of the busiest expert rank over the mean."""

    def __init__(self, shape: ModelShape, run: RunSettings, batch: Batch, engine: Engine, imbalance: float = 1.0):
        self.shape, self.run, self.engine = shape, run, engine
        self.D = run.dtype_bytes
        self.tp = run.tensor_model_parallel_size
        self.etp = run.expert_tensor_parallel_size
        self.t = batch.tokens / run.context_parallel_size
        self.s = self.t / self.tp if run.sequence_parallel else self.t
        self.squares = batch.squares / run.context_parallel_size
        self.keys = batch.tokens  # gathered over context parallelism by the stand-in's attention
        self.adapted = lora_modules(run.target_modules) if run.lora else ()
        self.m = self.s * shape.experts_per_token * self.etp * imbalance  # rows of tokens in this rank's experts

    # ---- pieces

    def norm(self, rows: float, width: float) -> float:
        """Its input and one float32 a row. The stand-in's are float32, and it keeps the result to train the weight."""
        if not self.engine.stand_in:
            return rows * width * self.D + 4 * rows
        copies = 1 if self.run.lora else 2
        return copies * rows * width * 4 + 4 * rows

    def dropped(self, elements: float) -> float:
        """LoRA dropout: a copy of the input and its mask."""
        if not (self.run.lora and self.run.lora_dropout > 0):
            return 0.0
        return elements * (self.D + (self.D if self.engine.stand_in else 1))

    def column_input(self, name: str) -> float:
        """Input of a column-parallel product behind a fused norm: linear_qkv, and linear_fc1 of a dense MLP."""
        h, s, t = self.shape.hidden, self.s, self.t
        if not self.run.lora:  # gathered by the stand-in, gathered again in the backward pass by TE
            return (t if self.engine.stand_in else s) * h * self.D
        normed = s * h * self.D
        if name not in self.adapted:
            return 0.0 if self.engine.stand_in else normed
        drop = self.dropped(s * h)
        if self.engine.stand_in and drop:
            normed = 0.0  # the dropped copy takes its place
        return normed + drop + t * self.run.lora_rank * self.D

    def row_input(self, name: str, width: float) -> float:
        """Input of a row-parallel product (linear_proj, linear_fc2) [t, width]."""
        if self.run.lora and name not in self.adapted:
            return 0.0
        inputs = self.t * width * self.D
        if not self.run.lora:
            return inputs
        drop = self.dropped(self.t * width)
        return (drop or inputs) + self.s * self.run.lora_rank * self.D

    def grouped_input(self, name: str, width: float) -> float:
        """Input of the experts' products [m, width]."""
        if self.run.lora and name not in self.adapted:
            return 0.0
        inputs = self.m * width * self.D
        if not self.run.lora:
            return inputs
        return (self.dropped(self.m * width) or inputs) + self.m * self.run.lora_rank * self.D

    # ---- parts of a layer

    @property
    def head_rows(self) -> tuple[float, float]:
        """Widths of this rank's queries and of its keys (or values)."""
        d = self.shape.head_dim
        return self.shape.heads * d / self.tp, max(self.shape.kv_heads / self.tp, 1) * d

    def before_attention(self) -> float:
        """Norm, linear_qkv, norms per head, rotary embedding."""
        q, kv = self.head_rows
        found = self.norm(self.s, self.shape.hidden) + self.column_input("linear_qkv")
        if self.shape.qk_norm:
            d = self.shape.head_dim
            found += self.norm(self.t * q / d, d) + self.norm(self.t * kv / d, d)
        if not self.run.apply_rope_fusion:  # cosine and sine, for queries and for keys
            found += 4 * self.t * self.shape.head_dim * self.D
        return found

    def attention_inputs(self) -> float:
        """Queries, keys and values. TE's values are a view that keeps the whole product of linear_qkv."""
        q, kv = self.head_rows
        values = kv if self.engine.stand_in else q + 2 * kv
        return self.t * (q + kv + values) * self.D

    def attention_inside(self) -> float:
        """What attention saves of itself."""
        q, _ = self.head_rows
        heads = self.shape.heads / self.tp
        if not self.engine.stand_in:
            return self.t * heads * 4  # its output is counted as the input of linear_proj, or below
        # float32: queries, and keys and values repeated for each query head; two matrices of weights, one mask.
        return 4 * q * (self.t + 2 * self.keys) + self.squares * (8 * heads + 1) + self.t

    def after_attention(self) -> float:
        q, _ = self.head_rows
        saved = self.row_input("linear_proj", q)
        if not self.engine.stand_in and (self.run.lora and (not self.adapted or self.run.lora_dropout > 0)):
            saved += self.t * q * self.D  # flash attention's output, which nothing else keeps
        return saved

    def mlp_norm(self) -> float:
        return self.norm(self.s, self.shape.hidden)

    def activation_input(self) -> float:
        """What SwiGLU saves: both halves, and the router's weight of each row."""
        if self.shape.experts:
            return self.m * (2 * self.shape.ffn / self.etp * self.D + 4)
        return self.t * 2 * self.shape.ffn / self.tp * self.D

    def second_input(self) -> float:
        if self.shape.experts:
            return self.grouped_input("linear_fc2", self.shape.ffn / self.etp)
        return self.row_input("linear_fc2", self.shape.ffn / self.tp)

    def router(self) -> float:
        """The normed hidden states, the choice of experts, and where each row went."""
        experts, k = self.shape.experts, self.shape.experts_per_token
        rows = self.s * (k * (8 + 4 + 8) + experts * (1 + 4))
        if self.run.moe_permute_fusion:
            rows += self.s * experts * 4
        if "router" in self.adapted:
            rows += self.s * self.run.lora_rank * 4
        return self.s * self.shape.hidden * self.D + rows

    def mlp(self) -> float:
        if self.shape.experts:
            first = self.grouped_input("linear_fc1", self.shape.hidden)
            return self.router() + first + self.activation_input() + self.second_input()
        return self.column_input("linear_fc1") + self.activation_input() + self.second_input()

    def whole(self) -> float:
        q, _ = self.head_rows
        inside = self.attention_inside() + (0.0 if self.engine.stand_in else self.attention_inputs())
        return self.before_attention() + inside + self.after_attention() + self.mlp_norm() + self.mlp()

    # ---- recomputation

    def selective(self) -> tuple[float, float]:
        """(saved, recomputed at a time) of a layer with `recompute_granularity: selective`."""
        saved, again = self.whole(), 0.0
        modules = self.run.recompute_modules
        if "core_attn" in modules and self.engine.stand_in:
            saved += self.attention_inputs() - self.attention_inside()
        elif "core_attn" in modules:
            saved -= self.attention_inside()
        after = self.after_attention() + self.mlp_norm() + self.mlp()
        if ("moe" if self.shape.experts else "mlp") in modules:
            inputs = self.s * self.shape.hidden * self.D
            saved -= self.mlp() - inputs
            after -= self.mlp() - inputs
            again = max(again, self.mlp())
        elif "moe_act" in modules and self.shape.experts:
            saved -= self.second_input()
            after -= self.second_input()
            again = max(again, self.second_input())
        if "core_attn" in modules:
            # By then what the layer kept behind its attention is free.
            again = max(again, self.attention_inside() - after)
        return saved, again

    # ---- what lives for a moment

    def largest_operation(self) -> float:
        """Output (or gradient) bytes of the layer's widest operations, one after another."""
        q, kv = self.head_rows
        h, f = self.shape.hidden, self.shape.ffn
        if self.shape.experts:
            mlp = self.m * (h + 3 * f / self.etp)
        else:
            mlp = self.t * (h + 3 * f / self.tp)
        return max(mlp, self.t * (h + 2 * (q + 2 * kv))) * self.D


def micro_batch_activations(
    shape: ModelShape, run: RunSettings, batch: Batch, *, layers: int, imbalance: float = 1.0
) -> Activations:
    """Saved bytes of one micro-batch in a chunk of `layers` layers; `kept` is the mean over them.

    Where some layers are trained whole and others have adapters, all are counted as the kind that saves more.
    """
    if run.lora and run.bvpo_new_layers_only:
        kinds = [replace(run, tuner_type=kind, bvpo_new_layers_only=False) for kind in ("lora", "full")]
        both = [micro_batch_activations(shape, kind, batch, layers=layers, imbalance=imbalance) for kind in kinds]
        return Activations(*map(max, *map(astuple, both)))
    sizes = LayerSizes(shape, run, batch, Engine(run.rehearsal), imbalance)
    whole = sizes.whole()
    inputs = sizes.s * shape.hidden * sizes.D
    kept, again = whole, 0.0
    if run.recompute == "selective":
        kept, again = sizes.selective()
    elif run.recompute == "full":
        n = run.recompute_num_layers or 1
        if run.recompute_method == "uniform":
            groups = -(-layers // n)
            kept, again = groups * inputs / max(layers, 1), min(n, layers) * whole - inputs
        else:  # block: the first n layers of a chunk
            done = min(n, layers)
            kept, again = (done * inputs + (layers - done) * whole) / max(layers, 1), whole - inputs
    operation = sizes.largest_operation()
    return Activations(
        layer=whole,
        kept=kept,
        chunk_input=inputs if run.uses_reference else 0.0,
        head=_head(sizes),
        recomputed=again,
        backward=operation,
        reference=2 * inputs + operation,
    )


def _head(sizes: LayerSizes) -> float:
    """Final norm, log-probs and losses. A frozen head keeps dlogp/dx, a trained one its input."""
    h, s, t = sizes.shape.hidden, sizes.s, sizes.t
    tokens = t * (8 + 1 + 8 + 8)  # targets, mask, positions, float64 log-probs
    if not sizes.run.lora:
        tokens += 28 * t
    if sizes.run.bvpo_logp_impl == "te" or sizes.run.rlhf_type != "bvpo":
        tokens += t * sizes.shape.vocab / sizes.tp * (sizes.D + 4)
    return sizes.norm(s, h) + s * h * sizes.D + tokens


def chunks_in_flight(run: RunSettings, *, pp: int, stage: int, micro_batches: int) -> int:
    """Forward passes of a model chunk that a stage has not run backward yet, at most (Megatron's schedules)."""
    vpp = run.vpp
    if pp == 1:
        return 1
    if vpp == 1:
        return min(pp - stage, micro_batches)
    warmup = (pp - stage - 1) * 2 + (vpp - 1) * (run.microbatch_group_size_per_vp_stage or pp)
    return min(warmup + 1, micro_batches * vpp)
