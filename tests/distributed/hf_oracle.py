"""The same mathematics written a second time: Hugging Face models in float64, plain autograd, texts by hand.

Nothing here comes from the project: rows become texts and tokens by the ChatML rules below, LoRA factors
are multiplied out into the weights (so that peft is not needed either), and gradients are autograd's.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

EMPTY_BLOCK = "<think>\n\n</think>\n\n"
STREAMS = ("trace", "empty")


@dataclass(frozen=True)
class Pair:
    """A row's pair as texts; `block` is the part of the responses that is given, and not scored."""

    question: str
    chosen: str
    rejected: str
    block: str = ""


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def pair_of(row: dict, stream: str) -> Pair:
    """The pair of a sample row: its responses, or its own answers without a trace, or those with it taken out."""
    question = row["messages"][0]["content"]
    if stream == "empty" and "empty_response" in row:
        return Pair(question, row["empty_response"], row["empty_rejected_response"], EMPTY_BLOCK)
    chosen, rejected = row["messages"][1]["content"], row["rejected_response"]
    if stream == "trace":
        return Pair(question, chosen, rejected)
    chosen, rejected = (text.split("</think>")[1].strip() for text in (chosen, rejected))
    return Pair(question, chosen, rejected, EMPTY_BLOCK)


def tokens(tokenizer, pair: Pair) -> list[tuple[Tensor, int]]:
    """(ids, number of tokens before the scored ones) of the chosen and of the rejected response."""
    prompt = f"<|im_start|>user\n{pair.question}<|im_end|>\n<|im_start|>assistant\n{pair.block}"
    given = tokenizer(prompt)["input_ids"]
    sequences = []
    for response in (pair.chosen, pair.rejected):
        ids = tokenizer(f"{prompt}{response}<|im_end|>\n")["input_ids"]
        assert ids[: len(given)] == given
        sequences.append((torch.tensor(ids), len(given)))
    return sequences


def response_logp(model, ids: Tensor, given: int, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Log-probability of ids[given:] after ids[:given], float64; with other `weights` where they are named."""
    inputs = {"input_ids": ids[None], "use_cache": False}
    output = model(**inputs) if weights is None else functional_call(model, weights, kwargs=inputs)
    logps = output.logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[1:, None])[given - 1 :].sum()


def mean_logps(model, folder: Path, rows: list[dict]) -> dict[str, float]:
    """Mean log-probs of `rows` under ms-swift's names, `empty/` before those of the empty stream."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    with torch.no_grad():
        for stream in STREAMS:
            pairs = [tokens(tokenizer, pair_of(row, stream)) for row in rows]
            for i, side in enumerate(("chosen", "rejected")):
                logps = torch.stack([response_logp(model, *pair[i]) for pair in pairs])
                found[f"{'empty/' if stream == 'empty' else ''}logps/{side}"] = logps.mean().item()
    return found


def load_model(folder: Path, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.eval()


class Oracle:
    """A policy and its reference, and the preference loss between them.

    Args:
        folder: the base model; it is the reference unless `reference` names another.
        adapter: LoRA tensors by peft name, one pair for each expert; None for full tuning.
        scale: what LoRA's product is multiplied with.
    """

    def __init__(self, folder: Path, adapter: dict[str, Tensor] | None = None, scale: float = 1.0, reference=None):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load_model(folder)
        self.reference = self.model if reference is None else load_model(reference)
        base = {name: param.detach() for name, param in self.model.named_parameters()}
        if adapter is None:
            self.leaves = {name: param.clone().requires_grad_() for name, param in base.items()}
            self.policy = self.leaves
        else:
            self.leaves = _leaves(adapter)
            self.policy = {**base, **_merged(base, self.leaves, adapter, scale)}

    def pair_logps(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log-probs of chosen and rejected by the policy, then by the reference."""
        sequences = tokens(self.tokenizer, pair)
        chosen, rejected = (response_logp(self.model, *s, weights=self.policy) for s in sequences)
        with torch.no_grad():
            ref_chosen, ref_rejected = (response_logp(self.reference, *s) for s in sequences)
        return chosen, rejected, ref_chosen, ref_rejected

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """d(loss)/d(leaf), by the name of the leaf."""
        return dict(zip(self.leaves, torch.autograd.grad(loss, list(self.leaves.values())), strict=True))


def dpo_loss(logps: tuple[Tensor, Tensor, Tensor, Tensor], beta: float = 0.1) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = logps
    return torch.log1p(torch.exp(-beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))


def shared_name(name: str) -> str:
    """Of tensors that Megatron has once, the first: q, k and v share their A, gate and up share theirs."""
    name = re.sub(r"\.(k|v)_proj\.lora_A", ".q_proj.lora_A", name)
    return re.sub(r"\.up_proj\.lora_A", ".gate_proj.lora_A", name)


def _leaves(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves: dict[str, Tensor] = {}
    for name in sorted(adapter, key=lambda name: name != shared_name(name)):  # the first of each group first
        tensor = adapter[name].double()
        if name == shared_name(name):
            leaves[name] = tensor.requires_grad_()
        else:
            assert torch.equal(tensor, leaves[shared_name(name)]), name
    return leaves


def _merged(base, leaves, adapter, scale: float) -> dict[str, Tensor]:
    """W + scale·B·A for each weight the adapter touches, by the model's own parameter names."""
    updates = {}
    for name in adapter:
        if ".lora_A." in name:
            factor_b = leaves[name.replace(".lora_A.", ".lora_B.")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[path] = scale * factor_b @ leaves[shared_name(name)]

    merged, experts = {}, defaultdict(dict)
    for path, update in updates.items():
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)", path)
        if expert is None:
            merged[f"{path}.weight"] = base[f"{path}.weight"] + update
        else:
            experts[expert[1]][int(expert[2]), expert[3]] = update
    for path, of in experts.items():
        numbers = range(len(of) // 3)
        gate_up = torch.stack([torch.cat([of[i, "gate_proj"], of[i, "up_proj"]]) for i in numbers])
        merged[f"{path}.gate_up_proj"] = base[f"{path}.gate_up_proj"] + gate_up
        merged[f"{path}.down_proj"] = base[f"{path}.down_proj"] + torch.stack([of[i, "down_proj"] for i in numbers])
    return merged
