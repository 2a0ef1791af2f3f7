"""The plan reads YAML files without ms-swift; its names and defaults must be those of the real arguments.

The arguments' source is read, not imported: that takes half a minute and Transformer Engine.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.settings import NOT_PLANNED, RunSettings, read_settings, settings_from

SWIFT = importlib.util.find_spec("swift")
ROOT = Path(__file__).resolve().parents[2]
# ms-swift fills these in later: its own value is None or a factory, and means what stands here.
SETTLED = {
    "target_modules",
    "recompute_modules",
    "ref_adapters",
    "moe_aux_loss_coeff",
    "model",
    "rlhf_type",
    "bvpo_alpha",
}


def source_defaults() -> dict[str, object]:
    """Field name to literal default, from the dataclasses of the installed ms-swift and of this package."""
    folder = Path(SWIFT.submodule_search_locations[0])
    files = [
        folder / "arguments/base_args/base_args.py",
        folder / "arguments/base_args/model_args.py",
        folder / "arguments/base_args/data_args.py",
        folder / "arguments/base_args/template_args.py",
        folder / "megatron/arguments/megatron_args.py",
        ROOT / "megatron_bvpo/arguments.py",
    ]
    found: dict[str, object] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found[item.target.id] = _literal(item.value)
    return found


def _literal(node):
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None  # field(default_factory=…)


@pytest.mark.skipif(SWIFT is None, reason="ms-swift is not installed")
def test_names_and_defaults_are_the_arguments_own():
    theirs = source_defaults()
    for field in dataclasses.fields(RunSettings):
        assert field.name in theirs, f"ms-swift has no {field.name}"
        if field.name not in SETTLED:
            assert field.default == theirs[field.name], field.name
    for name, _, _ in NOT_PLANNED:
        assert name in theirs, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (k, v)
        for k, v in dict(
            pipeline_model_parallel_layout="Et|tL",
            mtp_num_layers=1,
            fp8_format="hybrid",
            use_megatron_fsdp=True,
            modules_to_save=["embedding"],
            freeze_parameters_ratio=0.5,
            target_regex=".*qkv",
        ).items()
    ],
)
def test_what_the_plan_does_not_know_is_refused(key, value):
    with pytest.raises(UserError, match="not planned") as found:
        settings_from({"max_length": 100, key: value})
    assert found.value.field == key


def test_harmless_values_of_such_keys_pass():
    assert settings_from({"max_length": 100, "fp8_param_gather": False, "modules_to_save": [], "lr": 1e-3})


def test_values_as_yaml_and_as_text():
    text = settings_from({"max_length": "4096", "sequence_parallel": "true", "target_modules": "all-linear all-router"})
    yaml = settings_from(
        {"max_length": 4096, "sequence_parallel": True, "target_modules": ["all-linear", "all-router"]}
    )
    assert text == yaml
    assert text.target_modules == ("all-linear", "all-router")
    with pytest.raises(UserError, match="is 'perhaps'; expected true or false"):
        settings_from({"max_length": 1, "sequence_parallel": "perhaps"})
    with pytest.raises(UserError, match="is 1.5; expected a whole number"):
        settings_from({"max_length": 1.5})


def test_max_length_is_needed():
    with pytest.raises(UserError, match="how long a sequence may be"):
        settings_from({})


@pytest.mark.parametrize(
    ("values", "parameter", "gradient"),
    [
        ({}, 2, 4),
        ({"bf16": True}, 2, 4),
        ({"bf16": True, "main_grads_dtype": "bf16"}, 2, 2),
        ({"fp16": True}, 2, 2),
        ({"torch_dtype": "float32", "bf16": "false"}, 4, 4),
    ],
)
def test_bytes_of_an_element(values, parameter, gradient):
    run = settings_from({"max_length": 1, **values})
    assert (run.dtype_bytes, run.grad_bytes) == (parameter, gradient)


def test_a_frozen_router_is_known_and_nothing_else():
    assert settings_from({"max_length": 1, "freeze_parameters_regex": r".*\.router\.weight"}).router_frozen
    with pytest.raises(UserError, match="a frozen router only"):
        settings_from({"max_length": 1, "freeze_parameters_regex": ".*"})


def test_overrides_win(tmp_path):
    (tmp_path / "run.yaml").write_text("max_length: 100\nmicro_batch_size: 4\n")
    assert read_settings(tmp_path / "run.yaml", {"micro_batch_size": "2"}).micro_batch_size == 2
