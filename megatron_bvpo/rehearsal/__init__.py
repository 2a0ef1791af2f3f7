"""CPU stand-ins that let the unmodified Megatron stack run without a GPU and without Transformer Engine.

`install()` is the only entry. It has two independent halves:

1. `transformer_engine`: puts a plain-PyTorch package of that name in front on `sys.path`. It holds the real
   mathematics on any device and in any dtype, so it also serves a GPU that has no Transformer Engine.
2. `device`: replaces the `torch.cuda` calls that Megatron makes by ones that mean the CPU.

Training code never imports this package. Call `install()` at the top of the entry file, before anything of
`megatron` or `swift` is imported, and **outside** the `if __name__ == "__main__"` guard: children that
multiprocessing spawns (dataset packing, checkpoint writers) import the entry file again and so install the
stand-ins for themselves; forked children inherit them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from megatron_bvpo.rehearsal.megatron_patches import patch_megatron

__all__ = ["install", "wanted"]

_STAND_INS = str(Path(__file__).parent / "stand_ins")


def wanted() -> bool:
    """True when the environment asks for a rehearsal (`BVPO_REHEARSAL=1`)."""
    return os.environ.get("BVPO_REHEARSAL", "") == "1"


def install(device: bool | None = None, transformer_engine: bool | None = None) -> None:
    """Install the stand-ins; calling it again changes nothing.

    Args:
        device: install the `torch.cuda` stand-ins. None: only where torch sees no CUDA device.
        transformer_engine: install the plain-PyTorch `transformer_engine`. None: where no real one can be
            imported, and always when `BVPO_REHEARSAL=1`.

    Raises:
        RuntimeError: another `transformer_engine`, or a megatron-core that found none, is already imported:
            both bind the names at import, so it is too late to put a stand-in in front.
    """
    if transformer_engine is None:
        transformer_engine = wanted() or not _transformer_engine_found()
    if transformer_engine:
        _put_in_front()

    if device is None:
        import torch

        # Cheap, and starts no CUDA context; the stand-ins themselves leave is_available() False.
        device = not torch.cuda.is_available()
    if device:
        from megatron_bvpo.rehearsal import device as device_stand_ins

        device_stand_ins.install()
    patch_megatron()


def _transformer_engine_found() -> bool:
    if "transformer_engine" in sys.modules:
        return True
    return importlib.util.find_spec("transformer_engine") is not None


def _put_in_front() -> None:
    loaded = sys.modules.get("transformer_engine")
    if loaded is not None and not (loaded.__file__ or "").startswith(_STAND_INS):
        raise RuntimeError(
            f"transformer_engine is already imported from {loaded.__file__}, so its stand-in cannot take "
            "its place. Call megatron_bvpo.rehearsal.install() before importing megatron, swift or "
            "transformer_engine."
        )
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if extension is not None and not extension.HAVE_TE:
        raise RuntimeError(
            "megatron.core was imported before the stand-ins and found no transformer_engine. "
            "Call megatron_bvpo.rehearsal.install() before importing megatron or swift."
        )
    if _STAND_INS not in sys.path:
        sys.path.insert(0, _STAND_INS)
    elif sys.path.index(_STAND_INS) > 0:
        # Someone put folders before ours; a real package there would win.
        sys.path.remove(_STAND_INS)
        sys.path.insert(0, _STAND_INS)
