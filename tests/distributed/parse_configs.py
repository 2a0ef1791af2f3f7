"""Parses run settings through the real arguments, for tests: python -m tests.distributed.parse_configs SPEC.

Everything but the process groups is done: flags, derived settings, layout rules against the model's config.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(spec_file: str) -> None:
    from megatron_bvpo.rehearsal import install

    install()
    from megatron_bvpo.training.pipeline import bvpo_main  # noqa: F401  (ms-swift's modules import in one order only)
    from megatron_bvpo.training.arguments import BvpoArguments, refuse_unsupported  # isort: skip
    from swift.utils import parse_args

    from megatron_bvpo.launching.flags import check_flags

    class Parsed(BvpoArguments):
        def _init_output_dir(self):
            self._check_layout()

        def _init_distributed(self):
            self._check_layout()
            refuse_unsupported(self)

    parsed = {}
    for run in json.loads(Path(spec_file).read_text()):
        os.environ.update(WORLD_SIZE=str(run["ranks"]), RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8")
        argv = []
        for key, value in run["values"].items():
            if key != "megatron":  # taken out by the route
                argv += [f"--{key}", *(str(value).split() if key == "target_modules" else [str(value)])]
        check_flags(BvpoArguments, argv)
        args, unknown = parse_args(Parsed, argv)
        assert not unknown, unknown
        parsed[run["name"]] = {"beta": args.beta, "rlhf_type": args.rlhf_type, "ranks": run["ranks"]}
    Path(spec_file).with_name("parsed.json").write_text(json.dumps(parsed))


if __name__ == "__main__":
    main(sys.argv[1])
