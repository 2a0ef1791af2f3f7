"""What the tests of the console scripts say to them and read of them."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OURS = "megatron_bvpo/cli.py"
TORCHRUN = ["NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]


def write_yaml(folder: Path, **keys) -> str:
    path = folder / "run.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    return str(path)


REHEARSE = {"BVPO_REHEARSAL": "1"}


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.rstrip().splitlines()[-1]
