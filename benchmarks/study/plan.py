"""What is run: sizes, arms, and the names of everything."""

from __future__ import annotations

from dataclasses import dataclass, replace

ARMS = {
    "trace": "--bvpo_alpha 1",
    "empty": "--bvpo_alpha 0",
    "half": "--bvpo_alpha .5",  # with as many empty pairs: DPO on both sets as one
    "auto": "",
}
# Beside them, at the small batch, for what the main arms leave open.
MORE_ARMS = {
    "fixed-.75": "--bvpo_alpha .75",
    "auto-every-step": "--bvpo_probe_interval 1",
    "mse-every-step": "--bvpo_probe_interval 1 --bvpo_criterion mse",
    "trace-twice": "--bvpo_alpha 1",  # as many pairs as α = .5 has, all of them with traces
    # Beside both pairs their chosen answers to imitate, as CHORD weighs them (2508.11408).
    "three-streams": "--bvpo_streams trace empty expert "
    "--bvpo_expert_loss sft_phi --bvpo_mu_peak .1 --bvpo_mu_valley .1",
    "right-answers": "--bvpo_streams expert",  # imitation of the chosen answers alone
}
# A second round, from what auto became at the large batch: on its pairs once more, or on fresh ones of its own answers.
SECOND_ROUND = ("again-stale", "again-fresh")
BETA = 1.0
OTHER_LAYOUT = "-tp2pp2"  # behind the name of a run that was made again on four ranks


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        seeds: of questions, answers and order.
        prompts: questions that a seed's pairs are made from, `samples` answers each and mode.
        heldout_prompts: the same for the pairs that drift is measured on.
        batches: rows of a step.
        steps: of every run.
        rates: learning rates that trace only is tried with.
        questions, repeats: of an evaluation; `choosing` questions choose the rate.
        folds: that the pairs are dealt into where b_t is measured.
    """

    seeds: int = 6
    prompts: int = 2400
    samples: int = 8
    heldout_prompts: int = 1200
    batches: tuple[int, ...] = (8, 64)
    steps: int = 30
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    questions: int = 1000
    repeats: int = 2
    choosing: int = 500
    folds: int = 16

    @property
    def of_seeds(self) -> range:
        """Megatron takes no seed 0."""
        return range(1, self.seeds + 1)


QUICK = Size(
    seeds=2,
    prompts=60,
    samples=6,
    heldout_prompts=40,
    batches=(4, 8),
    steps=4,
    rates=(1e-3, 3e-3),
    questions=40,
    repeats=1,
    choosing=40,
    folds=2,
)
# Seeds of what no run is judged by.
CHOOSING_SEED, HELDOUT_SEED = 100, 201


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm, flags: its name in the report, and what makes it that arm.
        batch: rows of a step.
        seed: of the pairs (their questions and answers) and of their order.
        after: the run whose adapter it begins with.
    """

    arm: str
    flags: str
    batch: int
    seed: int
    rate: float
    steps: int
    after: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm}-batch{self.batch}-rate{self.rate:g}-seed{self.seed}"


def untrained(seed: int) -> Run:
    """The model itself, as a run without steps."""
    return Run("untrained", "", 0, seed, 0.0, 0)


def main_runs(size: Size, rates: dict[int, float]) -> list[Run]:
    """Every arm, batch and seed; `rates` has the chosen one of each batch. Costly ones first."""
    return [
        Run(arm, flags, batch, seed, rates[batch], size.steps)
        for batch in sorted(size.batches, reverse=True)
        for seed in size.of_seeds
        for arm, flags in ARMS.items()
    ]


def more_runs(size: Size, rates: dict[int, float]) -> list[Run]:
    """The arms beside, at the smallest batch."""
    batch = min(size.batches)
    return [
        Run(arm, flags, batch * (2 if arm == "trace-twice" else 1), seed, rates[batch], size.steps)
        for seed in size.of_seeds
        for arm, flags in MORE_ARMS.items()
    ]


def second_rounds(size: Size, rates: dict[int, float]) -> list[Run]:
    """As many steps more, at the same rate and with an optimizer of their own."""
    first = [run for run in main_runs(size, rates) if run.arm == "auto" and run.batch == max(size.batches)]
    return [replace(run, arm=arm, after=run.name) for run in first for arm in SECOND_ROUND]


def rate_runs(size: Size) -> list[Run]:
    """Trace only, on pairs and questions of its own."""
    return [
        Run("trace", ARMS["trace"], batch, CHOOSING_SEED, rate, size.steps)
        for batch in sorted(size.batches, reverse=True)
        for rate in size.rates
    ]
