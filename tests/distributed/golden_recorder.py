"""A trainer class that keeps every number which a run logs, unrounded."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

# Of the clock and of the machine.
CHANGING = ("elapsed_time", "remaining_time", "memory(GiB)", "train_speed(s/it)", "iteration")


def record_logged(base, folder: Path):
    """`recorded.pt`: for each evaluation and step, in their order, names to numbers (what the last rank says)."""

    import megatron_bvpo.training.referencing as referencing

    class Logged(base):
        logged: list[dict[str, float]]

        def __init__(self, *args, **kwargs):
            referencing.FLUSH_STEPS = 1  # so that a second epoch reads the cache
            super().__init__(*args, **kwargs)

        def _keep(self, **line) -> None:
            self.logged = [*getattr(self, "logged", []), line]
            if dist.get_rank() == dist.get_world_size() - 1:
                torch.save(self.logged, folder / "recorded.pt")

        def train_step(self, train_data_iterator):
            metrics, grad_norm, successful = super().train_step(train_data_iterator)
            found = {name: (total / count).item() for name, (total, count) in (metrics[0] if metrics else {}).items()}
            self._keep(**found, grad_norm=float(grad_norm))
            return metrics, grad_norm, successful

        def evaluate(self, val_data_iterator):
            metrics = super().evaluate(val_data_iterator)
            self._keep(**{f"eval_{k}": float(v) for k, v in metrics.items() if k not in CHANGING})
            return metrics

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def _prepare_peft_model(self, models):
            from tests.distributed.recorders import fill_lora_b

            peft_models = super()._prepare_peft_model(models)
            if self.args.tuner_type == "lora":
                fill_lora_b(self)
            return peft_models

    return Logged
