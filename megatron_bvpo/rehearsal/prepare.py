"""`python -m megatron_bvpo.rehearsal.prepare FOLDER`: the rehearsal's tiny model and preference rows.

Makes `FOLDER/model`, `FOLDER/train.jsonl` and `FOLDER/heldout.jsonl`; what is there already is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

N_TRAIN, N_HELD_OUT, SEED = 512, 64, 0


def prepare(
    folder: Path,
    *,
    vocab: str = "trimmed",
    n_train: int = N_TRAIN,
    n_held_out: int = N_HELD_OUT,
    seed: int = SEED,
) -> None:
    """Write what is missing. `vocab` is `trimmed` (1,003 words) or `real` (Qwen's 151,936, several times slower)."""
    from megatron_bvpo.rehearsal.sample_data import write_sample_data
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    if not (folder / "train.jsonl").exists():
        write_sample_data(folder, n_train, n_held_out, seed=seed)
    make_tiny_model(folder / "model", kind="moe", vocab=vocab, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", choices=("trimmed", "real"), default="trimmed")
    args = parser.parse_args()
    prepare(args.folder, vocab=args.vocab)
