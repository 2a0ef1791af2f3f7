"""The tiny runs of the first minutes, and which of them must agree with which.

A **cell** is a run of the real pipeline on one **side**: `reference` (plain PyTorch stand-ins on one CPU rank) or
`device` (what is to be tested). Cells of a **group** share their processes. A **comparison** is a line of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.first_gpu.judge import BFLOAT16, FLOAT32

REFERENCE, DEVICE = "reference", "device"
ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "megatron_bvpo" / "rehearsal" / "stand_ins"
LAYOUTS = {  # ranks → layout; 8 ranks are two data-parallel replicas of 4
    1: "",
    **dict.fromkeys(
        (4, 8),
        "--tensor_model_parallel_size 2 --sequence_parallel true --pipeline_model_parallel_size 2 "
        "--expert_model_parallel_size 2",
    ),
}
EXPERTS = 8
RUN = (
    "--model_type qwen3_moe --template qwen3_thinking --lr 1e-4 --lr_decay_style constant --micro_batch_size 1 "
    "--global_batch_size 4 --logging_steps 1 --max_length 512 --eval_iters 0 --save_steps 1000 --check_model false "
    "--add_version false --report_to none --load_from_cache_file false --beta 0.1"
)
# Every fusion off, and what a rehearsal turns off besides: the run that all others are held against.
PLAIN = (
    "--gradient_accumulation_fusion false --masked_softmax_fusion false --bias_dropout_fusion false "
    "--bias_activation_fusion false --apply_rope_fusion false --moe_permute_fusion false "
    "--cross_entropy_loss_fusion false --recompute_granularity none --dataloader_num_workers 0 "
    "--dataloader_persistent_workers false --dataloader_pin_memory false"
)
FULL, LORA = "--tuner_type full", "--tuner_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0"
FIXED, PROBED = "--bvpo_alpha 0.3 --train_iters 2", "--bvpo_alpha auto --train_iters 4"
IN_32 = "--torch_dtype float32 --bf16 false --fp16 false"
IN_16 = "--torch_dtype bfloat16 --bf16 true"
TF32_OFF = {"NVIDIA_TF32_OVERRIDE": "0"}  # cuBLAS would round float32 factors to 10 bits


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: unique; what it left lies in a folder of this name.
        flags: behind those that every run has.
        side: reference or device.
        starve: half of the experts, with them a rank under expert parallelism, get no token.
        save: it writes checkpoints.
        goes_on_from: name of the cell from whose checkpoint of step 2 it goes on.
        seconds: what it may take on a GPU; the limit is more generous (run.py).
        stand_ins: what the rehearsal's stand-ins must have for it, as a path below them; "" if nothing.
    """

    name: str
    flags: str
    side: str = DEVICE
    starve: bool = False
    save: bool = False
    goes_on_from: str = ""
    seconds: float = 12.0
    stand_ins: str = ""


@dataclass(frozen=True)
class Group:
    """Cells of the same processes. `start`: seconds until the first of them begins; `env`: theirs alone."""

    name: str
    cells: tuple[Cell, ...]
    start: float = 40.0
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """`cell` must equal `against`.

    Attributes:
        key: names the line.
        dtype: judge.FLOAT32 or BFLOAT16, which has the bounds.
        means: what a difference means.
        remedy: what to do about it.
        kind: `numbers` (log-probs, losses, gradient norms), `resume` (steps 3 and 4), or `starved`.
    """

    key: str
    cell: str
    against: str
    dtype: str
    means: str
    remedy: str
    kind: str = "numbers"


def groups(gpu: bool) -> list[Group]:
    """All cells; `gpu` False: stand-ins on both sides."""
    # Transformer Engine's flash and fused attention take no float32; with its unfused one ms-swift pads rows.
    attention_32 = "--attention_backend unfused --padding_free false"
    flash, device = "--attention_backend flash", "" if gpu else "--ddp_backend gloo"
    cpu = f"--ddp_backend gloo {flash}"

    def on(name: str, flags: str, **more) -> Cell:
        return Cell(name, f"{PLAIN} {flags} {device}", **more)

    def reference(name: str, flags: str, **more) -> Cell:
        return Cell(name, f"{PLAIN} {flags} {cpu}", side=REFERENCE, **more)

    plain = f"{FULL} {FIXED} {IN_16} {flash}"
    fusions = [on(f"fusion {name}", f"{plain} {flags}", stand_ins=needs) for name, (flags, needs) in FUSIONS.items()]
    # Each in a process of its own: Megatron chooses by variables, and stops where an earlier choice is still set.
    kinds = [
        Group(f"attention {kind}", (on(f"attention {kind}", f"{plain} --attention_backend {kind}"),))
        for kind in (ATTENTION if gpu else ())
    ]
    return [
        Group(
            "reference",
            (
                reference("reference float32", f"{FULL} {FIXED} {IN_32}"),
                reference("reference bf16", f"{FULL} {FIXED} {IN_16}"),
                reference("reference LoRA", f"{LORA} {FIXED} {IN_16}"),
                reference("reference starved", f"{FULL} {FIXED} {IN_16}", starve=True),
            ),
        ),
        Group("float32", (on("float32", f"{FULL} {FIXED} {IN_32} {attention_32}"),), env=TF32_OFF),
        Group("bf16", (on("bf16", plain), on("LoRA", f"{LORA} {FIXED} {IN_16} {flash}"))),
        Group("starved", (on("starved", plain, starve=True),)),
        Group(
            "resume",
            (
                on("whole", f"{LORA} {PROBED} {IN_16} {flash} --save_steps 2", save=True, seconds=30),
                on("resumed", f"{LORA} {PROBED} {IN_16} {flash}", goes_on_from="whole", seconds=30),
            ),
        ),
        *kinds,
        Group("fusions", tuple(fusions)),
    ]


