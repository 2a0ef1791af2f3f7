"""Probe steps: D, X and W in every layout, against one rank and against gathered full gradients in float64.

The float64 side uses the exporter's gradients by Hugging Face name (full_gradients.py), so it shares no code
with the shards, the buffers and the reduction that are tested. `--whole-matrix` runs LoRA and full in every
layout; without it, half of the layouts run one of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_by_ranks
from tests.distributed.full_gradients import shared_factor
from tests.distributed.hf_oracle import pair_of, read_rows
from tests.distributed.oracle_runs import write_rows
from tests.distributed.test_parity import LAYOUTS, SHIPPED, TUNERS

HOOK = "tests.distributed.recorders:record_probe"
STARVING = "tests.distributed.starving:record_starved_probe"
PRIOR = 0.3
STEPS = 3
MOMENTS = ("moments/D", "moments/X", "moments/W")
VARIANTS = {
    "tp2-ep2-full-no-dist-opt": ("tp2-ep2", "full", "--use_distributed_optimizer false"),
    "dp2-lora-no-dist-opt": ("dp2", "lora", "--use_distributed_optimizer false"),
    "ep2-full-overlap": ("ep2", "full", "--overlap_grad_reduce true --overlap_param_gather true"),
    "tp2-full-dense": ("tp2", "full", "DENSE"),
    # All expert ranks but the first get no token, in any pass; with what lets a run hang on that.
    "ep2-full-starved": ("ep2", "full", f"{SHIPPED} --overlap_grad_reduce true --overlap_param_gather true"),
}
# With --whole-matrix, these too.
MORE_VARIANTS = {
    "tp2-full-shipped": ("tp2", "full", SHIPPED),
    "dp2-lora-shipped": ("dp2", "lora", SHIPPED),
    "pp2-vpp2-lora-shipped": ("pp2-vpp2", "lora", SHIPPED),
    "cp2-ep2-full-shipped": ("cp2-ep2", "full", SHIPPED),
    "tp2-pp2-ep2-full-shipped": ("tp2-pp2-ep2", "full", SHIPPED),
    "tp2-pp2-ep2-lora-shipped": ("tp2-pp2-ep2", "lora", SHIPPED),
    "ep2-lora-starved": ("ep2", "lora", f"{SHIPPED} --overlap_grad_reduce true"),
    "ep2-lora-starved-unfused": ("ep2", "lora", "--overlap_grad_reduce true"),
    "ep4-full-starved": ("ep4", "full", SHIPPED),
    "tp2-pp2-ep2-lora-starved": ("tp2-pp2-ep2", "lora", SHIPPED),
}
# With --whole-matrix in every layout.
WAYS = {
    "no-dist-opt": "--use_distributed_optimizer false",
    "overlap": "--overlap_grad_reduce true --overlap_param_gather true",
    "no-dist-opt-overlap": "--use_distributed_optimizer false --overlap_grad_reduce true",
}
# One rank: odd numbers of micro-batches (no whole halves), and the same in one micro-batch.
ODD = {"odd": "--global_batch_size 3", "single": "--micro_batch_size 4 --global_batch_size 4"}
MUTATIONS = {
    "replicas counted on every rank": "tp2-ep2",
    "experts forgotten": "ep2",
    "copies not divided": "dp2",
    "cross term dropped": "dp2",
    "local gradients": "dp2",
}


def argv(workshop, layout: str, tuner: str, more: str = "", alpha: str = "auto") -> list[str]:
    dense = more == "DENSE"
    model = (workshop.dense, "qwen3") if dense else (workshop.moe, "qwen3_moe")
    more = "" if dense else more
    run = (
        f"--model {model[0]} --model_type {model[1]} --template qwen3_thinking --dataset {workshop.train} "
        f"--lr 1e-3 --adam_eps 1e-4 --micro_batch_size 1 --global_batch_size 8 --train_iters {STEPS} "
        f"--logging_steps 1 --max_length 512 --bvpo_alpha {alpha} --bvpo_alpha_prior {PRIOR} "
        # sgd with a small kappa hardly leaves the prior in three steps, and would hide a wrong alpha.
        "--bvpo_criterion mse"
    )
    return [*run.split(), *CPU_FLAGS, *LAYOUTS[layout][1].split(), *TUNERS[tuner].split(), *more.split()]


def wanted(layout: str, tuner: str, whole: bool) -> bool:
    if whole or layout == "one-rank":
        return True
    chosen = ("tp2", "pp2-vpp2", "cp2", "ep2", "tp2-pp2-ep2")
    return layout in chosen and (tuner == "lora") == bool(sorted(LAYOUTS).index(layout) % 2)


def layout_cells(whole: bool) -> list[str]:
    return [f"{layout}-{tuner}" for layout in LAYOUTS for tuner in TUNERS if wanted(layout, tuner, whole)]


def variants(whole: bool) -> dict[str, tuple[str, str, str]]:
    """Cells beside the plain ones: name to layout, tuner and more flags."""
    if not whole:
        return VARIANTS
    found = {
        f"{layout}-{tuner}-{way}": (layout, tuner, more)
        for layout in LAYOUTS
        for tuner in TUNERS
        for way, more in WAYS.items()
    }
    return VARIANTS | MORE_VARIANTS | found


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-matrix")
        metafunc.parametrize("cell", layout_cells(whole) + list(variants(whole)))
    if "starved" in metafunc.fixturenames:
        metafunc.parametrize(
            "starved", [v for v in variants(metafunc.config.getoption("--whole-matrix")) if "starved" in v]
        )


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request) -> dict[str, CellResult]:
    folder = tmp_path_factory.mktemp("probe")
    by_ranks: dict[int, list[Cell]] = {1: [], 2: [], 4: []}

    def add(name: str, layout: str, tuner: str, more: str = "", alpha: str = "auto", **hook_args) -> None:
        hook = STARVING if "starved" in name else HOOK
        # With local gradients each replica takes a step of its own, and the copies part: the canaries say so, too.
        apart = hook_args.get("mutation") == "local gradients"
        flags = argv(workshop, layout, tuner, more, alpha)
        cell = Cell(name, flags, hook=hook, hook_args=hook_args, canaries=apart)
        by_ranks[LAYOUTS[layout][0]].append(cell)

    for name in layout_cells(request.config.getoption("--whole-matrix")):
        layout, tuner = name.rsplit("-", 1)
        add(name, layout, tuner)
    for name, (layout, tuner, more) in variants(request.config.getoption("--whole-matrix")).items():
        add(name, layout, tuner, more)
    add("one-rank-full-dense", "one-rank", "full", "DENSE")
    for tuner in TUNERS if request.config.getoption("--whole-matrix") else ("full",):
        add(f"one-rank-{tuner}-starved", "one-rank", tuner)
    for name, more in ODD.items():
        add(name, "one-rank", "lora", more)
    add("uneven", "one-rank", "lora", f"--dataset {uneven_rows(workshop)}")
    aux = "--moe_router_load_balancing_type aux_loss --moe_aux_loss_coeff 0.01"
    for alpha in ("auto", str(PRIOR)):
        add(f"one-pass-or-not-{alpha}", "one-rank", "full", "", alpha)
        add(f"aux-{alpha}", "one-rank", "full", aux, alpha)
    add("one-pass-odd", "one-rank", "lora", ODD["odd"], str(PRIOR))
    add("one-pass-single", "one-rank", "lora", ODD["single"], str(PRIOR))
    for mutation, layout in MUTATIONS.items():
        more = "--use_distributed_optimizer false" if layout == "dp2" else ""
        add(mutation.replace(" ", "_"), layout, "lora", more, mutation=mutation)
    add("lagged", "one-rank", "lora", at_step=STEPS - 1)
    add("same_batch", "one-rank", "lora", mutation="same batch's alpha", at_step=STEPS - 1)
    return run_by_ranks(folder, by_ranks)


def uneven_rows(workshop) -> Path:
    """Of 16 rows three are an empty pair alone, and two have no empty pair."""
    rows = read_rows(workshop.train)
    for i in (1, 6, 10):
        pair = pair_of(rows[i], "empty")
        answers = {"empty_response": pair.chosen, "empty_rejected_response": pair.rejected}
        rows[i] = {"messages": rows[i]["messages"][:1], **answers}
    for i in (4, 13):
        rows[i] |= {"empty_response": "The same.", "empty_rejected_response": "The same."}
    return write_rows(workshop.folder / "uneven.jsonl", rows)


def float64_moments(result: CellResult) -> dict[str, float]:
    """MATH.md §3, with §5's factors, from whole gradients by name; nothing of the project's gradient code."""
    saved = torch.load(result.folder / "passes.pt", weights_only=False)
    (t_a, t_b, e_a, e_b), counts = saved["passes"][:4], saved["counts"]
    n_a, n_b = counts["trace"]
    m_a, m_b = counts["empty"]
    k_a, k_b = counts["both"]
    names = [name for name in t_a if shared_factor(name) == name]

    def dot(x: dict, y: dict) -> float:
        return sum((x[name] * y[name]).sum().item() for name in names)

    def combine(*terms) -> dict:
        return {name: sum(w * g[name] for w, g in terms) for name in names}

    mean = combine(
        (n_a / (n_a + n_b), t_a), (n_b / (n_a + n_b), t_b), (-m_a / (m_a + m_b), e_a), (-m_b / (m_a + m_b), e_b)
    )
    trace, empty = combine((1, t_a), (-1, t_b)), combine((1, e_a), (-1, e_b))
    n, m = n_a + n_b, m_a + m_b
    v_t, v_e = n_a * n_b / n**2 * dot(trace, trace), m_a * m_b / m**2 * dot(empty, empty)
    c = (k_a + k_b) / (n * m) / (k_a / (n_a * m_a) + k_b / (n_b * m_b)) * dot(trace, empty)
    return {"moments/D": dot(mean, mean), "moments/X": v_t - c, "moments/W": v_t + v_e - 2 * c}


def baseline(cell: str) -> str:
    if cell.endswith("dense"):
        return "one-rank-full-dense"
    return f"one-rank-{'lora' if 'lora' in cell else 'full'}" + ("-starved" if "starved" in cell else "")


def test_moments_and_alpha_agree_with_one_rank(runs, cell):
    ours, base = runs[cell], runs[baseline(cell)]
    for key in MOMENTS:
        assert len(ours.steps(key)) == STEPS
        scale = base.steps("moments/D")  # X can be near 0
        for a, b, d in zip(ours.steps(key), base.steps(key), scale, strict=True):
            assert abs(a - b) <= 1e-4 * max(abs(b), 0.1 * d), (key, a, b)
    assert ours.steps("alpha") == pytest.approx(base.steps("alpha"), abs=1e-4)
    assert ours.steps("alpha")[0] == pytest.approx(PRIOR) != ours.steps("alpha")[-1]


def test_moments_agree_with_gathered_gradients_in_float64(runs, cell):
    truth = float64_moments(runs[cell])
    for key in MOMENTS:
        assert runs[cell].steps(key)[0] == pytest.approx(truth[key], rel=1e-4), key


def test_an_expert_rank_without_tokens_has_zero_gradients_and_the_others_one_ranks(runs, starved):
    """Finding no token must neither hang a run nor change what the other ranks do."""
    rows = torch.load(runs[starved].folder / "rows.pt")
    fed = [sum(of_rank) > 0 for of_rank in rows]
    ep = int(re.search(r"ep(\d)", starved)[1])
    assert all(rows) and fed.count(True) * ep == len(fed), fed
    ours, base = (runs[name].recorded["gradients"][0] for name in (starved, baseline(starved)))
    assert ours.keys() == base.keys()
    scale = max(g.norm().item() for g in base.values())
    for name, gradient in base.items():
        assert (ours[name] - gradient).norm().item() <= 1e-5 * max(gradient.norm().item(), 1e-2 * scale), name
    expert = {name: int(found[1]) for name in base if (found := re.search(r"\.experts\.(\d+)\.", name))}
    assert len(set(expert.values())) == 8
    assert {i for name, i in expert.items() if ours[name].any()} == {0, 1}


@pytest.mark.parametrize("name", ["odd", "single", "uneven"])
def test_batches_that_cannot_be_halved_and_rows_that_lack_a_pair_are_measured_too(runs, name):
    if name == "uneven":
        counts = torch.load(runs[name].folder / "passes.pt", weights_only=False)["counts"]
        assert sum(counts["both"]) < min(sum(counts["trace"]), sum(counts["empty"])), counts
    truth = float64_moments(runs[name])
    for key in MOMENTS:
        assert runs[name].steps(key)[0] == pytest.approx(truth[key], rel=1e-4), key


@pytest.mark.parametrize(
    "probe, one_pass",
    [
        ("one-pass-or-not-auto", f"one-pass-or-not-{PRIOR}"),
        ("odd", "one-pass-odd"),
        ("single", "one-pass-single"),
        ("aux-auto", f"aux-{PRIOR}"),
    ],
)
def test_a_probe_step_is_a_one_pass_step(runs, probe, one_pass):
    """The same batch and alpha give the same gradient; auxiliary losses enter once, at the one-pass scale."""
    ours, base = (runs[name].recorded["gradients"][0] for name in (probe, one_pass))
    scale = max(g.norm().item() for g in base.values())
    for name, gradient in base.items():
        assert (ours[name] - gradient).norm().item() <= 1e-5 * max(gradient.norm().item(), 1e-2 * scale), name


def test_auxiliary_losses_are_in_the_update_and_in_no_moment(runs):
    for key in MOMENTS:
        assert runs["aux-auto"].steps(key)[0] == pytest.approx(runs["one-pass-or-not-auto"].steps(key)[0], rel=1e-5)
    with_aux = runs[f"aux-{PRIOR}"].recorded["true_norm"][0]
    assert abs(with_aux - runs[f"one-pass-or-not-{PRIOR}"].recorded["true_norm"][0]) > 1e-4


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_the_comparison_notices(runs, mutation):
    """The float64 test above fails for each of these faults."""
    broken = runs[mutation.replace(" ", "_")]
    truth = float64_moments(broken)
    assert any(abs(broken.steps(key)[0] - truth[key]) > 1e-3 * abs(truth[key]) for key in MOMENTS)


def lagged_alphas(result: CellResult) -> list[float]:
    """What each step's alpha is if only the steps before it have a say."""
    estimator = AlphaEstimator(prior=PRIOR, criterion="mse", kappa=1.0, moment_decay=0.9)
    alphas = []
    for d, x, w in zip(*(result.steps(key) for key in MOMENTS), strict=True):
        alphas.append(estimator.alpha)
        estimator.update(Moments(D=d, X=x, W=w))
    return alphas


