"""The process of one group: `python -m benchmarks.first_gpu.worker SPEC.json` starts its ranks and waits for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.gpu.worker import die_with_the_driver


def main(spec_file: str) -> None:
    die_with_the_driver()
    spec = json.loads(Path(spec_file).read_text())
    from tests.distributed.cells import Cell, run_cells

    cells = [Cell(hook="benchmarks.first_gpu.recorder:record", **cell) for cell in spec["cells"]]
    run_cells(spec["ranks"], cells, Path(spec["folder"]), timeout=spec["timeout"], rehearsal=spec["rehearsal"])


if __name__ == "__main__":
    main(sys.argv[1])
