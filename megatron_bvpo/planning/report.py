"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_bvpo.planning.costs import EFFICIENCY, LINK_EFFICIENCY, Costs
from megatron_bvpo.planning.layout import Cluster, Groups, layout_name
from megatron_bvpo.planning.memory import FRAGMENTATION, GIB, Lengths, StageMemory, micro_batch
from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.planning.suggest import BUSIEST, HEADROOM, Suggestion
from megatron_bvpo.planning.waiting import Waiting
from megatron_bvpo.streams import DEFAULT, PAIR, estimators

PASSES = {2: "four", 3: "six", 4: "eight"}  # of a probe, by the number of streams that are measured
COLUMNS = (
    ("params", "parameters"),
    ("(LoRA)", "adapters"),
    ("ref. model", "reference_model"),
    ("grads", "gradients"),
    ("optimizer", "optimizer"),
    ("probe", "kept_shards"),
    ("saved act.", "activations"),
    ("working", "working"),
    ("(log-probs)", "log_probs"),
    ("(ref. pass)", "reference_pass"),
    ("CUDA, NCCL", "fixed"),
    ("fragments", "fragmentation"),
)


@dataclass(frozen=True)
class Plan:
    """Everything that `bvpo plan` found for one run.

    Attributes:
        waiting: of data-parallel replicas for each other.
        fewer: the run with fewer recomputed layers, where that fits.
        note: why it is not the file's own layout.
    """

    config: str
    shape: ModelShape
    run: RunSettings
    cluster: Cluster
    groups: Groups
    lengths: Lengths
    imbalance: float
    stages: list[StageMemory]
    costs: Costs
    longest: int
    host: float
    waiting: Waiting | None = None
    fewer: RunSettings | None = None
    note: str = ""

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda s: s.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.cluster.memory * GIB

    @property
    def verdict(self) -> str:
        """One line: does it fit, and how long may a trace be."""
        used = f"{self.fullest.total / GIB:.1f} of {self.cluster.memory:g} GiB"
        where = f"on stage {self.fullest.stage}" if self.groups.pp > 1 else "a GPU"
        what = "pack" if self.run.packing else "trace"
        if not self.fits:
            hint = f"a {what} of {self.longest} tokens would" if self.longest else "no length does"
            return f"DOES NOT FIT: {used} {where}; {hint}"
        tight = ", tightly" if self.fullest.total > (1 - HEADROOM) * self.cluster.memory * GIB else ""
        return f"fits{tight}: {used} {where}; the longest {what} that fits is {self.longest} tokens"


def as_json(plan: Plan, table: list[Suggestion] | None = None) -> dict[str, Any]:
    """The plan as plain numbers: bytes, tokens, FLOPs, seconds."""
    found = {
        "config": plan.config,
        "note": plan.note,
        "fits": plan.fits,
        "verdict": plan.verdict,
        "model": {**dataclasses.asdict(plan.shape), "parameters": plan.shape.total_parameters},
        "cluster": dataclasses.asdict(plan.cluster),
        "groups": dataclasses.asdict(plan.groups),
        "lengths": dataclasses.asdict(plan.lengths),
        "longest_trace": plan.longest,
        "host_bytes_a_gpu": plan.host,
        "stages": [{**dataclasses.asdict(s), "total": s.total} for s in plan.stages],
        "costs": dataclasses.asdict(plan.costs),
        "waiting": plan.waiting and dataclasses.asdict(plan.waiting),
        "fewer_recomputed_layers": plan.fewer and plan.fewer.recompute_num_layers,
    }
    if table is not None:
        found["suggestions"] = [
            {
                "layout": layout_name(s.run),
                "recompute": s.run.recompute,
                "bytes": s.bytes,
                "fits": s.fits,
                "seconds": s.costs.seconds,
                "bubble": s.costs.bubble,
                "longest_trace": s.longest,
                "keys": layout_keys(s.run),
            }
            for s in table
        ]
    return found


