"""`sigmoid_norm` against the TRL that has it, 1.16, which ms-swift does not allow yet: in a folder of its own.

pip install --no-deps --target FOLDER trl==1.16.0
BVPO_NEWEST_TRL=FOLDER pytest tests/unit/test_newest_trl.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bvpo.objective.preference import PairLogps, PreferenceConfig, pair_losses
from megatron_bvpo.objective.stream_losses import sequence_logps

TRL = os.environ.get("BVPO_NEWEST_TRL")
pytestmark = pytest.mark.skipif(
    not TRL, reason="BVPO_NEWEST_TRL is not set: pip install --no-deps --target FOLDER trl==1.16.0"
)
BETA = 5.0
TOLERANCE = 1e-5


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def job(workshop, tmp_path_factory):
    """A policy a little off its reference, eight pairs of unequal lengths, and what TRL made of them."""
    folder = tmp_path_factory.mktemp("newest-trl")
    policy = load(workshop.dense)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in policy.parameters():
            param += 0.03 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    policy.save_pretrained(folder / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "policy" / name).write_bytes((workshop.dense / name).read_bytes())
    rows = [json.loads(line) for line in workshop.train.read_text().splitlines()[:8]]
    pairs = [
        {
            "prompt": row["messages"][0]["content"],
            "chosen": f" {row['messages'][1]['content']}",
            "rejected": f" {row['rejected_response']}",
        }
        for row in rows
    ]
    wanted = {"policy": str(folder / "policy"), "reference": str(workshop.dense), "pairs": pairs}
    (folder / "job.json").write_text(json.dumps({**wanted, "loss_type": "sigmoid_norm", "beta": BETA}))
    script = Path(__file__).with_name("newest_trl.py")
    done = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": TRL},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load(folder / "policy"), load(workshop.dense), torch.load(folder / "loss.pt")


def test_sigmoid_norm_as_in_the_trl_that_has_it(job):
    policy, reference, theirs = job
    assert theirs["version"].startswith("1.16")

    def side(model, name):
        sums = []
        for item in theirs["ids"]:
            ids = torch.tensor(item["prompt"] + item[name])
            labels = torch.where(torch.arange(len(ids)) < len(item["prompt"]), -100, ids)[1:]
            logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            sums.append(sequence_logps(logps.gather(1, ids[1:, None]).T, labels[None], None))
        logps, counts = zip(*sums, strict=True)
        return torch.cat(logps), torch.cat(counts)

    (chosen, chosen_tokens), (rejected, rejected_tokens) = (side(policy, name) for name in ("chosen", "rejected"))
    with torch.no_grad():
        (ref_chosen, _), (ref_rejected, _) = (side(reference, name) for name in ("chosen", "rejected"))
    pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    assert (chosen_tokens != rejected_tokens).any(), "equal lengths could not tell this loss from sigmoid"
    loss = pair_losses(pairs, PreferenceConfig("sigmoid_norm", BETA)).loss.mean()
    # TRL takes the log-probs from float32 logits, whatever the model's dtype.
    assert loss.item() == pytest.approx(theirs["loss"].item(), rel=TOLERANCE)
    loss.backward()
    for name, param in policy.named_parameters():
        error = (param.grad - theirs["slopes"][name]).norm() / param.grad.norm()
        assert error < TOLERANCE, f"{name}: {error:.1e}"
