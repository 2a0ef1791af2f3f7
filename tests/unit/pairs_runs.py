"""`bvpo pairs` in a test's folder, and folders for it."""

from __future__ import annotations

import json

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.pairing import pairs_picture
from tests.unit.sample_folders import answered, ask, write_folder


def pairs_command(folder, monkeypatch, capsys):
    """Runs the command in the test's folder: (exit code, rows by file, what it said, its error)."""
    monkeypatch.chdir(folder)
    draw = pairs_picture.draw

    def run(*argv, out="pairs.jsonl", picture=False):
        # A picture takes longer than all the rest.
        monkeypatch.setattr(pairs_picture, "draw", draw if picture else lambda *_: None)
        code = bvpo(["pairs", *map(str, argv), "--out", out])
        said = capsys.readouterr()
        rows = {p.name: [json.loads(line) for line in p.open()] for p in folder.glob("*.jsonl")}
        return code, rows, said.out, said.err.strip()

    return run


def small(folder, **more):
    """Two prompts: q1 has pairs in both modes, q2 in the empty one alone."""
    made = [answered("q1", n, n % 2 == 0, mode=m) for m in ("thinking", "empty") for n in range(4)]
    made += [answered("q2", n, True) for n in range(4)] + [answered("q2", n, n > 0, mode="empty") for n in range(2)]
    samples, judged = zip(*made, strict=True)
    return write_folder(folder, [ask("q1"), ask("q2")], list(samples), list(judged), **more)


def folder_of(tmp_path, *made, prompts=("q1",), **more):
    """The test's folder s, of samples with what a judge says of them."""
    samples, judged = zip(*made, strict=True)
    return write_folder(tmp_path / "s", [ask(name) for name in prompts], list(samples), list(judged), **more)
