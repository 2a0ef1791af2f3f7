"""`python -m megatron_bvpo.rehearsal.reasoner.train --out FOLDER`: trains the small reasoner from nothing.

Writes `curves.csv` and `curves.png` as it goes, a checkpoint to go on from, and at the end the model's folder
`FOLDER/model` (bfloat16). What a step sees is a function of the seed and the step's number alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megatron_bvpo.rehearsal.reasoner.curves import write_curves
from megatron_bvpo.rehearsal.reasoner.evaluate import evaluate
from megatron_bvpo.rehearsal.reasoner.problems import problems
from megatron_bvpo.rehearsal.reasoner.sampling import Reasoner
from megatron_bvpo.rehearsal.reasoner.tokens import END, MAX_TOKENS, Row, encode_rows, read_tokenizer, write_tokenizer

PAD = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Settings that decide the numbers.

    Attributes:
        rows: of one batch; they are packed into `pack` tokens each.
        thinking_share: of the rows have a trace, the others an empty one.
        soften: the written head is divided by it: temperature 1 then samples as this temperature did before, so
            that easy problems go wrong now and then, too.
    """

    steps: int = 1500
    seed: int = 0
    rows: int = 40
    pack: int = 160
    thinking_share: float = 0.65
    learning_rate: float = 2e-3
    warm_up: int = 100
    cool_down: float = 0.3
    weight_decay: float = 0.05
    soften: float = 1.2
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    intermediate_size: int = 640


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """Random weights. Heads, layers and the embedding's 512 rows divide by TP 2 and PP 2."""
    torch.manual_seed(recipe.seed)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = Qwen3Config(
        vocab_size=MAX_TOKENS,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=32,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    return model


def batch_of(recipe: Recipe, step: int, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Packed rows: `input_ids`, `position_ids`, `labels` [packs, pack]; `mask` [packs, 1, pack, pack], within rows."""
    seed = recipe.seed * 1_000_003 + step
    rng = random.Random(seed)
    modes = ["thinking" if rng.random() < recipe.thinking_share else "empty" for _ in range(recipe.rows)]
    rows = encode_rows(tokenizer, list(zip(islice(problems(seed, "train"), recipe.rows), modes, strict=True)))
    packs: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        room = (pack for pack in packs if sum(len(other.ids) for other in pack) + len(row.ids) <= recipe.pack)
        pack = next(room, None)
        if pack is None:
            packs.append(pack := [])
        pack.append(row)
    shape = (_packs(recipe), recipe.pack)
    ids, positions, of_row = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    labels = torch.full(shape, -100)
    for i, pack in enumerate(packs[: shape[0]]):
        at = 0
        for number, row in enumerate(pack, start=1):
            end = at + len(row.ids)
            ids[i, at:end] = torch.tensor(row.ids)
            positions[i, at:end] = torch.arange(len(row.ids))
            of_row[i, at:end] = number
            # labels stand where their prediction is made
            labels[i, at + row.learn_from - 1 : end - 1] = ids[i, at + row.learn_from : end]
            at = end
    causal = torch.ones(recipe.pack, recipe.pack, dtype=torch.bool).tril()
    mask = (of_row[:, :, None] == of_row[:, None, :]) & causal
    return dict(input_ids=ids, position_ids=positions, labels=labels, mask=mask[:, None])


def _packs(recipe: Recipe) -> int:
    """A fixed number, so that every step has one shape: rows have 54 tokens on average; what does not fit is left."""
    return math.ceil(recipe.rows * 54 / recipe.pack)


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, and a straight line down to nothing over the last part."""
    rise = (step + 1) / recipe.warm_up
    fall = (recipe.steps - step) / (recipe.cool_down * recipe.steps)
    return recipe.learning_rate * min(1.0, rise, fall)


class Training:
    """Model, optimizer and what was measured; `save` and `go_on` keep them across runs."""

    def __init__(self, recipe: Recipe, folder: Path, *, compiled: bool):
        self.recipe, self.folder = recipe, folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").mkdir(exist_ok=True)
        write_tokenizer(folder / "model")
        self.tokenizer = read_tokenizer(folder / "model")
        self.model = new_model(recipe, self.tokenizer)
        self.forward = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        )
        self.step, self.wall, self.cpu, self.curve = 0, 0.0, 0.0, []

    def go_on(self) -> None:
        """Take up the checkpoint of the folder, if there is one. ValueError when it is of another recipe.

        The number of steps may differ until the rate falls.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, weights_only=True)
        now = asdict(self.recipe)
        if saved["step"] <= (1 - self.recipe.cool_down) * min(saved["recipe"]["steps"], self.recipe.steps):
            now["steps"] = saved["recipe"]["steps"]
        if saved["recipe"] != now:
            raise ValueError(f"{path} was made by another recipe: {saved['recipe']}; give another folder")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.wall, self.cpu, self.curve = (saved[key] for key in ("step", "wall", "cpu", "curve"))

    def save(self) -> None:
        saved = dict(recipe=asdict(self.recipe), model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        saved |= dict(step=self.step, wall=self.wall, cpu=self.cpu, curve=self.curve)
        unfinished = self.folder / "checkpoint.part"
        torch.save(saved, unfinished)
        os.replace(unfinished, self.folder / "checkpoint.pt")

    def run(self, until: int) -> float:
        """Train up to a step; return the mean loss."""
        losses = []
        self.model.train()
        while self.step < until:
            wall, cpu = time.monotonic(), time.process_time()
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.recipe, self.step)
            losses.append(self._one_step(batch_of(self.recipe, self.step, self.tokenizer)))
            self.step += 1
            self.wall += time.monotonic() - wall
            self.cpu += time.process_time() - cpu
        return sum(losses) / max(1, len(losses))

    def _one_step(self, batch: dict[str, torch.Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.forward(
                input_ids=batch["input_ids"],
                attention_mask=batch["mask"],
                position_ids=batch["position_ids"],
                use_cache=False,
            ).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def measure(self, n: int, loss: float) -> dict:
        """Accuracy on held-out problems now; appended to the curve."""
        self.model.eval()
        table = evaluate(Reasoner(self.model, self.tokenizer), n, seed=self.step)
        line = dict(step=self.step, minutes=self.wall / 60, cpu_minutes=self.cpu / 60, loss=loss, asked=n)
        line |= {f"{mode}_{family}": accuracy.share for (mode, family), accuracy in table.items()}
        self.curve.append(line)
        return line

    def write(self) -> None:
        """The curves (of the head as it was trained), and the model in bfloat16, its head softened."""
        write_curves(self.curve, self.folder)
        copy = Qwen3ForCausalLM(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        copy.lm_head.weight.data /= self.recipe.soften
        copy.generation_config = self.model.generation_config
        copy.to(torch.bfloat16).save_pretrained(self.folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eval_every", type=int, default=250)
    parser.add_argument("--eval_problems", type=int, default=256)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = vars(parser.parse_args())
    recipe = Recipe(**{name: args[name] for name in asdict(Recipe())})
    training = Training(recipe, args["out"], compiled=args["compile"])
    training.go_on()
    while training.step < recipe.steps:
        loss = training.run(min(recipe.steps, training.step + args["eval_every"]))
        line = training.measure(args["eval_problems"], loss)
        print(json.dumps({k: round(v, 3) for k, v in line.items()}), os.getloadavg(), flush=True)
        training.save()
        training.write()


if __name__ == "__main__":
    main()
