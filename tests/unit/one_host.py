"""One host of a job, as far as its data stage goes: `python -m tests.unit.one_host ROWS MODEL`, with torchrun's
variables.

Prints one JSON object: rows that were encoded here, data files that were read here, and the rows in their order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main(rows: str, model: str) -> None:
    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    import torch.distributed as dist

    from megatron_bvpo.data import handover, measuring
    from megatron_bvpo.host.patches import apply_patches
    from tests.unit.data_runs import DataOnly, DataStage, TemplateSettings, make_bvpo_template, pipeline, tiny_template

    apply_patches()
    if int(os.environ["WORLD_SIZE"]) > 1:
        meeting = f"file://{os.environ['MEETING']}"
        dist.init_process_group("gloo", meeting, rank=int(os.environ["RANK"]), world_size=2)
    marks = Path(tempfile.mkdtemp())
    encode, read = measuring.MeasureRows.preprocess, handover.read_rows

    def counted(self, row):  # in processes of their own, too
        os.close(tempfile.mkstemp(prefix="row-", dir=marks)[0])
        return encode(self, row)

    def counted_file(path):
        (marks / "file").touch()
        return read(path)

    measuring.MeasureRows.preprocess, handover.read_rows = counted, counted_file
    template = tiny_template(model, 256)
    settings = TemplateSettings(pipeline.RowRules("strip", ("trace", "empty")), "<think>\n\n</think>\n\n")
    make_bvpo_template(template, settings)
    args = DataOnly(
        dataset=[rows],
        split_dataset_ratio=0.25,
        dataset_num_proc=2,
        load_from_cache_file=True,
        output_dir=str(marks),
    )
    train, held_out = DataStage(args, template)._prepare_dataset()
    print(
        "RESULT "
        + json.dumps(
            {
                "encoded": len(list(marks.glob("row-*"))),
                "files": len(list(marks.glob("file"))),
                "train": [train[i]["chosen_input_ids"] for i in range(len(train))],
                "held out": [held_out[i]["chosen_input_ids"] for i in range(len(held_out))],
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
