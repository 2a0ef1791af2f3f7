"""What `bvpo expand` writes, served by a real engine: log-probs of ten rows are the old model's."""

from __future__ import annotations

import pytest

from tests.conftest import Workshop
from tests.distributed import oracle_runs
from tests.distributed.hf_oracle import load_model, mean_logps, read_rows
from tests.engine.commands import bvpo
from tests.engine.test_export import ROWS, TOLERANCE, served_logps
from tests.engine.vllm_server import serving

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workshop:
    """Models that the engine's attention for CPUs takes, and rows."""
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    home = tmp_path_factory.mktemp("grown")
    sizes = dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    held_out = oracle_runs.write_rows(home / "held_out.jsonl", make_sample_rows(ROWS, seed=1))
    models = {kind: make_tiny_model(home / kind, kind=kind, **sizes) for kind in ("moe", "dense")}
    return Workshop(folder=home, **models, train=held_out, held_out=held_out)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_grown_model_is_the_old_one(kind, bench):
    old, grown = getattr(bench, kind), bench.folder / f"{kind}-grown"
    said = bvpo("expand", str(old), str(grown), "--layers", "upper-half", cwd=bench.folder)
    assert "4 layers become 6" in said
    with serving(grown, "model", bench.folder / f"{kind}.log") as address:
        found = served_logps(address, ["model"], bench)
    assert found["model"] == pytest.approx(mean_logps(load_model(old), old, read_rows(bench.held_out)), abs=TOLERANCE)
