"""A killed run goes on exactly: bit for bit the numbers of the run that was never killed.

The numbers are the trainer's own, written as hexadecimal floats by `exact_recorder`, not the rounded ones
of logging.jsonl. Every run saves (and, with LoRA, merges) and evaluates on its way.
"""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_bvpo.host.checkpoint import is_whole
from tests.distributed.cells import CPU_FLAGS
from tests.distributed.forks import Run, zygotes

pytestmark = pytest.mark.slow

RECORDER = "tests.distributed.exact_recorder:record_exactly"
STEPS = 7
LORA = "--tuner_type lora --lora_rank 4 --lora_dropout 0.05"
BF16 = "--bf16 true --torch_dtype bfloat16"
EP2 = "--expert_model_parallel_size 2"  # and data-parallel 2: the experts have an optimizer of their own
OFFLOADED = "--optimizer_cpu_offload true --use_precision_aware_optimizer true --optimizer_offload_fraction 1"
OFFLOADED += " --dist_ckpt_optim_fully_reshardable true"
TP2 = "--tensor_model_parallel_size 2 --sequence_parallel true --expert_model_parallel_size 2"
KINDS = {
    "lora-float32-dp2": (2, LORA),
    "full-bf16-tp2": (2, f"--tuner_type full {BF16} {TP2}"),
    "lora-bf16-one-rank": (1, f"{LORA} {BF16}"),
    "full-float32-one-rank": (1, "--tuner_type full"),
    "full-bf16-offloaded": (2, f"--tuner_type full {BF16} {EP2} {OFFLOADED}"),
}


@dataclass
class Record:
    """One rank's lines of exact numbers, by what they tell."""

    steps: dict[int, dict] = field(default_factory=dict)
    evals: dict[int, dict] = field(default_factory=dict)
    saves: dict[int, dict] = field(default_factory=dict)
    end: dict | None = None


def read_records(run: Run) -> list[Record]:
    records = []
    for rank in range(len(run.codes)):
        record = Record()
        file = Path(f"{run.folder}.out", f"exact{rank}.jsonl")
        for line in map(json.loads, file.read_text().splitlines() if file.exists() else []):
            if "step" in line:
                record.steps[line["step"]] = line
            elif "eval" in line:
                record.evals[line["eval"]] = line
            elif "save" in line:
                record.saves[line["save"]] = line
            else:
                record.end = line
        records.append(record)
    return records


def argv(workshop, kind: str, more: str = "") -> list[str]:
    # 16 rows and 6 a step: the epoch ends in the middle of a step. Cosine: the rate is another at each step.
    # The highest loss is called the best one, so that the best checkpoint is older than the resumed one.
    flags = dict(zip(CPU_FLAGS[::2], CPU_FLAGS[1::2], strict=True))
    own = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        f"--val_dataset {workshop.held_out} --lr 1e-3 --lr_warmup_iters 2 --micro_batch_size 1 --global_batch_size 6 "
        f"--train_iters {STEPS} --logging_steps 1 --save_steps 2 --eval_steps 2 --max_length 512 --bvpo_alpha 0.3 "
        "--greater_is_better true "
        f"{KINDS[kind][1]} {more}"
    ).split()
    given = dict(zip(own[::2], own[1::2], strict=True))
    if given.get("--bf16") == "true":
        flags.pop("--torch_dtype")
    return [token for pair in (flags | given).items() for token in pair]


def resume_flag(kind: str) -> str:
    return "--mcore_adapter" if kind.startswith("lora") else "--mcore_model"


def start(workshop, folder: Path, kind: str, more: str = "", **hook_args) -> tuple[Run, list[Record]]:
    run = zygotes().run(folder, argv(workshop, kind, more), ranks=KINDS[kind][0], hook=RECORDER, hook_args=hook_args)
    return run, read_records(run)


