"""A run that was killed and is started again by the same command goes on, whatever kind of checkpoint it had written.

`launch/train.sh` itself is run once; for the other kinds (restart_kinds.py) the command is made by the functions that
`bvpo supervise` makes it with, and a rank runs it. Numbers are compared to the last bit (exact_recorder.py).
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cluster.launch_environment import swift_command
from megatron_bvpo.cluster.run_folder import reached, refuse_unresumable, resume_flags
from megatron_bvpo.cluster.supervise import descendants
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import read_run
from tests.cluster.small_run import losses
from tests.distributed.cells import CPU_FLAGS, ROOT
from tests.distributed.forks import Run, zygotes
from tests.distributed.restart_kinds import IN_CI, KINDS, MAY_MATTER, NO_MATTER, REFUSED
from tests.distributed.test_resume import RECORDER, Record, assert_killed, assert_same, read_records
from tests.unit.cluster_ports import free_pair

pytestmark = pytest.mark.slow


class Shop:
    """Runs of every kind, in folders of their own; a whole run is made once."""

    def __init__(self, workshop, folder: Path):
        self.workshop, self.folder = workshop, folder
        self.whole = functools.cache(self._whole)
        self.place = functools.cache(self._place)

    def flags(self, kind: str) -> dict[str, str]:
        """Eight rows and four a step: two steps an epoch."""
        workshop = self.workshop
        given = {
            **{flag.removeprefix("--"): value for flag, value in zip(CPU_FLAGS[::2], CPU_FLAGS[1::2], strict=True)},
            **{"model": workshop.moe, "model_type": "qwen3_moe", "template": "qwen3_thinking"},
            **{"dataset": f"{workshop.train}#8", "max_length": 512, "eval_iters": 0},
            **{"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.05, "merge_lora": "false"},
            **{"lr": 1e-3, "lr_warmup_iters": 1, "bvpo_alpha": 0.3, "micro_batch_size": 1, "global_batch_size": 4},
            **{"train_iters": KINDS[kind].steps, "save_steps": 2, "logging_steps": 1},
            **KINDS[kind].flags,
        }
        return {name: self.place(value) for name, value in given.items() if value is not None}

    def _place(self, value) -> str:
        """The folder that a word in capitals stands for."""
        workshop = self.workshop
        if value == "HELD_OUT":
            return str(workshop.held_out)
        if value == "START":
            return str(self.whole("lora")[0] / "checkpoint-2")
        if value == "FULL_START":
            return str(self.whole("full")[0] / "checkpoint-2")
        if value == "OTHER_MODEL":
            from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

            return str(make_tiny_model(workshop.folder / "moe-other", kind="moe", vocab="trimmed", seed=1))
        return str(value)

    def start(self, kind: str, folder: Path, **hook_args) -> tuple[Run, list[Record]]:
        """As `bvpo supervise` starts it: anew, or from what stands in the folder."""
        flags = [word for name, value in self.flags(kind).items() for word in (f"--{name}", *value.split())]
        flags = [f"{folder}-references" if word == "CACHE" else word for word in flags]
        run = read_run(flags)
        refuse_unresumable(run, {})
        command = swift_command(run, folder, resume_flags(run, folder))
        argv = command[command.index("rlhf") + 1 :]
        done = zygotes().run(folder, argv, hook=RECORDER, hook_args=hook_args)
        return done, read_records(done)

    def _whole(self, kind: str) -> tuple[Path, list[Record]]:
        folder = self.folder / f"{kind}-whole"
        run, records = self.start(kind, folder)
        run.require_success()
        assert sorted(records[0].steps) == list(range(1, KINDS[kind].steps + 1))
        return folder, records


@pytest.fixture(scope="module")
def shop(workshop, tmp_path_factory) -> Shop:
    return Shop(workshop, tmp_path_factory.mktemp("restarts"))


def pytest_generate_tests(metafunc):
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", KINDS if metafunc.config.getoption("--whole-matrix") else IN_CI)


def test_a_killed_run_of_each_kind_goes_on_exactly(shop, kind):
    _, whole = shop.whole(KINDS[kind].trains_as or kind)
    folder, last, steps = shop.folder / kind, KINDS[kind].last, KINDS[kind].steps
    run, killed = shop.start(kind, folder, kill_in_step=steps)
    assert_killed(run)
    assert_same(killed, whole, 1, steps - 1)
    assert reached(folder) == last

    run, restarted = shop.start(kind, folder)
    run.require_success()
    assert min(restarted[0].steps) == last + 1, "the run did not go on where the checkpoint was"
    assert_same(restarted, whole, last + 1, steps)
    assert restarted[0].end == whole[0].end, "parameters or optimizer differ at the end"
    assert reached(folder) == steps


def train_sh(config: Path, folder: Path) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("BVPO_", "SLURM_"))}
    env |= {"BVPO_REHEARSAL": "1", "BVPO_PREFLIGHT": "0", "BVPO_PYTHON_BIN": sys.executable, "OMP_NUM_THREADS": "1"}
    env |= {"BVPO_RUN_DIR": str(folder), "NPROC_PER_NODE": "1", "MASTER_PORT": str(free_pair())}
    with Path(f"{folder}.log").open("ab") as log:
        command = [str(ROOT / "launch" / "train.sh"), str(config)]
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def test_train_sh_itself_goes_on(shop):
    """Everything that train.sh has started is killed at once, as by a loss of power, when it has saved an epoch."""
    kind = "epochs"
    folder, config = shop.folder / "train-sh", shop.folder / "train-sh.yaml"
    config.write_text(yaml.safe_dump(shop.flags(kind)))
    process = train_sh(config, folder)
    deadline = time.monotonic() + 600
    while not (folder / "last-checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline, Path(f"{folder}.log").read_text()[-3000:]
        time.sleep(0.02)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert reached(folder) == KINDS[kind].last

    code = train_sh(config, folder).wait(timeout=600)
    said = Path(f"{folder}.log").read_text()
    assert code == 0, said[-3000:]
    assert f"going on from {folder}/checkpoint-{KINDS[kind].last}" in said and reached(folder) == KINDS[kind].steps
    assert losses(folder) == losses(shop.whole(KINDS[kind].trains_as)[0])


def test_every_field_that_may_matter_is_a_kind_s():
    """A new flag of ms-swift that speaks of checkpoints fails this until somebody has looked at it."""
    tables = {name for table in (REFUSED, NO_MATTER) for text in table.values() for name in text.split()}
    tried = {name for kind in KINDS.values() for name in kind.flags}
    may = {name for name in flag_names() if re.search(MAY_MATTER, name)}
    assert may - tried - tables == set()
    assert tables & tried == set() and tables <= may
