"""Seconds and memory of saving and exporting a 235B adapter on one CPU process, without the model.

    python benchmarks/adapter_save.py [--layers 94] [--folder /tmp]

A synthetic LoRA adapter of Qwen3-235B-A22B-Thinking-2507 at the shipped configs' rank 16: its real names and shapes,
bf16, random values; 2.51 billion parameters (2.46 of them the experts'), and 3.30 billion as mcore-bridge writes them,
since gate and up share their A in Megatron and each has a copy in the file. It goes through the code that rank 0 runs
in a save: mcore-bridge's writer, setting the adapter aside, publication, peft's form. Saving and exporting are
processes of their own, so that their memory is their own. Left out is what needs the cluster: the gathering of the
factors from 32 ranks, and Megatron's own files, which each rank writes for itself.

Predicted before the first run: the writer 10 s, peft's form 60 s, most of them in the loop over 12,032 experts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NAME = "Qwen3-235B-A22B-Thinking-2507"
RANK = 16
GIB = 2**30


class Phases:
    """Seconds of each part, those of a core, and the most memory: of the process's own, and mapped from files."""

    def __init__(self):
        self.rows: list[tuple[str, float, float, float, float]] = []
        self._most = [0.0, 0.0]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            for i, key in enumerate(("RssAnon:", "RssFile:")):
                self._most[i] = max(self._most[i], int(text.split(key)[1].split()[0]) * 1024 / GIB)
            time.sleep(0.05)

    def part(self, name: str, work) -> None:
        self._most = [0.0, 0.0]
        start, used = time.monotonic(), time.process_time()
        work()
        self.rows.append((name, time.monotonic() - start, time.process_time() - used, *self._most))


def config_of(layers: int):
    from transformers import AutoConfig

    shape = json.loads((Path(__file__).parents[1] / "megatron_bvpo/planning/shapes" / f"{NAME}.json").read_text())
    return AutoConfig.for_model(**{**shape, "num_hidden_layers": layers})


def factors(config, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, shape) of every factor, as mcore-bridge names them."""
    h, f = config.hidden_size, config.moe_intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
    expert = {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}"
        modules = {f"{prefix}.self_attn.{name}": sizes for name, sizes in attention.items()}
        for e in range(config.num_experts):
            modules |= {f"{prefix}.mlp.experts.{e}.{name}": sizes for name, sizes in expert.items()}
        for name, (inputs, outputs) in modules.items():
            yield f"{name}.lora_A.weight", (RANK, inputs)
            yield f"{name}.lora_B.weight", (outputs, RANK)


def save(folder: Path, layers: int, told) -> None:
    """What rank 0 does with the gathered factors until the checkpoint is published."""
    import torch

    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    from mcore_bridge.utils.safetensors import StreamingSafetensorSaver
    from peft import LoraConfig

    from megatron_bvpo.host import checkpoint as ckpt
    from megatron_bvpo.host.peft_export import set_aside

    phases, config, checkpoint = Phases(), config_of(layers), folder / ckpt.STAGING / "checkpoint-1"
    torch.manual_seed(0)
    noise = torch.randn(4096 * RANK * 2).to(torch.bfloat16)
    kept: dict[str, torch.Tensor] = {}
    for name, shape in factors(config, layers):
        start = hash(name) % (noise.numel() - shape[0] * shape[1] + 1)
        if name.endswith("up_proj.lora_A.weight"):  # Megatron's fused first product has one A
            kept[name] = kept[name.replace("up_proj", "gate_proj")].clone()
        else:
            kept[name] = noise[start : start + shape[0] * shape[1]].view(shape).clone()
    files = sum(tensor.nbytes for tensor in kept.values())
    told.put(("size", len(kept), files / GIB))

    def write() -> None:
        saver = StreamingSafetensorSaver(save_dir=str(checkpoint), peft_format=True)
        while kept:
            name = next(iter(kept))
            saver.add_tensor(name, kept.pop(name))
        saver.finalize()

    phases.part("mcore-bridge's writer", write)
    modules = sorted({name.split(".")[-3] for name, _ in factors(config, 1)})
    LoraConfig(r=RANK, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM").save_pretrained(checkpoint)

    def publish() -> None:
        set_aside(checkpoint)
        ckpt.write_state(checkpoint, {"iteration": 1})
        ckpt.publish(checkpoint.parent, checkpoint.name)

    phases.part("setting aside and publishing", publish)
    for row in phases.rows:
        told.put(row)


def export(folder: Path, layers: int, told) -> None:
    """Peft's form, behind the publication."""
    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    from megatron_bvpo.host import peft_export

    phases, config = Phases(), config_of(layers)
    inner: dict[str, tuple[float, float]] = {}
    for name in ("_inject", "_fused_factors", "_put_in_place"):
        setattr(peft_export, name, _clocked(getattr(peft_export, name), name, inner))
    phases.part("peft's form, all of it", lambda: peft_export.write_peft_form(folder / "checkpoint-1", config))
    assert (folder / "checkpoint-1" / "adapter_config.json").is_file(), "no form was written"
    told.put(phases.rows[0])
    words = {"_inject": "naming by peft", "_fused_factors": "fusing the factors", "_put_in_place": "writing"}
    for name, seconds in inner.items():
        told.put((f"… of that {words[name]}", *seconds, None, None))


def _clocked(function, name: str, seconds: dict[str, tuple[float, float]]):
    def call(*args, **kwargs):
        start, used = time.monotonic(), time.process_time()
        found = function(*args, **kwargs)
        seconds[name] = (time.monotonic() - start, time.process_time() - used)
        return found

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--folder", default=None, help="where 12 GB of files go (default: the temporary one)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="adapter-save-", dir=args.folder))
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    try:
        for work in (save, export):
            process = context.Process(target=work, args=(folder, args.layers, told))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)
        print(f"| part ({args.layers} layers) | seconds | of a core | GiB of its own | GiB mapped |")
        print("|---|---|---|---|---|")
        while not told.empty():
            row = told.get()
            if row[0] == "size":
                print(f"{row[1]} tensors, {row[2]:.2f} GiB in mcore-bridge's form", file=sys.stderr)
                continue
            print("| " + " | ".join(x if isinstance(x, str) else "" if x is None else f"{x:.2f}" for x in row) + " |")
        for file in sorted((folder / "checkpoint-1").rglob("*.safetensors")):
            print(f"{file.relative_to(folder)}: {file.stat().st_size / GIB:.2f} GiB", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
