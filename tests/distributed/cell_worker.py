"""The process behind `run_cells`: one rank, many runs."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path


def main(spec_file: str) -> None:
    if os.environ["BVPO_REHEARSAL"] == "1":  # has no effect in a child of the nursery, which did it
        from megatron_bvpo.rehearsal import install

        install()
    if backend := os.environ.get("BVPO_TEST_COMPILE"):
        compile_with(backend)
    map_in_this_process()
    without_plots()
    spec = json.loads(Path(spec_file).read_text())
    for i, cell in enumerate(spec["cells"]):
        os.environ["MASTER_PORT"] = agree_on_port(Path(spec["folder"]) / f"port{spec['lane']}_{i}")
        folder = Path(spec["folder"]) / cell["name"]
        print(f"===== cell {cell['name']}", flush=True)
        try:
            run_cell(cell, folder)
        except BaseException:
            if not cell["may_fail"]:
                raise
            folder.mkdir(parents=True, exist_ok=True)
            if os.environ["RANK"] == "0":
                (folder / "error.txt").write_text(traceback.format_exc())
        finally:
            take_down()


def compile_with(backend: str) -> None:
    """torch.compile's own default makes code for this processor, which takes minutes. Before Megatron is imported."""
    import functools

    import torch

    torch.compile = functools.partial(torch.compile, backend=backend)


def agree_on_port(file: Path) -> str:
    """Rank 0 picks a free port just before it is used, and tells the others through a file."""
    if os.environ["RANK"] == "0":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        partial = file.with_suffix(".partial")
        partial.write_text(port)
        os.replace(partial, file)
        return port
    while not file.exists():
        time.sleep(0.02)
    return file.read_text()


def map_in_this_process() -> None:
    """datasets starts a worker process for every `map(num_proc=1)`: seconds a cell, and the same rows."""
    import datasets

    original = datasets.Dataset.map

    def map_(self, *args, num_proc=None, **kwargs):
        return original(self, *args, num_proc=None if num_proc == 1 else num_proc, **kwargs)

    datasets.Dataset.map = map_


def without_plots() -> None:
    """Two dozen pictures a run take a third of its time; test_commands looks at them in runs of its own."""
    import swift.megatron.pipelines.train.rlhf  # noqa: F401  (first: the other order breaks its parser)
    import swift.megatron.pipelines.train.sft as sft

    from megatron_bvpo.training.pipeline import BvpoPipeline

    sft.plot_images = lambda *args: None
    BvpoPipeline._plot_run = staticmethod(lambda output_dir: None)


def run_cell(cell: dict, folder: Path) -> None:
    argv = [*cell["argv"], "--rlhf_type", cell["type"], "--output_dir", str(folder)]
    import swift.megatron.pipelines.train.rlhf as stock

    if cell["type"] == "bvpo":
        import megatron_bvpo.training.trainer as ours
        from megatron_bvpo.training.pipeline import bvpo_main

        module, name, main = ours, "BvpoTrainer", bvpo_main
    else:
        import swift.megatron.trainers as theirs

        module, name, main = theirs, "MegatronDPOTrainer", stock.megatron_rlhf_main
    hook_module, _, hook = cell["hook"].partition(":")
    base = getattr(module, name)
    recorder = getattr(importlib.import_module(hook_module), hook)
    setattr(module, name, recorder(base, folder, **cell["hook_args"]))
    from tests.distributed.canary_recorder import canary_lines

    with canary_lines() as lines:
        try:
            main(argv)
        finally:
            setattr(module, name, base)
    assert cell["canaries"] or not lines, lines


def _forget_router_losses() -> None:
    """megatron-core 0.18 and later keep the groups that a router's losses are summed over for the life of the process.

    A stage without a router would go on with those of the run before, and wait for ranks that are not in its own.
    """
    with contextlib.suppress(ImportError):
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()


def take_down() -> None:
    import torch
    import torch.distributed as dist
    from mcore_bridge.bridge import gpt_bridge
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    parallel_state.destroy_model_parallel()
    # Megatron writes a run's attention backend into these, and refuses another one's afterwards.
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    # mcore-bridge keeps a group of its own for the life of the process.
    gpt_bridge.EP_PP_GROUP = gpt_bridge.EP_PP_SIZE = gpt_bridge.EP_PP_RANK = None
    destroy_num_microbatches_calculator()
    _forget_router_losses()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    torch.manual_seed(0)


if __name__ == "__main__":
    main(sys.argv[1])
