"""Chains of tiny real processes on the real Snakemake: what is skipped, what goes on, what is refused."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_bvpo.cluster.supervise import descendants
from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow import leftovers
from megatron_bvpo.workflow.chain import run_chain
from megatron_bvpo.workflow.records import Record, State
from megatron_bvpo.workflow.stage import StageRun
from megatron_bvpo.workflow.stages import FREE_PORT, Slurm, Stage, difference, in_order
from tests.unit.chains import Controller, counting, is_over, kill_all, numbers, wait_for


def shell(name: str, text: str, **more) -> Stage:
    return Stage(name, ("sh", "-c", text), **more)


def test_a_failure_stops_no_other_and_only_what_is_missing_is_done_again(tmp_path):
    out, mended = tmp_path / "out", tmp_path / "mended"
    stages = [
        shell("all", f"cat {tmp_path}/b >{tmp_path}/all", after=("eval/a", "eval/b")),
        shell("eval/b", f"echo eval >>{tmp_path}/b", after=("train/b",)),
        shell("eval/a", f"echo eval >>{tmp_path}/a", after=("train/a",)),
        shell("train/b", f"echo so it is; test -e {mended} || exit 3"),
        shell("train/a", f"echo train >>{tmp_path}/a"),
    ]
    said = Controller(stages, out).end(4)
    assert "failed: train/b: exit code 3: so it is; " in said and str(out / "stages/train/b/log.txt") in said
    assert "not reached: eval/b, which needs train/b\n" in said and "not reached: all, which needs eval/b\n" in said
    assert said.endswith("2 of 5 stages done; the same command goes on with what is missing.\n")
    assert (tmp_path / "a").read_text() == "train\neval\n" and not (tmp_path / "b").exists()
    told = json.loads((out / "stages/train/b/failed.json").read_text())
    assert told["code"] == 3 and told["last"][-1] == "so it is" and told["ended"] >= told["began"]

    mended.touch()
    said = Controller(stages, out).end(0)
    assert said.endswith("5 of 5 stages done.\n") and "train/a" not in said
    assert (tmp_path / "a").read_text() == "train\neval\n" and (tmp_path / "all").read_text() == "eval\n"
    assert not (out / "stages/train/b/failed.json").exists()


def test_what_a_stage_gets(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/proc")  # nobody can write there, as in an image without a home
    monkeypatch.setenv("BVPO_RUN_DIR", "/one/run/for/all")
    monkeypatch.setenv("XDG_CACHE_HOME", "/my/cache")
    script = "import os, sys; assert 'BVPO_RUN_DIR' not in os.environ and os.environ['XDG_CACHE_HOME'] == '/my/cache'; "
    script += "print(sys.prefix, os.environ['PORT'], os.environ['WORD'], open('made/in.txt').read())"
    stage = Stage("one", ("python", "-c", script), env={"PORT": FREE_PORT, "WORD": "w"}, files={"made/in.txt": "text"})
    whole = Stage("there", ("false",), whole="whole")
    (tmp_path / "whole").mkdir()
    out = tmp_path / "it's a folder"
    assert run_chain([stage, whole], out).exit_code == 0
    prefix, port, word, text = Record(out, "one").log.read_text().splitlines()[-1].split()
    assert (prefix, word, text) == (sys.prefix, "w", "text") and 1024 <= int(port) <= 65000
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("victim", ["controller", "stage", "command", "all"])
def test_killed_at_a_random_moment_it_goes_on(tmp_path, victim):
    """Six stages two at a time: some have ended, some run, some have not begun. A number that is written twice, or by
    two at once, ends a stage badly."""
    out = tmp_path / "out"
    most = [5, 5, 9, 5, 5, 5]
    stages = [counting(tmp_path, f"count/{i}", most[i], after=(f"count/{i - 2}",) * (i > 1)) for i in range(6)]
    controller = Controller(stages, out)
    first = wait_for(lambda: Record(out, "count/2").holder(), "the third stage")
    snakemake = os.getpgid(first)  # it leads the group of its stages
    wait_for(lambda: (tmp_path / "count-2").exists(), "its first number")
    time.sleep(0.1 * (os.getpid() % 7))
    everything = [controller.process.pid, *descendants(controller.process.pid)]
    if victim == "controller":
        controller.kill()
        wait_for(lambda: is_over(snakemake), "the end of its Snakemake", 20)
    elif victim == "all":
        kill_all(everything)
        controller.process.communicate()
    else:
        os.kill(first if victim == "stage" else descendants(first)[0], signal.SIGKILL)
        said = controller.end(4)
        why = "its process was killed" if victim == "stage" else "exit code 137"
        assert f"failed: count/2: {why}" in said and "not reached: count/4" in said
        assert Record(out, "count/5").done
    if victim == "stage":  # nobody would wait for its command, which saves and ends
        wait_for(lambda: "saved" in Record(out, "count/2").log.read_text(), "the end of the command")
    again = Controller(stages, out)
    if victim == "controller":  # the stage lives on
        wait_for(lambda: "still runs: waiting for it" in Record(out, "count/2").log.read_text(), "a word")
    (tmp_path / "go").touch()
    assert again.end(0).endswith("6 of 6 stages done.\n")
    assert [numbers(tmp_path, stage) for stage in stages] == [list(range(n)) for n in most]
    if victim == "controller":
        assert Record(out, "count/2").log.read_text().count("counted") == 1


def test_what_still_runs_comes_first(tmp_path):
    """What it uses is not free: another stage beside it would be one too many."""
    out = tmp_path / "out"
    stages = [counting(tmp_path, "a", 3), counting(tmp_path, "z", 9)]
    Controller(stages[1:], out, cores=1)
    wait_for(lambda: (tmp_path / "z").exists(), "the first number")
    # The lock of the first controller goes with it; of its stages nothing does.
    os.kill(int(json.loads((out / "lock").read_text())["pid"]), signal.SIGKILL)
    again = Controller(stages, out, cores=1)
    wait_for(lambda: "waiting for it" in Record(out, "z").log.read_text(), "a word")
    (tmp_path / "go").touch()
    again.end(0)
    (_, z_ended), (a_began, _) = Record(out, "z").times(), Record(out, "a").times()
    assert z_ended <= a_began


def test_what_a_killed_stage_left_is_ended_before_it_is_begun_again(tmp_path):
    """A process in a session of its own whose parents are all killed, as a rank's; it would write on."""
    out = tmp_path / "out"
    left = f"while sleep 0.1; do echo left >>{tmp_path}/file; done"
    text = f"test -e {tmp_path}/file && exit 0; setsid timeout 120 sh -c '{left}' & sleep 100"
    stages = [shell("one", text)]
    controller = Controller(stages, out)
    wait_for(lambda: (tmp_path / "file").exists(), "the first word")
    mine = leftovers.processes_of(out / "stages/one")
    (stray,) = [pid for pid in mine if os.getsid(pid) == pid and said_by(pid).startswith("timeout 120 ")]
    kept = {stray, *descendants(stray)}
    kill_all(pid for pid in [controller.process.pid, *descendants(controller.process.pid)] if pid not in kept)
    controller.process.communicate()
    assert leftovers.processes_of(out / "stages/one"), "nothing was left: this shows nothing"
    Controller(stages, out).end(0)
    assert "process(es) that an earlier start had left" in Record(out, "one").log.read_text()
    assert leftovers.processes_of(out / "stages/one") == []


