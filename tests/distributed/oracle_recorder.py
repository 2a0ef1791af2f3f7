"""What an independent oracle must know of a BVPO run's first step: the adapter, the tokens, each pair's log-probs."""

from __future__ import annotations

import torch

from megatron_bvpo.data.batches import LAYOUT_KEY
from megatron_bvpo.objective.preference import PairLogps
from tests.distributed.hooks import around
from tests.distributed.recorders import exported_adapter, record_first_step


def record_for_oracle(base, folder, save: bool = False, lora_scale: float = 0.02):
    """The gradients of `record_first_step`, and with them in `recorded.pt`:

    adapter: LoRA tensors by peft name before the first update, float32 (empty for full tuning).
    sequences: (ids, labels) of every sequence of the step, in the order of `pairs`: chosen, then rejected.
    pairs: one dict a pair: stream, row, micro_batch, and its log-probs (float64) and token counts.
    moved_by_saving: parameters that a save (with its merge) left other than they were, bit for bit.
    """

    class OracleRecorder(record_first_step(base, folder, save=save, lora_scale=lora_scale)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.passes.losses, "of", self._keep_logps)

        def _take_global_batch(self, data_iterator):
            chunks = super()._take_global_batch(data_iterator)
            if "pairs" not in self.recorded:
                self.recorded |= {"pairs": [], "sequences": {}, "adapter": self._exported_adapter()}
                for number, batch in enumerate(chunks[0]):
                    self._record_tokens(number, batch)
            return chunks

        def save_checkpoint(self):
            before = {f"{i}.{n}": p.detach().clone() for i, n, p in self._named_parameters()}
            super().save_checkpoint()
            moved = [n for i, n, p in self._named_parameters() if not torch.equal(p, before[f"{i}.{n}"])]
            self.recorded["moved_by_saving"] = moved
            torch.save(self.recorded, folder / "recorded.pt")

        def _named_parameters(self):
            return [(i, n, p) for i, model in enumerate(self.unwrapped_models) for n, p in model.named_parameters()]

        def _exported_adapter(self):
            if self.args.tuner_type != "lora":
                return {}
            return exported_adapter(self)

        def _record_tokens(self, number: int, batch: dict) -> None:
            ids, labels = batch["input_ids"], batch["labels"]
            if self.args.padding_free:  # one row of tokens; positions begin anew with each sequence
                starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
                ends = [*starts[1:], ids.shape[1]]
                sequences = [(ids[0, a:b], labels[0, a:b]) for a, b in zip(starts, ends, strict=True)]
            else:
                sequences = list(zip(ids, labels, strict=True))
            layout = batch[LAYOUT_KEY]
            for stream in layout.streams:
                chosen, rejected = (sequences[part] for part in layout.slices(stream))
                for row, c, r in zip(layout.rows[stream], chosen, rejected, strict=True):
                    self.recorded["sequences"][stream, row] = (c, r)
                    self.recorded["pairs"].append({"stream": stream, "row": row, "micro_batch": number})

        def _keep_logps(self, stock, stream, responses, layout):
            logps_Q, ref_logps_Q, tokens_Q = responses.logps_Q, responses.ref_logps_Q, responses.tokens_Q
            if self.state.iteration == 0 and self.unwrapped_models[0].training:
                chosen, rejected = layout.slices(stream)
                for i, row in enumerate(layout.rows[stream]):
                    found = next(p for p in self.recorded["pairs"] if (p["stream"], p["row"]) == (stream, row))
                    found["logps"] = (logps_Q[chosen][i].item(), logps_Q[rejected][i].item())
                    found["tokens"] = (tokens_Q[chosen][i].item(), tokens_Q[rejected][i].item())
                    if ref_logps_Q is not None:
                        found["ref_logps"] = (ref_logps_Q[chosen][i].item(), ref_logps_Q[rejected][i].item())
            return stock(stream, responses, layout)

    return OracleRecorder


def pair_logps(pair: dict) -> PairLogps:
    """A recorded pair as the objective takes it."""
    values = [*pair["logps"], *pair["ref_logps"], *pair["tokens"]]
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values))
