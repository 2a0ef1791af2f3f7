"""A trainer that keeps what policy and reference say of every row, and what it trains."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.distributed.hooks import around


def record_growth(base, folder, save: bool = True):
    """recorded.pt: `reference` and `policy`, (row, stream) → list of (iteration, log-probs of its pair); `trained`,
    for each rank the numbers of the layers with a parameter to train, None for those outside of layers; `moved`,
    (number of the layer, name) of all parameters that training has changed."""

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.heard = {"reference": {}, "policy": {}}
            around(self.passes.losses, "of", self._keep)
            self.before = {key: p.detach().clone() for key, p in numbered_parameters(self.unwrapped_models)}

        def save_checkpoint(self):
            if save:
                super().save_checkpoint()
            else:
                self.state.last_model_checkpoint = str(folder)

        def _keep(self, stock, stream, responses, layout):
            if not self.wrapped_models[0].training:  # held-out rows, which are numbered from 0, too
                return stock(stream, responses, layout)
            chosen, rejected = layout.slices(stream)
            for what, values in (("reference", responses.ref_logps_Q), ("policy", responses.logps_Q.detach())):
                pairs = torch.stack([values[chosen], values[rejected]], dim=1).clone()
                for row, pair in zip(layout.rows[stream], pairs, strict=True):
                    self.heard[what].setdefault((row, stream), []).append((self.state.iteration, pair))
            return stock(stream, responses, layout)

        def finalize_training(self):
            super().finalize_training()
            gathered: list = [None] * dist.get_world_size()
            after = dict(numbered_parameters(self.unwrapped_models))
            moved = {key for key, p in self.before.items() if not torch.equal(after[key], p)}
            dist.all_gather_object(gathered, (self.heard, moved, trained_layers(self.unwrapped_models)))
            if dist.get_rank() == 0:
                found = {"trained": [trained for *_, trained in gathered], "ref_models": len(self.ref_models)}
                found["moved"] = set().union(*(moved for _, moved, _ in gathered))
                for what in ("reference", "policy"):
                    found[what] = {key: values for heard, *_ in gathered for key, values in heard[what].items()}
                torch.save(found, folder / "recorded.pt")

    return Recorder


def trained_layers(models) -> set:
    return {number for (number, _), p in numbered_parameters(models) if p.requires_grad}


def numbered_parameters(models):
    """((number of the layer, name within it), parameter); None for what is outside of layers."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for model in models:
        inside = {}
        for layer in (m for m in model.modules() if isinstance(m, TransformerLayer)):
            inside |= {id(p): (layer.layer_number - 1, name) for name, p in layer.named_parameters()}
        for name, parameter in model.named_parameters():
            yield inside.get(id(parameter), (None, name)), parameter