def test_two_controllers(tmp_path):
    out = tmp_path / "out"
    stages = [counting(tmp_path, "one", 9)]
    first = Controller(stages, out)
    wait_for(lambda: (tmp_path / "one").exists(), "the first number")
    said = Controller(stages, out).end(2)
    assert f"{out}: --out: process {first.process.pid} on " in said and "Wait for it, or stop it." in said
    (tmp_path / "go").touch()
    first.end(0)


def test_stopped_in_order_and_gone_on_with(tmp_path):
    """Also a stage of an earlier controller, which was killed."""
    out = tmp_path / "out"
    stages = [counting(tmp_path, "old", 9), counting(tmp_path, "new", 9), counting(tmp_path, "last", after=("new",))]
    before = Controller(stages[:1], out)
    wait_for(lambda: (tmp_path / "old").exists(), "the first number")
    before.kill()
    controller = Controller(stages, out)
    wait_for(lambda: (tmp_path / "new").exists(), "the first number")
    controller.process.send_signal(signal.SIGINT)
    said = controller.end(128 + signal.SIGINT)
    assert "Stopping: " in said and "failed" not in said
    wait_for(lambda: Record(out, "old").state() != State.RUNNING, "the end of the old one")
    for name in ("old", "new"):
        assert Record(out, name).state() == State.STOPPED and "saved" in Record(out, name).log.read_text()
    assert Record(out, "last").state() == State.WAITING
    (tmp_path / "go").touch()
    Controller(stages, out).end(0)
    assert all(numbers(tmp_path, stage) == list(range(9)) for stage in stages[:2])