ATTENTION = ("fused", "auto")
FUSIONS = {  # name → flags, and what the stand-ins must have to run it on a CPU
    "gradient accumulation": ("--gradient_accumulation_fusion true", "apex"),
    "MoE permutation": ("--moe_permute_fusion true", "apex"),  # came with it
    "masked softmax": ("--masked_softmax_fusion true", ""),
    "bias and dropout": ("--bias_dropout_fusion true", ""),
    "bias and activation": ("--bias_activation_fusion true", ""),
    "cross-entropy": ("--bvpo_logp_impl te --cross_entropy_loss_fusion true", ""),
    "whole logits": ("--bvpo_logp_impl te", ""),
    "full recompute": ("--recompute_granularity full --recompute_method uniform --recompute_num_layers 1", ""),
    "all as shipped": (
        "--gradient_accumulation_fusion true --moe_permute_fusion true --masked_softmax_fusion true "
        "--bias_dropout_fusion true --bias_activation_fusion true --recompute_granularity full "
        "--recompute_method uniform --recompute_num_layers 1 --dataloader_num_workers 2 --dataloader_pin_memory true",
        "apex",
    ),
}
_STACK = "run %test of the image (apptainer test --nv IMAGE), compare `bvpo doctor --report` with docs/versions.md"


def comparisons(gpu: bool) -> list[Comparison]:
    made = [
        Comparison(
            "float32 equals the stand-ins", "float32", "reference float32", FLOAT32,
            "the layout, a collective, or Transformer Engine's own mathematics differs from plain PyTorch's",
            f"try one GPU (--ranks 1): if that passes it is the layout, then TP, PP and EP alone; else {_STACK}",
        ),
        Comparison(
            "bf16 equals the stand-ins", "bf16", "reference bf16", BFLOAT16,
            "if float32 passes: flash attention or a bf16 product rounds otherwise than it should",
            "look at `attention fused`: where that differs from flash by as much, it is the attention",
        ),
        Comparison(
            "LoRA equals the stand-ins", "LoRA", "reference LoRA", BFLOAT16,
            "if bf16 passes: adapters start otherwise, are not disabled for the reference, or are reduced wrongly",
            "compare peft's and mcore-bridge's versions with docs/versions.md; do not train LoRA before it passes",
        ),
        Comparison(
            "an expert rank without tokens", "starved", "reference starved", BFLOAT16,
            "a grouped product over no rows fails, hangs or leaves wrong gradients",
            "if it hung: Transformer Engine 3019, Megatron-LM 4851; take another version, or --moe_grouped_gemm false",
            kind="starved",
        ),
        Comparison(
            "a resumed run goes on", "resumed", "whole", BFLOAT16,
            "a checkpoint of this stack loses something, or kernels do not repeat themselves",
            "a few bf16 roundings are kernels (--deterministic_mode true settles it); more is not: do not resume runs",
            kind="resume",
        ),
    ]  # fmt: skip
    for name in FUSIONS:
        made.append(
            Comparison(
                f"fusion {name}",
                f"fusion {name}",
                "bf16",
                BFLOAT16,
                f"`{FUSIONS[name][0]}` changes what is computed, not only how fast",
                "train without it (the flag's opposite in the YAML) and report it",
            )  # fmt: skip
        )
    for kind in ATTENTION if gpu else ():
        made.append(
            Comparison(
                f"attention {kind} equals flash",
                f"attention {kind}",
                "bf16",
                BFLOAT16,
                "cuDNN's fused attention and flash attention disagree on packed rows",
                "keep attention_backend: flash, and report cuDNN's version",
            )  # fmt: skip
        )
    return made


def rehearsed(cell: Cell) -> bool:
    """Whether the stand-ins have what the cell needs."""
    return not cell.stand_ins or (STAND_INS / cell.stand_ins).exists()
