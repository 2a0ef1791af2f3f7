"""Every flag is given wrong values by machine, and each is told in one line, or stands in a table that says why not.

every_flag.py does it in one process: the parser, our checks and ms-swift's own arguments, without a model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.cells import CPU_FLAGS

ROOT = Path(__file__).resolve().parents[2]

# Flags whose wrong values are taken, and why that is no harm.
NOT_READ = {
    "inference's": "response_prefix",
    "ms-swift's other backend's": "local_repo_path max_shard_size local_rank",
    "Ray's": "ray_exp_name",
    "another model's or task's (images, MTP, DSA, engrams, decisions)": """
        max_pixels vit_attn_impl mtp_loss_scaling_factor dsa_indexer_loss_coeff engram_tokenizer_map
        decision_drop_instructions decision_subsample_options decision_state_as_text
    """,
    "Muon's, which is refused": """
        muon_momentum muon_coefficient_type muon_num_ns_steps muon_extra_scale_factor muon_scalar_optimizer
    """,
}
FREE = {
    "any text is right": """
        system model_name model_author wandb_project wandb_exp_name swanlab_project swanlab_exp_name
    """,
    "a hub's word, which the hub answers": "model_revision",
    "a name that no evaluation has keeps no checkpoint as the best": "metric_for_best_model",
    "any sign is right": "bvpo_simpo_gamma",
}
LATER = {
    "by the scan of the data files, before ranks are started": "dataset val_dataset",
    "by the template, before the model is loaded": "bvpo_empty_block",
    "by the model's names, before its weights are read": "target_modules target_regex modules_to_save",
}
# 0 is never, none, or the first.
ZERO = """
    save_steps eval_steps eval_iters lr_warmup_iters dataloader_num_workers manual_gc_steps data_seed mtp_num_layers
    bvpo_mu_warmup_steps bvpo_mu_decay_steps
""".split()
# Where it is ms-swift or Megatron that says what is wrong, and says it well.
THEIRS = "model_type template device_groups pipeline_model_parallel_layout muon_lr muon_min_lr".split()


def names(*tables: dict[str, str]) -> set[str]:
    return {name for table in tables for text in table.values() for name in text.split()}


@pytest.fixture(scope="module")
def said(workshop, tmp_path_factory) -> dict[str, str]:
    base = {
        "model": workshop.dense,
        "model_type": "qwen3",
        "template": "qwen3_thinking",
        "dataset": workshop.train,
        "tuner_type": "lora",
        "global_batch_size": 4,
        "train_iters": 1,
        "max_length": 512,
    }
    flags = [*(word for name, value in base.items() for word in (f"--{name}", str(value))), *CPU_FLAGS]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.every_flag", str(tmp_path_factory.mktemp("flags")), *flags],
        env={**os.environ, **rank, "BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_right_flags_are_taken(said):
    assert said[""] == "accepted"
    assert len(said) > 800


def test_nothing_ends_with_a_trace(said):
    assert {case: told for case, told in said.items() if not told.startswith(("told: ", "accepted"))} == {}


def test_what_is_told_is_one_line_that_names_the_flag(said):
    told = {case: text for case, text in said.items() if text.startswith("told: ")}
    assert [case for case, text in told.items() if "\n" in text or len(text) > 1000] == []
    unnamed = {case for case, text in told.items() if f"--{case.partition('=')[0]}: " not in text}
    assert {case.partition("=")[0] for case in unnamed} == set(THEIRS)


def test_what_is_taken_stands_in_a_table(said):
    taken = {case for case, told in said.items() if told == "accepted" and case}
    expected = names(NOT_READ, FREE, LATER)
    zeros = {f"{name}=0" for name in ZERO}
    assert {case for case in taken - zeros if case.partition("=")[0] not in expected} == set()
    assert zeros <= taken
    assert expected - {case.partition("=")[0] for case in taken} == set(), "told by now: take it out of the table"


def test_what_ms_swift_says_is_known(said):
    """Its messages end with the place in its source."""
    theirs = {case.partition("=")[0] for case, told in said.items() if ".py:" in told}
    assert theirs == set(THEIRS)
