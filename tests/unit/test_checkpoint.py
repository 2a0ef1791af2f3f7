"""Checkpoints on disk: killed after any one file operation, a save leaves whole checkpoints and nothing else.

A forked child does what a save does with files and kills itself (SIGKILL) before its n-th operation, for
every n. What is left is then looked at as a resuming run would.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.host import checkpoint as ckpt

LINK = "last-checkpoint"


def fill(folder: Path, content: str) -> None:
    """The files of a checkpoint, or of merged weights, as far as they matter here."""
    (folder / "iter_0000001").mkdir(parents=True)
    for name in ("model.safetensors", "args.json", "iter_0000001/0_0.distcp"):
        (folder / name).write_text(content)


def save(output_dir: Path, step: int, content: str) -> None:
    """A save as the trainer orders it."""
    staging = ckpt.open_staging(output_dir)
    name = f"checkpoint-{step}"
    fill(staging / name, content)
    fill(staging / f"{name}-merged", content)
    ckpt.write_state(staging / name, {"content": content})
    ckpt.publish(staging, name)


OPERATIONS = [
    (os, ("rename", "replace", "unlink", "remove", "rmdir", "symlink", "mkdir")),
    (Path, ("write_text", "unlink", "mkdir")),
]


def killed_at(n: int, work) -> bool:
    """Run `work` in a fork that dies before its n-th file operation; False where it has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        code = 1
        try:
            for owner, names in OPERATIONS:
                for name in names:
                    setattr(owner, name, counted(getattr(owner, name)))
            # The fast way of rmtree works on file descriptors; the plain one can be counted as well.
            shutil._use_fd_functions = False
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child failed before operation {n}"
    return code != 0


def check(output_dir: Path) -> None:
    """Whatever counts as whole has all its files, from one save, and `last-checkpoint` is whole."""
    whole = ckpt.whole_checkpoints(output_dir)
    for folder in whole:
        content = ckpt.read_state(folder)["content"]
        files = [folder / name for name in ("model.safetensors", "args.json", "iter_0000001/0_0.distcp")]
        assert [file.read_text() for file in files] == [content] * 3
    assert whole and (output_dir / LINK).resolve() in whole


CASES = {
    "the first save after another run's": ((2,), lambda out: save(out, 4, "new")),
    "a save again": ((2, 4), lambda out: save(out, 4, "new")),
    "rotation": ((2, 4, 6), lambda out: ckpt.rotate([f"{out}/checkpoint-{step}" for step in (2, 4, 6)], 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_before_any_file_operation(case, tmp_path):
    steps, work = CASES[case]
    n, killed = 0, True
    while killed:
        n += 1
        out = tmp_path / str(n)
        out.mkdir()
        (out / "args.json").write_text("{}")
        for step in steps:
            save(out, step, "old")
        killed = killed_at(n, lambda out=out: work(out))
        check(out)
        # The resumed run: it may start, saves again, and leaves no trace of the accident.
        ckpt.require_whole_checkpoint(str(out / LINK), flag="--mcore_adapter")
        save(out, 4, "newer")
        check(out)
        assert ckpt.read_state(out / LINK)["content"] == "newer"
        allowed = re.compile(r"args\.json|last-checkpoint|checkpoint-\d+(-merged)?")
        assert all(allowed.fullmatch(path.name) for path in out.iterdir()), sorted(p.name for p in out.iterdir())
    assert n > 8, "the operations were not counted"


def test_the_only_checkpoint_is_put_back_when_its_replacement_was_cut_short(tmp_path):
    save(tmp_path, 4, "old")
    os.rename(tmp_path / "checkpoint-4", tmp_path / f"checkpoint-4{ckpt.REPLACED}")
    ckpt.require_whole_checkpoint(str(tmp_path / LINK), flag="--mcore_adapter")
    check(tmp_path)


def test_a_half_written_checkpoint_is_refused_with_the_newest_whole_one(tmp_path):
    save(tmp_path, 9, "old")
    save(tmp_path, 10, "old")
    fill(tmp_path / "checkpoint-12", "half")
    told = f"checkpoint-12 has no bvpo_state.json: .*; the newest whole checkpoint there is {tmp_path}/checkpoint-10$"
    with pytest.raises(UserError, match=told):
        ckpt.require_whole_checkpoint(str(tmp_path / "checkpoint-12"), flag="--mcore_model")
    staged = ckpt.open_staging(tmp_path) / "checkpoint-12"
    fill(staged, "half")
    with pytest.raises(UserError, match=told):
        ckpt.require_whole_checkpoint(str(staged), flag="--mcore_model")
    with pytest.raises(UserError, match=r"there is no checkpoint .*checkpoint-14; the newest whole .*-10$"):
        ckpt.require_whole_checkpoint(str(tmp_path / "checkpoint-14"), flag="--mcore_model")
    with pytest.raises(UserError, match="no whole checkpoint is beside it"):
        ckpt.require_whole_checkpoint(str(tmp_path / "none" / "checkpoint-1"), flag="--mcore_model")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"format": 99}', "format 99; this version reads format 1"),
        ('{"iteration": 4', "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_a_state_file_that_cannot_be_used(content, told, tmp_path):
    (tmp_path / ckpt.STATE_FILE).write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        ckpt.read_state(tmp_path)
    assert caught.value.file == str(tmp_path / ckpt.STATE_FILE)


def test_rotation_keeps_the_last_ones(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, "old")
    ckpt.rotate([f"{tmp_path}/checkpoint-{step}" for step in (2, 6, 8, 4)], limit=2)  # the best one comes last
    assert [path.name for path in ckpt.whole_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    assert not (tmp_path / "checkpoint-6-merged").exists()
    ckpt.rotate([f"{tmp_path}/checkpoint-{step}" for step in (4, 8)], limit=5)
    assert len(ckpt.whole_checkpoints(tmp_path)) == 2


def test_a_merge_that_a_node_cannot_hold_is_told():
    gib = 2**30
    assert ckpt.merge_needs_more(7 * gib, 8, 100 * gib) is None
    assert ckpt.merge_needs_more(59 * gib, 8, 400 * gib) == "472.0 GiB for 8 ranks, 400.0 GiB are available"


def test_an_exported_form_knows_the_checkpoint_it_was_saved_with(tmp_path):
    save(tmp_path, 3, "whole")
    home = tmp_path / "checkpoint-3"
    (home / "vllm").mkdir()
    for exported in (home, home / "vllm", tmp_path / "checkpoint-3-merged", tmp_path / LINK):
        assert ckpt.checkpoint_of(exported) == home
    (tmp_path / "checkpoint-3" / "other").mkdir()
    (tmp_path / "elsewhere" / "vllm").mkdir(parents=True)
    for foreign in (home / "other", tmp_path, tmp_path / "elsewhere" / "vllm", "Qwen/Qwen3-30B-A3B-Thinking-2507"):
        assert ckpt.checkpoint_of(foreign) is None
