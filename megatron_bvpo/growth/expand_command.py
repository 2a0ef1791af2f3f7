"""`bvpo expand`: a model with more layers that answers as before; on one machine, without ranks, GPUs or ms-swift."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

OUT = "OUT"


def add_command(commands) -> None:
    """Register `expand` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "expand",
        help="grow a model by layers that at first change nothing (OpT-DeUS)",
        description="Writes MODEL with new layers between neighbours to OUT. Each is the mean of its neighbours, "
        "brought to one order by optimal transport, and all that it adds to the residual stream is zero: the grown "
        "model is the old one. Qwen2, Qwen3 and their mixtures. Prints how to train the new layers alone.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors")
    parser.add_argument("out", metavar=OUT, help="a new folder")
    parser.add_argument(
        "--layers",
        required=True,
        metavar="WHERE",
        help="upper-half: in front of each layer of the upper half; or N,N,…: behind these old layers, counted from 0",
    )
    parser.add_argument(
        "--memory", type=_gib, default=32.0, metavar="GIB", help="how much of it may be taken (default: 32)"
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.export.new_folder import new_folder, require_free, require_room
    from megatron_bvpo.growth import expansion
    from megatron_bvpo.growth.transport import require_pot

    require_pot()
    out = Path(args.out).absolute()
    found = expansion.read_model(Path(args.model), args.layers, args.memory)
    require_free(out, OUT)
    require_room(out.parent, found.shards.bytes, OUT)
    for line in _what_it_takes(found):
        print(line, flush=True)
    with new_folder(out, OUT) as partial:
        expansion.write(found, partial, lambda line: print(line, flush=True))
    for line in _what_next(found, out):
        print(line)
    return 0


def _what_it_takes(found) -> list[str]:
    gib = 2**30
    new = sorted(found.new.values())
    return [
        f"{len(found.layers)} layers become {len(found.layers) + len(new)}; new are {', '.join(map(str, new))}",
        f"takes {found.memory / gib:.1f} GiB of memory and {found.shards.bytes / gib:.1f} GiB of disk, "
        f"in {len(found.shards.old) + len(new)} files",
    ]


def _what_next(found, out: Path) -> list[str]:
    return [
        f"written: {out}",
        "train the new layers alone, with the old model as the reference:",
        f"  --model {out} --tuner_type full --bvpo_new_layers_only true",
        "or these, and adapters on the old ones:",
        f"  --model {out} --tuner_type lora --bvpo_new_layers_only true --target_modules all-linear",
        f"what it costs: bvpo plan RUN.yaml --model {out} --set bvpo_new_layers_only=true",
    ]


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