def test_a_second_signal_ends_what_does_not_end(tmp_path):
    stages = [shell("deaf", f"trap '' TERM; touch {tmp_path}/began; while true; do sleep 0.1; done")]
    controller = Controller(stages, tmp_path / "out")
    wait_for(lambda: (tmp_path / "began").exists(), "its beginning")
    controller.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert controller.process.poll() is None
    controller.process.send_signal(signal.SIGTERM)
    controller.end(143, 40)
    assert leftovers.processes_of(tmp_path / "out/stages/deaf") == []


def said_by(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def refused(stages: list[Stage], out: Path, **more) -> str:
    with pytest.raises(UserError) as error:
        run_chain(stages, out, **more)
    return str(error.value)


def test_a_stage_that_was_another_one_is_neither_kept_nor_written_over(tmp_path, capfd):
    out, rows = tmp_path / "out", tmp_path / "rows"
    rows.write_text("1\n")

    def stage(lr: str = "1e-5", code: int = 0, after: tuple[str, ...] = (), **more) -> Stage:
        return shell("train/a", f"exit {code}", files={str(out / "run.yaml"): f"lr: {lr}\nbeta: 0.1\n"}, after=after,
                     reads=(str(rows),), **more)  # fmt: skip

    assert run_chain([stage(code=2)], out).exit_code == 4
    (tmp_path / "checkpoint").touch()
    told = refused([stage(code=1, kept=str(tmp_path / "checkpoint"))], out)
    assert "exit 2 → command: exit 1" in told  # refused, but an earlier start has left something
    assert (
        run_chain([stage(code=1, kept=str(tmp_path / "none"))], out).exit_code == 4
    )  # refused before it began anything: may be asked otherwise
    told = refused([stage(lr="2e-5", code=1)], out)
    assert told.startswith(f"{out}/stages/train/a: is not what train/a was when it began: ")
    assert "run.yaml: lr: 1e-5 → run.yaml: lr: 2e-5" in told and "beta" not in told and "another --out" in told
    assert "exit 1 → command: exit 0" in refused([stage()], out)
    (out / "stages/train/a/failed.json").unlink()
    (out / "stages/train/a/begun.json").unlink()
    assert run_chain([stage()], out).exit_code == 0
    assert "nothing → WORD=1" in refused([stage(env={"WORD": "1"})], out)
    rows.write_text("2\n")
    assert f"{rows}: " in refused([stage()], out)
    rows.write_text("1\n")
    other = shell("rows", "true")
    assert "train/a is done, and rows, which it was made from, is not done any more" in refused(
        [other, stage(after=("rows",))], out
    )
    moved = tmp_path / "moved"
    out.rename(moved)
    again = shell("train/a", "exit 0", files={str(moved / "run.yaml"): "lr: 1e-5\nbeta: 0.1\n"}, reads=(str(rows),))
    assert run_chain([again], moved).states == {"train/a": State.DONE}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """alone(stages): each in this process, without Snakemake; the last one's exit code."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda stages: [StageRun(tmp_path / "out", stage, str(tmp_path)).run() for stage in stages][-1]


def test_what_is_half_done_does_not_outlive_what_it_was_made_from(tmp_path, alone):
    """A sampling whose model is trained anew meanwhile: it would go on with another one's answers."""
    out, samples = tmp_path / "out", tmp_path / "samples"
    # `kept` is not there: that does not matter here, as it has not been refused.
    sample = shell("sample", f"echo one >>{samples}; exit 1", after=("train",), kept=str(tmp_path / "none"))
    stages = [shell("train", "true"), sample]
    assert alone(stages) == 1
    shutil.rmtree(out / "stages/train")
    told = refused(stages, out)
    assert f"{out}/stages/sample: sample has begun, and train, which it was made from, is not done any more" in told
    assert "Remove that folder and what the stage has made, too." in told
    assert alone(stages[:1]) == 0
    assert "sample has begun, and train, which it was made from, was done again since" in refused(stages, out)
    shutil.rmtree(out / "stages/sample")
    samples.unlink()
    assert alone(stages[1:]) == 1 and run_chain(stages, out, dry_run=True).states["sample"] == State.FAILED

    # Where it still works, what is to be ended is named.
    with Record(out, "sample").take(None):
        Record(out, "sample").job_file.write_text("71")
        told = refused([stages[0], dataclasses.replace(sample, env={"A": "b"})], out)
    assert f"to do this stage again, end process {os.getpid()}, scancel 71, remove that folder" in told


def test_an_export_of_another_training_is_not_taken_for_this_one_s(tmp_path, alone):
    out, model = tmp_path / "out", tmp_path / "model"
    stages = [shell("train", "true"), shell("export", f"mkdir {model}", after=("train",), whole=str(model))]
    assert alone(stages) == 0
    (out / "stages/export/done.json").unlink()  # it was killed when all was done
    assert alone(stages) == 0
    shutil.rmtree(out / "stages")
    assert alone(stages) == 1 and not Record(out, "export").done
    (told,) = Record(out, "export").failure()["last"]
    assert told.endswith(f"error: {model} is older than what train made, and not of it: remove it")
    model.rmdir()
    assert alone(stages) == 0 and model.is_dir()


def test_a_refusal_does_not_forget_what_an_earlier_start_left(tmp_path, alone):
    """Half a sampling, then one start without an engine: another model would go on with its answers."""
    out, code = tmp_path / "out", tmp_path / "code"
    stage, other = (shell("sample", f"exit $(cat {code})", env={"MODEL": model}) for model in "ab")
    code.write_text("2")
    assert alone([stage]) == alone([other]) == alone([stage]) == 2
    run_chain([other], out, dry_run=True)
    code.write_text("137")
    assert alone([stage]) == 137
    code.write_text("2")
    assert alone([stage]) == 2
    assert "MODEL=a → MODEL=b" in refused([other], out)


def test_a_stage_whose_folder_was_removed_while_it_ran_says_nothing_of_the_next_one(tmp_path):
    out = tmp_path / "out"
    controller = Controller([counting(tmp_path, "one", 9)], out)
    wait_for(lambda: (tmp_path / "one").exists(), "the first number")
    shutil.rmtree(out / "stages")
    record = Record(out, "one")
    with record.take(None):
        (tmp_path / "go").touch()
        controller.process.wait(60)
    assert not record.done


def test_locks_as_nfs_has_them(tmp_path, monkeypatch):
    """There flock is a lock of fcntl's, which asks what the file is open for."""
    flock = fcntl.flock

    def of_nfs(file, how: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_WRONLY if how & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    record = Record(tmp_path, "one")
    assert record.state() == State.WAITING
    with record.take(None):
        assert record.state() == State.RUNNING and record.holder() == os.getpid()
    assert record.state() == State.WAITING

    def without(file, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(UserError, match="cannot be locked: No locks available"):
        record.state()


def test_a_preflight_alone_is_no_training(tmp_path, monkeypatch):
    monkeypatch.setenv("BVPO_PREFLIGHT", "only")
    submitted = Stage("train", ("run.yaml",), slurm=Slurm("slurm.sbatch"))
    assert "BVPO_PREFLIGHT: is only: " in refused([submitted], tmp_path / "out")


def test_what_cannot_be_run(tmp_path, monkeypatch, capfd):
    big = shell("big", "true", cores=4)
    assert "--cores: is 2, and big alone uses 4; give 4 or more" in refused([big], tmp_path / "out", cores=2)
    assert "ends in none of .dot" in refused([big], tmp_path / "out", graph=tmp_path / "graph.txt")
    assert "cannot be read: No such file" in refused([shell("a", "true", reads=("nowhere",))], tmp_path / "out")
    with pytest.raises(ValueError, match="a comes after b, which no stage is called"):
        in_order([shell("a", "true", after=("b",))])
    with pytest.raises(ValueError, match="wait for each other: "):
        in_order([shell("a", "true", after=("b",)), shell("b", "true", after=("a",))])
    for names in (["a", "a"], ["a b"], ["../a"], ["a/"]):
        with pytest.raises(ValueError, match="the same name|no stage's name"):
            in_order([shell(name, "true") for name in names])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'megatron-bvpo[workflow]'" in refused([big], tmp_path / "out")


def test_dry_run_and_graph_run_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    stages = [shell("train/a", f"touch {tmp_path}/ran"), shell("eval/a", "true", after=("train/a",), env={"A": "b c"})]
    assert run_chain(stages, out, dry_run=True).exit_code == 0
    assert capsys.readouterr().out == (
        f"train/a: not begun\n    sh -c 'touch {tmp_path}/ran'\neval/a: not begun\n    A='b c' sh -c true\n"
    )
    for name, edge in (("g.dot", '"train/a"'), ("g.mmd", "[train/a]")):
        run_chain(stages, out, graph=tmp_path / name)
        assert edge in (tmp_path / name).read_text()
    assert not out.exists() and not (tmp_path / "ran").exists()


def test_differences_are_short():
    before, now = [f"{i}" for i in range(20)], [f"{i}" if i % 3 else "x" for i in range(20)]
    assert difference(before, now) == "0 → x; 3 → x; 6 → x; 9 → x, and 3 more"
    assert difference(["a"], ["a", "b"]) == "nothing → b"