def test_the_current_batch_does_not_choose_its_own_alpha(runs):
    right = runs["lagged"]
    assert right.steps("alpha") == pytest.approx(lagged_alphas(right), abs=1e-6)
    assert runs["same_batch"].steps("alpha") != pytest.approx(lagged_alphas(runs["same_batch"]), abs=1e-3)


def test_the_gradient_is_mixed_with_that_alpha(runs):
    """At a step where alpha has left the prior: the update's gradient against the passes', in float64."""
    result = runs["lagged"]
    alpha = result.steps("alpha")[-1]
    assert abs(alpha - PRIOR) > 0.01
    saved = torch.load(result.folder / "passes.pt", weights_only=False)
    (t_a, t_b, e_a, e_b), counts = saved["passes"][:4], saved["counts"]
    for name, gradient in result.recorded["gradients"][-1].items():
        (n_a, n_b), (m_a, m_b) = counts["trace"], counts["empty"]
        trace = (n_a * t_a[name] + n_b * t_b[name]) / (n_a + n_b)
        empty = (m_a * e_a[name] + m_b * e_b[name]) / (m_a + m_b)
        mixed = alpha * trace + (1 - alpha) * empty
        assert (gradient - mixed).norm() <= 1e-5 * mixed.norm() + 1e-9, name
