"""The list of flags that a BVPO run ignores is what the installed sources say: who reads which field.

The sources are read as syntax trees, as in test_plan_settings.py.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.unread_flags import INSTEAD, UNREAD, given_unread, refuse_unread
from tests.unit.test_plan_settings import ROOT, SWIFT, _literal, argument_classes, fields_of

pytestmark = pytest.mark.skipif(SWIFT is None, reason="ms-swift is not installed")
# The files that a BVPO run goes through, below site-packages.
READERS = re.compile(
    r"swift/(megatron/(trainers/(base|rlhf_mixin|utils|batch_sampler)\.py|pipelines/train/(sft|rlhf)\.py|init\.py|"
    r"callbacks/|utils/|model/)|dataset/|template/|utils/|loss_scale/|dataloader/|pipelines/base\.py)|mcore_bridge/"
)
# Classes that ms-swift fills from fields of the same name.
FILLED = {
    "mcore_bridge/config/model_config.py": {"ModelConfig"},
    "megatron/core/transformer/transformer_config.py": {"TransformerConfig"},
    "megatron/core/model_parallel_config.py": {"ModelParallelConfig"},
    "megatron/core/optimizer/optimizer_config.py": {"OptimizerConfig", "AdamOptimizerConfig", "SGDOptimizerConfig"},
    "megatron/core/distributed/distributed_data_parallel_config.py": {"DistributedDataParallelConfig"},
}
# Read by the classes of arguments themselves, on the way to something that acts on them.
BY_ARGUMENTS = set(
    "add_version custom_dataset_info custom_register_path dataloader_multiprocessing_context dataset_shuffle "
    "decision_drop_instructions decision_shuffle_fields decision_state_as_text decision_subsample_options "
    "disable_ignore_empty_think external_plugins fp4_format fp8_format ignore_args_error interleave_prob load_args "
    "load_data_args local_rank local_repo_path model_author model_name model_revision report_to save_strategy "
    "shuffle_buffer_size skip_megatron_init split_dataset_ratio stopping_strategy target_regex val_dataset_shuffle "
    "model_kwargs "
    # use_vllm is true for everybody; the route refuses Ray; Muon is refused
    # use_vllm is true for everybody; the route refuses Ray; Muon is refused
    "use_vllm device_groups ray_exp_name muon_coefficient_type muon_use_nesterov".split()
)


def trees(files):
    for file in files:
        yield ast.parse(file.read_text(encoding="utf-8"))


def read_names() -> set[str]:
    """Names that stand behind a dot in a file of a run."""
    site = Path(SWIFT.submodule_search_locations[0]).parent
    files = [f for room in ("swift", "mcore_bridge") for f in (site / room).rglob("*.py")]
    files = [f for f in files if READERS.match(f.relative_to(site).as_posix())]
    files += [f for f in (ROOT / "megatron_bvpo").rglob("*.py")]
    assert len(files) > 100
    nodes = (node for tree in trees(files) for node in ast.walk(tree))
    found = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for file, classes in FILLED.items():
        if file.startswith("megatron"):
            path = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]).parent / file
        else:
            path = site / file
        kept = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name in classes]
        assert kept
        for node in kept:
            found |= set(fields_of(node))
    return found


def listed() -> dict[str, object]:
    return {name: default for flags in UNREAD.values() for name, default in flags.items()}


def test_every_flag_that_nothing_reads_is_listed():
    ours = {name for name in flag_names() if name.startswith("bvpo_")}
    assert set(flag_names()) - read_names() - ours - BY_ARGUMENTS <= set(listed())


def test_flags_of_other_methods_are_all_listed():
    """Every field of ms-swift's class for RLHF methods, without the few that a preference run reads."""
    (mixin,) = [node for node in argument_classes() if node.name == "RLHFMegatronArgumentsMixin"]
    reads = set(
        "rlhf_type loss_type beta rpo_alpha reference_free label_smoothing f_divergence_type dataset_shuffle use_vllm "
        "mcore_ref_model mcore_ref_adapter desirable_weight undesirable_weight".split()
    )
    assert set(fields_of(mixin)) - reads == set(UNREAD["it belongs to GRPO, GKD, KTO or reward models"])


def test_defaults_are_the_arguments_own():
    defaults: dict[str, object] = {}
    for node in argument_classes():
        for name, item in fields_of(node).items():
            defaults.setdefault(name, _literal(item.value))
    for name, default in listed().items():
        assert (tuple(default) if isinstance(default, list) else default) == defaults[name], name
    assert set(INSTEAD) <= set(listed()) and len(listed()) == sum(map(len, UNREAD.values()))


def test_what_stands_on_a_command_line_is_found():
    given = given_unread(
        "--lr 1 --num-generations 4 --vllm_server_port 1 2 --enable_dft_loss --temperature=0.9".split()
    )
    assert given == {
        "num_generations": "4",
        "vllm_server_port": "1 2",
        "enable_dft_loss": "true",
        "temperature": "0.9",
    }
    with pytest.raises(UserError, match="num_generations is '4' and would change nothing"):
        refuse_unread(given)
    refuse_unread({"temperature": "0.9", "unknown": 1})