def layout_keys(run: RunSettings) -> dict[str, Any]:
    """Every YAML key that decides a suggestion's layout; None: the key must not be in the file.

    All of them, so that the file's own values of the others cannot make another layout of it.
    """
    return {
        "tensor_model_parallel_size": run.tensor_model_parallel_size,
        "sequence_parallel": run.sequence_parallel,
        "pipeline_model_parallel_size": run.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": run.vpp,
        "microbatch_group_size_per_vp_stage": run.microbatch_group_size_per_vp_stage,
        "decoder_first_pipeline_num_layers": run.decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": run.decoder_last_pipeline_num_layers,
        "account_for_embedding_in_pipeline_split": run.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": run.account_for_loss_in_pipeline_split,
        "context_parallel_size": run.context_parallel_size,
        "expert_model_parallel_size": run.expert_model_parallel_size,
        "expert_tensor_parallel_size": run.expert_tensor_parallel_size,
        "recompute_granularity": run.recompute,
        "recompute_method": run.recompute_method,
        "recompute_num_layers": run.recompute_num_layers,
    }


def key_lines(keys: dict[str, Any]) -> list[str]:
    """`layout_keys` as YAML. ms-swift hands a null over as the text None, which its parser refuses: no such line."""
    lines = [f"{key}: {str(value).lower()}" for key, value in keys.items() if value is not None]
    absent = [key for key, value in keys.items() if value is None]
    return [*lines, *(f"# without {key}" for key in absent)]


def as_text(plan: Plan, table: list[Suggestion] | None = None) -> str:
    note = [plan.note, ""] if plan.note else []
    lines = [*note, *_head(plan), "", *_memory(plan), "", *_step(plan), "", plan.verdict]
    if table is not None:
        lines += ["", *_suggestions(plan, table)]
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    run, shape, groups, cluster = plan.run, plan.shape, plan.groups, plan.cluster
    active = shape.active_matrices + 2 * shape.vocab * shape.hidden
    tuner = f"LoRA rank {run.lora_rank} on {' '.join(run.target_modules)}" if run.lora else "full tuning"
    if run.bvpo_new_layers_only:
        new = f"{len(shape.new_layers)} new layers of {shape.layers}"
        tuner = f"{new} whole, {tuner} of the others" if run.lora else f"{tuner} of {new}"
    data = f"DP {groups.dp}" + (f", experts' DP {groups.edp}" if shape.experts else "")
    recompute = run.recompute
    if recompute == "full":
        recompute += f", {run.recompute_method} {run.recompute_num_layers or 1}"
    elif recompute == "selective":
        recompute += f" ({' '.join(run.recompute_modules)})"
    lengths = f"traces of {plan.lengths.trace} tokens, empty traces of {plan.lengths.empty}"
    longer = [name for name in run.streams if name not in DEFAULT]
    if longer:
        lengths += f", {' and '.join(longer)} as long as traces"
    sides = (
        "chosen and rejected" if all(run.sides(stream) == PAIR for stream in run.streams) else "every sequence of a row"
    )
    if run.packing:
        tokens, asked = (
            micro_batch(run, plan.lengths).tokens / run.micro_batch_size,
            run.packing_length or run.max_length,
        )
        lengths = f"packs of {asked} tokens"
        if tokens > asked:
            lengths = f"one row of {tokens:.0f} tokens, which no pack of {asked} holds"
    return [
        f"{shape.name}: {_billions(shape.total_parameters)} parameters, {_billions(active)} a token; {tuner}",
        f"{cluster.nodes} × {cluster.gpus} GPUs of {cluster.memory:g} GiB as {layout_name(run)}; {data}",
        f"recomputation {recompute}; streams {' and '.join(run.streams)}; the longest micro-batch: {lengths}, "
        f"{run.micro_batch_size} × {sides}",
    ]


def _memory(plan: Plan) -> list[str]:
    shown = [c for c in COLUMNS if any(getattr(s, c[1]) for s in plan.stages)]
    widths = [max(len(title), 6) for title, _ in shown]
    lines = ["GiB a GPU      " + "  ".join(t.rjust(w) for (t, _), w in zip(shown, widths, strict=True)) + "   total"]
    for s in plan.stages:
        cells = [f"{getattr(s, name) / GIB:.2f}".rjust(w) for (_, name), w in zip(shown, widths, strict=True)]
        lines.append(f"stage {s.stage:<2} {s.layers:>4}".ljust(15) + "  ".join(cells) + f"  {s.total / GIB:6.1f}")
    lines.append(
        "In brackets: part of another column. Layers stand behind the stage. CUDA, NCCL and fragments "
        f"({FRAGMENTATION:.0%} of what a step allocates) are allowances; expandable segments need fewer."
    )
    if plan.host >= GIB / 10:
        what = "base weights while a merged model is saved" if plan.run.lora else "the offloaded optimizer"
        lines.append(f"Each node's own memory: {plan.host * plan.cluster.gpus / GIB:.0f} GiB for {what}.")
    return lines


