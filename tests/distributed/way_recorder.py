"""By which files a step goes from `train_step` to the loss: what a reader has to open, seen while it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.autograd.function
import torch.nn.modules.module

import megatron_bvpo

OURS = Path(megatron_bvpo.__file__).parent
IN_A_MODEL = {torch.nn.modules.module.__file__, torch.autograd.function.__file__}


class Way:
    """A context that notes each call from one file below `root` into another.

    Calls of other packages in between (Megatron's schedule) do not count, nor does anything inside of a model and its
    backward, nor the stand-ins for a GPU, through which every call of torch goes here. The way is what leads to, takes
    or gives a tensor that gradients flow through: these files, and every time that one of them is entered until the
    last such tensor has been made.
    """

    def __init__(self, root: Path = OURS):
        self.root = root
        self.calls: list[dict] = []
        self._open: dict[int, dict] = {}

    def __enter__(self) -> Way:
        self._start = sys._getframe(1)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)

    def _look(self, frame, event: str, result) -> None:
        if event == "call":
            self._enter(frame)
        elif event == "return" and (call := self._open.pop(id(frame), None)) is not None:
            call["carries"] = call["carries"] or carries(result)

    def _enter(self, frame) -> None:
        file = self._ours(frame)
        if file is None:
            return
        files, above = [], frame.f_back
        while above is not None and above is not self._start:
            if above.f_code.co_filename in IN_A_MODEL:
                return
            if (found := self._ours(above)) is not None:
                files.append(found)
            above = above.f_back
        if file in files[:1]:
            return
        code = frame.f_code
        taken = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        call = {"file": file, "function": code.co_name, "above": files, "carries": carries(taken)}
        self._open[id(frame)] = call
        self.calls.append(call)

    def _ours(self, frame) -> str | None:
        root, _, file = frame.f_code.co_filename.partition(f"{self.root}{os.sep}")
        return None if root or not file or file.startswith("rehearsal") else file

    def way(self) -> list[tuple[str, str]]:
        """(file, function) of each entry on the way, in their order."""
        carrying = [i for i, call in enumerate(self.calls) if call["carries"]]
        files = {file for i in carrying for file in (self.calls[i]["file"], *self.calls[i]["above"])}
        before = self.calls[: carrying[-1] + 1] if carrying else []
        return [(call["file"], call["function"]) for call in before if call["file"] in files]


def carries(value) -> bool:
    """Whether a gradient flows through a tensor in it."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).values())
    return isinstance(value, list | tuple) and any(map(carries, value))


def record_way(base, folder: Path, at_step: int = 2):
    """`way.json`: the way of the step `at_step`; the first asks the canaries' questions."""

    class Followed(base):
        def train_step(self, train_data_iterator):
            if self.state.iteration != at_step - 1:
                return super().train_step(train_data_iterator)
            with Way() as seen:
                found = super().train_step(train_data_iterator)
            (folder / "way.json").write_text(json.dumps(seen.way()))
            return found

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

    return Followed
