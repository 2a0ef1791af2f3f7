"""A trainer class that writes down every number of a run in full, and can kill the run at a chosen moment."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from tests.distributed.fork_worker import kill_the_run
from tests.distributed.hooks import around


def exact(value: Any) -> Any:
    """Numbers as text that loses no bit; tensors as lists of them."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def parameters(trainer, which: str = "all") -> dict[str, torch.Tensor]:
    """Parameters and buffers of this rank; `base`: without the adapters."""
    found = {}
    for i, model in enumerate(trainer.unwrapped_models):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if which == "all" or "lora_" not in name:
                found[f"{i}.{name}"] = tensor
    return found


def optimizer_tensors(trainer) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors: moments and, in bf16, the float32 copies of the parameters."""
    found: dict[str, torch.Tensor] = {}

    def visit(value, name):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{key if isinstance(key, (str, int)) else 'p'}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                visit(item, f"{name}.{i}")

    for i, part in enumerate(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])):
        visit([list(state.values()) for state in part.optimizer.state.values()], f"{i}.state")
        visit([group["params"] for group in part.optimizer.param_groups], f"{i}.params")
    return found


def random_states() -> dict[str, torch.Tensor]:
    """Where the dropout masks come from."""
    return {"torch": torch.get_rng_state(), **tensor_parallel.get_cuda_rng_tracker().get_states()}


def record_exactly(
    base,
    folder: Path,
    kill_in_step: int | None = None,
    kill_in_save: int | None = None,
    when: str = "",
    loss_scale: float | None = None,
):
    """Writes `<folder>.out/exact<rank>.jsonl`: a line for each step, evaluation, save, and the end.

    Args:
        kill_in_step: SIGKILL for all ranks before the second micro-batch of this step.
        kill_in_save: SIGKILL for all ranks during the save after this step, as soon as …
        when: … a path matches this pattern inside the staging folder.
        loss_scale: where fp16's begins, which is 2³² otherwise.
    """

    class Exact(base):
        def _write(self, **line) -> None:
            with Path(f"{folder}.out", f"exact{dist.get_rank()}.jsonl").open("a") as file:
                print(json.dumps(exact(line)), file=file, flush=True)

        def setup_model_training(self):
            super().setup_model_training()
            for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]) if loss_scale else ():
                part.grad_scaler._scale.fill_(loss_scale)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.passes, "forward", self._forward)

        def _forward(self, stock, *args):
            if kill_in_step == self.state.iteration + 1 and self.unwrapped_models[0].training:
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen == 2 and dist.get_rank() == 0:
                    kill_the_run(folder)
            return stock(*args)

        def train_step(self, train_data_iterator):
            before = {"parameters": fingerprint(parameters(self)), "random": fingerprint(random_states())}
            metrics, grad_norm, successful = super().train_step(train_data_iterator)
            self._write(
                step=self.state.iteration + 1,
                metrics=metrics[0] if metrics else {},
                grad_norm=grad_norm,
                lr=self._get_reported_learning_rate(),
                loss_scale=float(self.optimizer.get_loss_scale()),
                before=before,
            )
            return metrics, grad_norm, successful

        def evaluate(self, val_data_iterator):
            metrics = super().evaluate(val_data_iterator)
            changing = ("elapsed_time", "remaining_time", "memory(GiB)", "train_speed(s/it)", "iteration")
            self._write(eval=self.state.iteration, metrics={k: v for k, v in metrics.items() if k not in changing})
            return metrics

        def save_checkpoint(self):
            if kill_in_save == self.state.iteration and dist.get_rank() == 0:
                threading.Thread(target=kill_when, args=(folder, when), daemon=True).start()
            before = fingerprint(parameters(self)), fingerprint(parameters(self, "base"))
            super().save_checkpoint()
            after = fingerprint(parameters(self)), fingerprint(parameters(self, "base"))
            best = self.state.best_metric, self.state.best_global_step
            self._write(save=self.state.iteration, before=before, after=after, best=best)

        def finalize_training(self):
            super().finalize_training()
            self._write(
                end=self.state.iteration,
                parameters=fingerprint(parameters(self)),
                optimizer=fingerprint(optimizer_tensors(self)),
            )

    return Exact


def kill_when(folder: Path, pattern: str) -> None:
    staging = Path(folder) / ".saving"
    while not any(staging.glob(pattern)):
        time.sleep(0.0005)
    kill_the_run(folder)
