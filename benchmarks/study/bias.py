"""b_t after a round: how far traces of the old policy pull the trace gradient away from where fresh ones point.

The estimator of α takes b_t = 0, which holds while traces come from the policy itself. After a run they come from the
model that it began with. Here the trained policy answers anew, and with

    g_f   trace gradient on pairs of its own fresh answers (taken for the right aim)
    g_t   trace gradient on pairs of the untrained model's answers
    g_e   empty-trace gradient on pairs of the untrained model's

all at the trained adapter and on the same questions, which no run has had: b_t = E g_t − E g_f and
b_e = E g_e − E g_f. Questions are dealt into folds; products of different folds have no noise in common, so that
‖b_t‖², ⟨b_t, b_e⟩ and ‖b_e‖² come out unbiased. Gradients are transformers' and peft's, in float32.

g_f is not the marginal loss's gradient: it has the policy's own final answers, too. What is measured is what going
stale does to g_t, which is the part that another round mends.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.evaluation import pairs_of, responses_log_probs
from benchmarks.study.plan import BETA
from megatron_bvpo.rehearsal.reasoner.sampling import Reasoner, load_reasoner
from megatron_bvpo.rehearsal.reasoner.tokens import END, prompt_text


def measure(model: Path, adapter: Path, stale: Path, fresh: Path, *, folds: int) -> dict[str, float]:
    """The three products, and what noise there is in a fold.

    Args:
        model, adapter: the trained policy; the reference is the model alone.
        stale, fresh: rows of pairs, of the model and of the policy, that were asked the same questions. Questions with
            pairs of both count, so that t, e and f are of the same questions in every fold.
    """
    of_stale, of_fresh = ({q for q, *_ in pairs_of(rows, "thinking")} for rows in (stale, fresh))
    both = sorted(of_stale & of_fresh)
    size = len(both) // folds
    questions = both[: size * folds]
    found = products(
        {
            "t": fold_gradients(model, adapter, stale, "thinking", questions, size),
            "e": fold_gradients(model, adapter, stale, "empty", questions, size),
            "f": fold_gradients(model, adapter, fresh, "thinking", questions, size),
        }
    )
    return found | {"pairs": float(size), "stale": float(len(of_stale)), "fresh": float(len(of_fresh))}


def products(folds: dict[str, Tensor]) -> dict[str, float]:
    """Of folds' mean gradients t, e, f [folds, parameters]; folds are equally large and independent.

    `bt_bt` estimates ‖b_t‖² and so on; `g_f` ‖E g_f‖²; `v_t` and so on tr Var of a fold's mean, `c` tr Cov of t and e.
    """
    differences = {"bt": folds["t"] - folds["f"], "be": folds["e"] - folds["f"]}
    found = {f"{a}_{b}": _apart(differences[a], differences[b]) for a, b in (("bt", "bt"), ("bt", "be"), ("be", "be"))}
    found["g_f"] = _apart(folds["f"], folds["f"])
    for name, of in folds.items():
        found[f"v_{name}"] = float((of - of.mean(0)).square().sum()) / (len(of) - 1)
    found["c"] = float(((folds["t"] - folds["t"].mean(0)) * (folds["e"] - folds["e"].mean(0))).sum()) / (len(of) - 1)
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    """The mean of ⟨a_i, b_j⟩ over i ≠ j."""
    n = len(a)
    return float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1)))


def fold_gradients(model: Path, adapter: Path, rows: Path, mode: str, questions: list[str], size: int) -> Tensor:
    """[folds, parameters] in float64: mean gradients of the DPO loss over each `size` questions' pairs (the first)."""
    from peft import PeftModel

    sides_of = {question: sides for question, *sides in reversed(pairs_of(rows, mode))}
    texts = [
        [(prompt_text(question, mode), response + END) for response in sides_of[question]] for question in questions
    ]
    plain = load_reasoner(model)
    with torch.no_grad():
        reference = _log_ratios(plain, texts)
    policy = Reasoner(PeftModel.from_pretrained(plain.model, adapter, is_trainable=True).eval(), plain.tokenizer)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    found = []
    for start in range(0, len(texts), size):
        mine = slice(start, start + size)
        loss = -F.logsigmoid(BETA * (_log_ratios(policy, texts[mine]) - reference[mine])).mean()
        found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


def _log_ratios(reasoner: Reasoner, texts: list) -> Tensor:
    """[pairs]: log p(chosen) − log p(rejected)."""
    chosen, rejected = (responses_log_probs(reasoner, [pair[side] for pair in texts]) for side in (0, 1))
    return chosen - rejected
