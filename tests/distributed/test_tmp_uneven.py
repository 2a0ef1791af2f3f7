import json
import pytest, torch
from tests.distributed import test_probe as tp
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.distributed import test_reference_cache as rc

def test_it(workshop, tmp_path):
    rows = tp.uneven_rows(workshop)
    cells = [Cell("uneven", tp.argv(workshop, "one-rank", "lora", f"--dataset {rows}"), hook=tp.HOOK, hook_args={})]
    cache = tmp_path / "cache"
    for name, where, more in (("none", None, ""), ("cold", cache, ""), ("warm", cache, ""), ("one", None, "--bvpo_alpha 1"), ("zero", None, "--bvpo_alpha 0")):
        cells.append(Cell(name, rc.argv(workshop, "one-rank", where, more, rows=rows), hook=rc.HOOK, hook_args={}))
    found = run_cells(1, cells, tmp_path / "out")
    truth = tp.float64_moments(found["uneven"])
    print(torch.load(found["uneven"].folder / "passes.pt", weights_only=False)["counts"], truth)
    for key in tp.MOMENTS:
        assert found["uneven"].steps(key)[0] == pytest.approx(truth[key], rel=1e-4), key
    for key in rc.LOSSES:
        print(key, found["none"].steps(key), found["warm"].steps(key))
        assert found["none"].steps(key) == pytest.approx(found["cold"].steps(key), rel=1e-6, abs=1e-7)
        assert found["none"].steps(key) == pytest.approx(found["warm"].steps(key), rel=1e-6, abs=1e-7)
    print(found["warm"].steps("ref_cache/hits"))
    for name in ("one", "zero"):
        print(name, found[name].log[0])
        for f in sorted(found[name].folder.rglob("*")):
            if f.is_file() and f.suffix in (".txt", ".log", ""):
                print(f)