def resume(workshop, folder: Path, kind: str, step: int, **hook_args) -> tuple[Run, list[Record]]:
    more = f"--finetune false {resume_flag(kind)} {folder}/checkpoint-{step}"
    return start(workshop, folder, kind, more, **hook_args)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole_runs(workshop, home) -> dict[str, list[Record]]:
    """The run that nobody killed, of each kind."""
    found = {}
    for kind in KINDS:
        run, records = start(workshop, home / f"{kind}-whole", kind)
        run.require_success()
        found[kind] = records
    return found


def assert_same(records: list[Record], whole: list[Record], first: int, last: int) -> None:
    """Losses, gradient norms, rates, evaluations and best metric from step `first` to `last`, on every rank."""
    for rank, (mine, reference) in enumerate(zip(records, whole, strict=True)):
        for step in range(first, last + 1):
            assert mine.steps[step] == reference.steps[step], f"rank {rank}, step {step}"
            if step in mine.evals:
                assert mine.evals[step] == reference.evals[step], f"rank {rank}, evaluation at {step}"
            if step in mine.saves:
                assert mine.saves[step]["best"] == reference.saves[step]["best"], f"rank {rank}, best at {step}"
    assert any(mine.steps[first]["metrics"] for mine in records), "no rank had a loss to compare"


def test_weights_that_are_loaded_into_an_offloaded_optimizer_stay(workshop, home, whole_runs):
    """The optimizer on the host copied the weights when it was made, before these were loaded."""
    kind, step = "full-bf16-offloaded", 6
    checkpoint = f"--mcore_model {home}/{kind}-whole/checkpoint-{step} --lr 1e-12 --lr_warmup_iters 0 --train_iters 2"
    run, records = start(workshop, home / f"{kind}-loaded", kind, checkpoint)
    run.require_success()
    for mine, reference in zip(records, whole_runs[kind], strict=True):
        assert mine.evals[2] | {"eval": step} == reference.evals[step] | {"eval": step}


def assert_killed(run: Run) -> None:
    assert set(run.codes) == {-signal.SIGKILL}, run.stderr[0][-2000:]


def last_checkpoint(folder: Path) -> str:
    """What `last-checkpoint` points at, which must be whole at any time."""
    link = folder / "last-checkpoint"
    assert is_whole(link)
    return link.resolve().name


@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_the_middle_of_a_step(workshop, home, whole_runs, kind):
    folder = home / kind
    run, killed = start(workshop, folder, kind, kill_in_step=5)
    assert_killed(run)
    assert_same(killed, whole_runs[kind], 1, 4)
    assert last_checkpoint(folder) == "checkpoint-4"

    run, resumed = resume(workshop, folder, kind, 2)
    run.require_success()
    assert min(resumed[0].steps) == 3, "the run did not go on where the checkpoint was"
    assert_same(resumed, whole_runs[kind], 3, STEPS)
    assert [r.end for r in resumed] == [r.end for r in whole_runs[kind]], "parameters or optimizer differ at the end"
    assert last_checkpoint(folder) == f"checkpoint-{STEPS}"


def test_every_rank_has_numbers_of_its_own(whole_runs):
    """Else the comparison above would not see one rank's dropout masks on another."""
    first, second = whole_runs["lora-float32-dp2"]
    assert first.end["optimizer"] != second.end["optimizer"]
    losses = [line["metrics"]["loss"] for line in first.steps.values()]
    assert len({str(loss) for loss in losses}) == STEPS - 1, "the first rate is 0, so two steps begin with ln 2"


def test_an_optimizer_on_the_host_takes_the_same_steps(whole_runs):
    """torch's AdamW on copies, against the stand-in for Transformer Engine's on two ranks: the same rows in bf16."""
    losses = {}
    for kind in ("full-bf16-offloaded", "full-bf16-tp2"):
        lines = whole_runs[kind][0].steps.values()
        losses[kind] = [float.fromhex(line["metrics"]["loss"][0]) for line in lines]
    fell = losses["full-bf16-tp2"][0] - losses["full-bf16-tp2"][-1]
    assert fell > 0.2
    assert losses["full-bf16-offloaded"] == pytest.approx(losses["full-bf16-tp2"], abs=0.02 * fell)


