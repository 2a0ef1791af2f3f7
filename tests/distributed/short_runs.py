"""Rows and flags of a run of one step, and how a run ends that is refused."""

from __future__ import annotations

import json
import re

from tests.distributed.cells import CPU_FLAGS
from tests.distributed.forks import Run

GOOD = "<think>\nTwo and two.\n</think>\n\n4"
BAD = "<think>\nTwo and three.\n</think>\n\n5"


def row(chosen=GOOD, rejected=BAD, prompt="What is 2+2?", **more) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}]
    made = {"messages": messages, "rejected_response": rejected, **more}
    return {key: value for key, value in made.items() if value is not ...}


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def assert_told(run: Run, message: str) -> None:
    """The last thing on stderr is this one message (a pattern), and the exit code is 2."""
    assert run.codes == [2], run.text[-3000:]
    told = [line for line in run.stderr[0].splitlines() if line.strip()]
    assert re.fullmatch(f"megatron-bvpo: error: {message}", told[-1]), told[-1]
    assert run.text.count("megatron-bvpo: error:") == 1 and "Traceback" not in run.text


def flags(workshop, **given) -> list[str]:
    """Of one LoRA step on the tiny mixture; a flag that is given as None is left out."""
    values = {
        "model": workshop.moe,
        "model_type": "qwen3_moe",
        "template": "qwen3_thinking",
        "dataset": workshop.train,
        "tuner_type": "lora",
        "global_batch_size": 4,
        "train_iters": 1,
        "eval_iters": 0,
        "max_length": 512,
        "bvpo_alpha": 0.3,
        **{flag.removeprefix("--"): value for flag, value in zip(CPU_FLAGS[::2], CPU_FLAGS[1::2], strict=True)},
        **given,
    }
    return [token for name, value in values.items() if value is not None for token in (f"--{name}", str(value))]
