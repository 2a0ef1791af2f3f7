"""What is measured, in which order, and the seconds each part should take.

A **figure** is one line of results. Figures that share a process are a **job**. A **phase** is a list of jobs with
the seconds that are kept for it while the phases before it run; what a phase leaves over goes to the next ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PEERS = {  # as tables name them → function in peers.py, the package it needs; those that say most come first
    "plain torch": ("plain_torch", ""),
    "cut-cross-entropy": ("cut_cross_entropy", "cut_cross_entropy"),
    "verl fused linear CE": ("verl", "verl"),
    "Megatron fused (ms-swift default)": ("megatron_native", "megatron"),
    "Megatron unfused (ms-swift)": ("megatron_unfused", "megatron"),
    "chunks with recompute (as NeMo-RL)": ("chunks_with_recompute", ""),
    "Liger fused linear CE": ("liger", "liger_kernel"),
    "ours, torch": ("ours_torch", ""),
    "plain torch, compiled": ("plain_torch_compiled", ""),
    "torch linear_cross_entropy": ("torch_linear_cross_entropy", ""),
    "Liger scaled": ("liger_scaled", "cutlass"),
    "quack": ("quack", "quack"),
    "Transformer Engine": ("transformer_engine", "transformer_engine"),
}
NOT_CARRIED = {
    "cutlass": "on Hopper it takes nvidia-cutlass-dsl, whose libraries are 92 MB: more than can be carried",
    "quack": "its nvidia-cutlass-dsl libraries are 92 MB, more than can be carried to a bare machine",
    "transformer_engine": "it is built from source against the machine's torch, which takes longer than a lease",
}
LOGPROBS = "benchmarks.gpu.logprobs"
SETTINGS = {"no grad": 1, "frozen": 2, "trainable": 4}  # and the matrix products that each needs in our way
HIDDEN, VOCAB = 4096, 151_936  # Qwen3-235B-A22B; a quarter of the vocabulary is its shard under TP 4
TOKENS = 32_768
TILES = {
    # (tokens, vocabulary rows) of a tile. No grad stores no logits: blocks bound the partial sums alone.
    "no grad": [(4096, VOCAB), (16_384, VOCAB), (32_768, VOCAB)],
    # Whole waves of the second product, [tokens, 4096] in output tiles of 128 × 256 on 132 multiprocessors.
    "frozen": [(1024, VOCAB), (2048, VOCAB), (4224, VOCAB), (8448, VOCAB), (4224, 38_144)],
    "trainable": [(8192, 8192), (8448, 8448), (4224, 8448), (8448, 16_896)],
}
SHAPES = [  # of the fused product's output tiles; constants of kernels/fused_logprob.py
    {"STAGES": 3, "GROUP": 8},
    {"STAGES": 4, "GROUP": 8},
    {"STAGES": 3, "GROUP": 16},
    {"STAGES": 3, "GROUP": 4},
    {"STAGES": 3, "GROUP": 8, "TILE_TOKENS": 256, "TILE_ROWS": 128},
]


@dataclass(frozen=True)
class Figure:
    """`call` is module:function; it takes `args` and returns what the line holds.

    `seconds` is what it should take: it is not begun with less left. `patience` is added to twice that before it
    counts as hung.
    """

    key: str
    call: str
    args: dict
    seconds: float
    patience: float = 30.0

    @property
    def limit(self) -> float:
        """Seconds after which it counts as hung."""
        return 2 * self.seconds + self.patience


@dataclass(frozen=True)
class Job:
    """Figures of one process. `start` is what the process takes before the first; `wheels`: it needs what wheels.py
    installs; `needs`: nothing is started where this package is not found."""

    name: str
    figures: list[Figure]
    start: float = 8.0
    wheels: bool = False
    needs: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    jobs: list[Job]

    @property
    def figures(self) -> list[Figure]:
        return [figure for job in self.jobs for figure in job.figures]


def cell(key: str, peer: str, setting: str, n: int, hidden: int, vocab: int, **tiles) -> Figure:
    """About a dozen calls, each a quarter slower than its products at 750 TFLOP/s, and the inputs."""
    products = SETTINGS[setting] * 2 * n * hidden * vocab
    args = dict(peer=peer, setting=setting, n=n, hidden=hidden, vocab=vocab, tiles=tiles)
    seconds = 1.5 + 12 * products / 600e12
    return Figure(f"{key}/{n}/{vocab}/{setting}", f"{LOGPROBS}:measure", args, seconds)


def ceilings(key: str, n: int, hidden: int, vocabs: tuple[int, ...], block: int, tile: int, copied: int) -> Job:
    """The products at the shapes that the log-probs give them, and a copy."""
    shapes = {}  # name → m, k, n, dtype of the result, and whether the second factor is used transposed
    for vocab in vocabs:
        for out in ("bf16", "fp32"):
            shapes[f"logits {n} × {hidden} × {vocab}, {out}"] = (n, hidden, vocab, out, True)
        shapes[f"products {block} × {vocab} × {hidden}, fp32"] = (block, vocab, hidden, "fp32", False)
    shapes[f"tile {block} × {hidden} × {tile}, fp32"] = (block, hidden, tile, "fp32", True)
    figures = [
        Figure(f"{key}/{name}", f"{LOGPROBS}:product_rate", dict(m=m, k=k, n=n, out=out, transposed=transposed), 2)
        for name, (m, k, n, out, transposed) in shapes.items()
    ]
    return Job(key, [*figures, Figure(f"{key}/copy", f"{LOGPROBS}:copy_rate", {"count": copied}, 1)])


def whole_plan(tiny: bool) -> list[Phase]:
    """All phases in their order; `tiny` is the same at sizes that run anywhere."""
    n, hidden, vocabs = (24, 64, (1003, 250)) if tiny else (TOKENS, HIDDEN, (VOCAB, VOCAB // 4))
    other_n = (8, 40) if tiny else (4096, 131_072)
    tiles = {setting: [(8, 512), (16, 1003)] for setting in SETTINGS} if tiny else TILES
    sizes = (n, hidden, vocabs, *((8, 512, 2**16) if tiny else (1024, 8448, 2**32)))

    def cells(key: str, peer: str, tokens: tuple[int, ...], vocabs=vocabs) -> list[Figure]:
        return [cell(key, peer, s, m, hidden, v) for m in tokens for v in vocabs for s in SETTINGS]

    shapes = [
        cell(f"shape/{', '.join(f'{k} {v}' for k, v in shape.items())}", "ours_shaped", setting, n, hidden, v, **shape)
        for shape in (SHAPES[:2] if tiny else SHAPES)
        for v, setting in ((vocabs[0], "no grad"), (vocabs[0], "frozen"), (vocabs[1], "frozen"))
    ]
    swept = [
        cell(f"tiles/{b} × {t}", "ours", setting, n, hidden, vocabs[0], block_tokens=b, tile_vocab=t)
        for setting in SETTINGS
        for b, t in tiles[setting]
    ]
    peers = [
        Job(
            f"peer {peer}",
            cells(f"peer/{peer}", function, (n,), vocabs[:1] if tiny else vocabs),
            wheels=True,
            needs=package,
        )
        for peer, (function, package) in PEERS.items()
    ]
    tests = Figure("tests", "benchmarks.gpu.kernel_tests:run", {"tiny": tiny}, 55)
    both = [*cells("ours", "ours", (n,)), *cells("ours, logits stored", "ours_stored", (n,))]
    return [
        Phase("ceilings", 30, [ceilings("ceiling", *sizes)]),
        Phase("kernels", 60, [Job("kernel tests", [tests], start=0, wheels=True)]),
        Phase("ours", 45, [Job("ours", both)]),
        Phase("stack", 160, stack_jobs(tiny)),
        Phase("peers", 110, peers),
        Phase("sizes", 40, [Job("sizes", cells("ours", "ours", other_n))]),
        Phase("tiles", 40, [Job("tiles", swept)]),
        Phase("shapes", 30, [Job("shapes", shapes)]),
        Phase("ceilings again", 25, [ceilings("ceiling again", *sizes)]),
    ]


def stack_jobs(tiny: bool) -> list[Job]:
    """The whole stack in bf16. The proof that it runs at all comes first, with nothing compiled on the way."""
    quiet = {"BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "1"}
    resume = Figure("stack/resume", "benchmarks.gpu.stack:resume", {"tiny": tiny}, 75)
    step = Figure("stack/step", "benchmarks.gpu.stack:step", {"tiny": tiny}, 75)
    exact = {**quiet, "TORCH_COMPILE_DISABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return [
        Job("stack resume", [resume], start=0, wheels=True, env=exact),
        Job("stack step", [step], start=0, wheels=True, env=quiet),
    ]
