"""Runs with another TRL than ours: its DPOTrainer's loss of pairs of texts, and the slope, in float64.

    python newest_trl.py FOLDER

FOLDER holds job.json (policy, reference, pairs, loss_type, beta); loss.pt is written into it.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float64, attn_implementation="eager")
        for name in ("policy", "reference")
    )
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        loss_type=[job["loss_type"]],
        beta=job["beta"],
    )
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    data = Dataset.from_list(job["pairs"])
    trainer = trl.DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)
    items = list(trainer.train_dataset)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(items))
    loss.backward()
    found = {
        "version": trl.__version__,
        "loss": loss.detach(),
        "ids": [{name: item[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for item in items],
        "slopes": {name: p.grad for name, p in trainer.model.named_parameters()},
    }
    torch.save(found, folder / "loss.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