def _step(plan: Plan) -> list[str]:
    costs, run = plan.costs, plan.run
    probe = ""
    if run.probes:
        probe = f"; {1 / run.bvpo_probe_interval:.0%} of the steps are probes, with the same arithmetic"
        if costs.bubble:
            probe += f" in {PASSES[len(estimators(run.streams))]} passes, and a bubble of {costs.probe_bubble:.0%}"
    lines = [
        f"A step: {run.global_batch_size} {'packs' if run.packing else 'rows'} in {costs.micro_batches} "
        f"micro-batches a replica, {costs.tokens:,.0f} tokens if all are as long; {costs.flops / 1e15:,.1f} PFLOP; "
        f"pipeline bubble {costs.bubble:.0%}{probe}",
    ]
    lines += _waiting(plan)
    if plan.fewer:
        chunk = plan.shape.layers // (plan.groups.pp * run.vpp)
        lines.append(
            f"  recompute_method: block with recompute_num_layers: {plan.fewer.recompute_num_layers} of about {chunk} "
            f"layers a chunk fits, too (with {BUSIEST:g} times the mean on the busiest expert rank and {HEADROOM:.0%} "
            "left free)"
        )
    if run.rehearsal:
        return [*lines, "  Seconds are not planned for a rehearsal: its ranks are processes on a CPU."]
    for t in costs.traffic:
        wire = "between nodes" if t.between_nodes else "within a node"
        lines.append(
            f"  {t.kind + ':':<23} {t.bytes / GIB:9.2f} GiB a rank, {wire}, {t.seconds:.2f} s if nothing hides it"
        )
    low, high = EFFICIENCY["experts" if plan.shape.experts else "dense"]
    fast, slow = costs.seconds
    lines.append(
        f"  {fast:.1f} to {slow:.1f} s a step: assumed {low:.0%} to {high:.0%} of an H100's peak and "
        f"{LINK_EFFICIENCY:.0%} of its links'; nobody has timed this run"
    )
    return lines


def _waiting(plan: Plan) -> list[str]:
    """Predicted, and said to be so."""
    found, run = plan.waiting, plan.run
    if found is None or run.rehearsal:
        return []
    meet = f"{found.together} replicas meet in every all-to-all, " if found.together > 1 else ""
    where = f"  waiting of replicas, predicted from lengths alone: {meet}{plan.groups.dp} at the step's end: "
    if not found.rows:
        return [
            f"{where}{found.single:.0%} of a step with one row a micro-batch, if rows' tokens vary by {found.cv:.1f} "
            "of their mean; --rows FILE takes your rows' own"
        ]
    return [
        f"{where}{found.single:.0%} of a step with one row a micro-batch; {found.rows} rows vary by {found.cv:.2f} of "
        "their mean",
        f"  packing: true, packing_length: {found.packing_length}: {found.packed:.0%}; {found.rows_a_pack:.1f} rows a "
        f"pack, which vary by {found.packs_cv:.2f}. global_batch_size counts packs: {run.global_batch_size} of them "
        f"are about {run.global_batch_size * found.rows_a_pack:.0f} rows a step",
    ]


def _suggestions(plan: Plan, table: list[Suggestion]) -> list[str]:
    if not table:
        return ["No layout of these ranks passes the rules with this batch."]
    lines = [f"{'layout':<44} {'recompute':<10} {'GiB':>6} {'bubble':>7} {'s a step':>15} {'longest trace':>14}"]
    for s in table:
        fast, slow = s.costs.seconds
        lines.append(
            f"{layout_name(s.run):<44} {s.run.recompute:<10} {s.bytes / GIB:>6.1f} {s.costs.bubble:>7.0%} "
            f"{f'{fast:.1f} – {slow:.1f}':>15} {s.longest:>14}"
        )
    if not table[0].fits:
        lines.append("None of them fits; the smallest are shown. More nodes, or a shorter max_length, are needed.")
    return [*lines, "", f"Keys of {layout_name(table[0].run)}:", *key_lines(layout_keys(table[0].run))]


def _billions(n: float) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"
