"""How ranks, layers and experts are split, and whether that works.

The rules are those of launching/layout_rules.py, which every run checks before it makes a process group; here a
refusal also names the nearest layouts that work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.layout_rules import check_layout, check_model_fits, divisors
from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The machines: `nodes` of `gpus` each, `memory` GiB a GPU."""

    nodes: int = 1
    gpus: int = 8
    memory: float = 80.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclasses.dataclass(frozen=True)
class Groups:
    """Sizes of the groups that a rank belongs to. `edp` is the data parallelism of the experts."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int

    @property
    def dp_cp(self) -> int:
        """Ranks that share a dense gradient: Megatron reduces over context parallelism too."""
        return self.dp * self.cp


def groups_of(settings: RunSettings, ranks: int) -> Groups:
    """Group sizes for a layout that `check` has passed."""
    s = settings
    tp, pp, cp = s.tensor_model_parallel_size, s.pipeline_model_parallel_size, s.context_parallel_size
    ep, etp = s.expert_model_parallel_size, s.expert_tensor_parallel_size
    return Groups(tp, pp, cp, ranks // (tp * pp * cp), ep, etp, ranks // (etp * ep * pp))


def stage_layers(settings: RunSettings, layers: int) -> list[int]:
    """Layers of each pipeline stage, as Megatron's get_num_layers_to_build counts them; raises UserError."""
    pp = settings.pipeline_model_parallel_size
    first, last = settings.decoder_first_pipeline_num_layers, settings.decoder_last_pipeline_num_layers
    if first is None and last is None:
        embedding = int(settings.account_for_embedding_in_pipeline_split)
        loss = int(settings.account_for_loss_in_pipeline_split)
        split = _evenly(layers + embedding + loss, pp, "layers (with those that the embedding and the loss count as)")
        split[0] -= embedding
        split[-1] -= loss
    else:
        if pp == 1:
            raise UserError(
                "is given without a pipeline",
                field="decoder_first_pipeline_num_layers",
                remedy="leave it out, or raise PP",
            )
        given = (first or 0) + (last or 0)
        middle = pp - (first is not None) - (last is not None)
        rest = layers - given
        if rest < 0 or (middle == 0 and rest):
            raise UserError(
                f"first {first} and last {last} leave {rest} of {layers} layers for {middle} stages",
                field="decoder_first_pipeline_num_layers",
                remedy=f"their sum can be {layers}" if middle == 0 else "lower them",
            )
        between = _evenly(rest, middle, "layers between the first and the last stage") if middle else []
        split = [*([first] if first is not None else []), *between, *([last] if last is not None else [])]
    vpp = settings.vpp
    for n in split:
        if n % vpp:
            raise UserError(
                f"{n} layers of a stage cannot be split into {vpp} virtual stages",
                field="virtual_pipeline_model_parallel_size",
                remedy=f"it can be {', '.join(map(str, divisors(n)))}",
            )
    return split


