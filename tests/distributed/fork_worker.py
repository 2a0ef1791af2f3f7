"""The waiting process behind `forks.Zygotes`: loads the stack, then forks a child for each job on stdin."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO

READY = "ready"


def load_the_stack() -> None:
    from megatron_bvpo.rehearsal import install

    install()
    import swift.megatron.pipelines.train.rlhf  # noqa: F401  before the other modules of swift.megatron

    for module in (
        "megatron_bvpo.training.pipeline",
        "megatron_bvpo.training.trainer",
        "megatron_bvpo.cli",
        "megatron_bvpo.launching.flags",
        "swift.cli.main",
        "swift.cli._megatron.main",
        "swift.template",
        "swift.dataset",
        "swift.megatron.callbacks",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(module)


def prepare_to_fork() -> None:
    """Load the stack, and see that no thread would be lost in a child."""
    load_the_stack()
    gc.collect()
    gc.freeze()  # ms-swift collects often, and the children would go through all this each time
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    unsafe = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # that one knows about forks
    assert not unsafe and threading.active_count() == 1, f"forking with threads is not safe: {unsafe}"


def ready_for_jobs() -> TextIO:
    """Where answers go, which is the stdout of old; READY is already on it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    prepare_to_fork()
    print(READY, file=answers, flush=True)
    return answers


def main() -> None:
    answers = ready_for_jobs()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            run(job)
            return  # and through Python's own shutdown: logs are written by threads
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(job: dict) -> None:
    """In the child: become a rank (or the launching process) of the job's run."""
    os.setpgid(0, 0)  # so that a kill takes the child's own children along
    outputs = Path(job["outputs"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(outputs / f"{name}{job['rank']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    (outputs / f"pid{job['rank']}").write_text(str(os.getpid()))
    signal.alarm(job["timeout"])
    os.environ.update(job["env"])

    import swift.megatron.pipelines.train.sft as pipeline

    import megatron_bvpo.training.trainer as ours
    from megatron_bvpo import cli
    from tests.distributed.cell_worker import agree_on_port, map_in_this_process

    argv = ["--rlhf_type", "bvpo", *job["argv"]]
    if job["launcher"]:
        sys.argv = ["swift", "rlhf", *argv]
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the real one has not loaded what complains at the end of Python
    map_in_this_process()
    pipeline.plot_images = lambda *args: None  # dozens of images take longer than the training
    os.environ["MASTER_PORT"] = agree_on_port(outputs / "port")
    if job["hook"]:
        module, _, name = job["hook"].partition(":")
        hook = getattr(importlib.import_module(module), name)
        ours.BvpoTrainer = hook(ours.BvpoTrainer, Path(job["folder"]), **job["hook_args"])
    sys.argv = ["swift"]
    cli.run_rank(argv)


def kill_the_run(folder: Path) -> None:
    """SIGKILL for every rank of the run of this output folder, the caller's own last."""
    own = os.getpid()
    pids = [int(file.read_text()) for file in Path(f"{folder}.out").glob("pid*")]
    for pid in sorted(pids, key=lambda pid: pid == own):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