def test_an_optimizer_on_the_host_reads_no_state_that_forgets_its_step(workshop, home, whole_runs):
    """What counts is how the checkpoint was saved, not the flags of the run that reads it."""
    kind, saved = "full-bf16-tp2", home / "full-bf16-tp2-whole" / "checkpoint-4"
    more = f"--finetune false {resume_flag(kind)} {saved} {OFFLOADED}"
    run = zygotes().run(home / "on-the-host", argv(workshop, kind, more), ranks=2)
    assert run.codes == [2, 2]
    told = run.stderr[0].strip().splitlines()[-1]
    assert told.startswith(f"megatron-bvpo: error: {saved}/bvpo_state.json: --optimizer_cpu_offload: the optimizer")
    assert told.endswith("give up the optimizer state with --no_load_optim true")


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_saving_leave_the_weights_as_they_are(whole_runs, home, kind):
    for record in whole_runs[kind]:
        assert list(record.saves) == [2, 4, 6, STEPS]
        for line in record.saves.values():
            assert line["before"] == line["after"]
        if kind.startswith("lora"):
            assert len({line["after"][1] for line in record.saves.values()}) == 1, "the base weights moved"
    if kind.startswith("lora"):
        assert list((home / f"{kind}-whole" / "checkpoint-4-merged").glob("*.safetensors"))


# What is there of the save when the run is killed.
MOMENTS = {
    "lora-float32-dp2": {
        "the folder": "checkpoint-6",
        "Megatron's files": "checkpoint-6/iter_*/*.distcp",
        "merged weights": "checkpoint-6-merged/*.safetensors",
    },
    "full-bf16-tp2": {"weights": "checkpoint-6/*.safetensors"},
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_killed_in_the_middle_of_a_save(workshop, home, whole_runs, kind):
    folder = home / f"{kind}-saving"
    shutil.copytree(home / f"{kind}-whole", folder, symlinks=True)
    for step in (6, STEPS):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "last-checkpoint").unlink()
    (folder / "last-checkpoint").symlink_to("checkpoint-4")
    for moment, pattern in MOMENTS[kind].items():
        run, killed = resume(workshop, folder, kind, 4, kill_in_save=6, when=pattern)
        assert_killed(run)
        assert_same(killed, whole_runs[kind], 5, 6)
        assert (folder / ".saving" / "checkpoint-6").exists(), moment
        assert not (folder / "checkpoint-6").exists(), moment
        assert last_checkpoint(folder) == "checkpoint-4"

    half = folder / ".saving" / "checkpoint-6"
    more = f"--finetune false {resume_flag(kind)} {half}"
    run = zygotes().run(home / "refused", argv(workshop, kind, more))
    assert run.codes == [2]
    told = run.stderr[0].strip().splitlines()[-1]
    assert told == (
        f"megatron-bvpo: error: {resume_flag(kind)}: {half} has no bvpo_state.json: it is half-written, or no "
        f"checkpoint of BVPO; the newest whole checkpoint there is {folder}/checkpoint-4"
    )

    run, resumed = resume(workshop, folder, kind, 4)
    run.require_success()
    assert_same(resumed, whole_runs[kind], 5, STEPS)
    assert [r.end for r in resumed] == [r.end for r in whole_runs[kind]]
    assert last_checkpoint(folder) == f"checkpoint-{STEPS}" and not (folder / ".saving").exists()


def test_a_resumed_stream_skips_what_was_consumed(workshop, home):
    kind, folder = "lora-float32-dp2", home / "streamed"
    stream = "--streaming true --eval_iters 1"
    run, whole = start(workshop, folder, kind, stream)
    run.require_success()
    run, resumed = start(workshop, folder, kind, f"{stream} --finetune false --mcore_adapter {folder}/checkpoint-4")
    run.require_success()
    assert_same(resumed, whole, 5, STEPS)
    assert "Skipping" in run.text