def _evenly(layers: int, stages: int, what: str) -> list[int]:
    if layers % stages:
        fits = [d for d in range(1, layers + 1) if layers % d == 0]
        raise UserError(
            f"{layers} {what} cannot be split evenly over {stages} stages",
            field="pipeline_model_parallel_size",
            remedy=f"{', '.join(map(str, fits))} stages work, or other numbers of layers on the first and the "
            "last stage: decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers",
        )
    return [layers // stages] * stages


def check(settings: RunSettings, shape: ModelShape, ranks: int, gpus: int) -> None:
    """Raise UserError naming the key where the layout does not work, without the neighbours."""
    check_layout(settings, ranks)
    heads = SimpleNamespace(
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts or None,
    )
    check_model_fits(settings, heads)
    stage_layers(settings, shape.layers)
    tp, etp = settings.tensor_model_parallel_size, settings.expert_tensor_parallel_size
    if tp > gpus:
        raise UserError(
            f"TP {tp} spans nodes of {gpus} GPUs; it talks in every layer and needs NVLink",
            field="tensor_model_parallel_size",
            remedy=f"use at most {gpus}, and PP or CP across nodes",
        )
    for width, n, key in (
        (shape.ffn, tp, "tensor_model_parallel_size"),
        (shape.ffn, etp, "expert_tensor_parallel_size"),
    ):
        if (key.startswith("expert") == bool(shape.experts)) and width % n:
            raise UserError(f"MLP width {width} cannot be split over {n}", field=key, remedy="use a divisor of it")


def check_length(settings: RunSettings, shape: ModelShape) -> None:
    """A length that the model cannot have is no layout's fault."""
    if settings.max_length and shape.max_positions and settings.max_length > shape.max_positions:
        raise UserError(
            f"{settings.max_length} tokens are more than the model's {shape.max_positions} positions",
            field="max_length",
            remedy=f"use at most {shape.max_positions}",
        )


def check_with_neighbours(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> None:
    """`check_length` and `check`; a refused layout's error also names the nearest layouts that work."""
    check_length(settings, shape)
    try:
        check(settings, shape, cluster.ranks, cluster.gpus)
    except UserError as e:
        near = nearest_layouts(settings, shape, cluster)
        names = "; ".join(layout_name(s) for s in near)
        found = f"Nearest layouts that work: {names}" if names else "No layout of these ranks works with this batch"
        remedy = f"{e.remedy}. {found}." if e.remedy else f"{found}."
        # The flags' own checks name the flag; a YAML file has keys.
        field = (e.field or "").removeprefix("--") or None
        raise UserError(e.message, file=e.file, line=e.line, field=field, remedy=remedy) from None


def layout_name(settings: RunSettings) -> str:
    """TP4 · PP2 · EP8, sizes of 1 left out."""
    s = settings
    sizes = {
        "TP": s.tensor_model_parallel_size,
        "PP": s.pipeline_model_parallel_size,
        "VPP": s.vpp,
        "CP": s.context_parallel_size,
        "EP": s.expert_model_parallel_size,
        "ETP": s.expert_tensor_parallel_size,
    }
    name = " · ".join(f"{k}{v}" for k, v in sizes.items() if v > 1) or "one rank a replica"
    first, last = s.decoder_first_pipeline_num_layers, s.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        name += f" (first stage {first or 'even'}, last {last or 'even'} layers)"
    return name


def candidate_layouts(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> Iterator[RunSettings]:
    """Layouts of these ranks that pass every rule, the batch as it is."""
    experts = [1]
    if shape.experts:
        experts = [d for d in divisors(shape.experts) if d <= cluster.ranks]
    for tp in (d for d in divisors(shape.heads) if d <= cluster.gpus):
        for pp in (d for d in divisors(cluster.ranks) if d <= shape.layers):
            for cp in (c for c in (1, 2, 4, 8) if tp * pp * c <= cluster.ranks):
                for ep in experts:
                    for split in _pipeline_splits(shape.layers, pp):
                        found = dataclasses.replace(
                            settings,
                            tensor_model_parallel_size=tp,
                            sequence_parallel=tp > 1,
                            pipeline_model_parallel_size=pp,
                            context_parallel_size=cp,
                            expert_model_parallel_size=ep,
                            expert_tensor_parallel_size=1,
                            virtual_pipeline_model_parallel_size=None,
                            decoder_first_pipeline_num_layers=split[0],
                            decoder_last_pipeline_num_layers=split[1],
                            account_for_embedding_in_pipeline_split=False,
                            account_for_loss_in_pipeline_split=False,
                        )
                        try:
                            check(found, shape, cluster.ranks, cluster.gpus)
                        except UserError:
                            continue
                        yield found


def _pipeline_splits(layers: int, pp: int) -> list[tuple[int | None, int | None]]:
    """(first, last) numbers of layers: even, or the two outer stages shorter, which hold the embedding and the head."""
    if layers % pp == 0:
        return [(None, None)]
    if pp < 3:
        return [(layers - layers // 2, layers // 2)]
    for inner in range(math.ceil(layers / pp), math.ceil(layers / (pp - 2))):
        outer = layers - inner * (pp - 2)
        if outer >= 2:
            return [((outer + 1) // 2, outer // 2)]
    return []


def nearest_layouts(settings: RunSettings, shape: ModelShape, cluster: Cluster, count: int = 3) -> list[RunSettings]:
    """Layouts that work, those first whose sizes differ least in powers of two from the ones asked for."""

    def distance(other: RunSettings) -> float:
        keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        keys += ("expert_model_parallel_size",)
        return sum(abs(math.log2(getattr(other, k)) - math.log2(max(getattr(settings, k), 1))) for k in keys)

    return sorted(candidate_layouts(settings, shape, cluster), key=distance)[:count]
