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
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.refusals import refusals
from megatron_bvpo.planning.checks import CHOICES, check_run
from megatron_bvpo.planning.reading import read_settings, settings_from
from megatron_bvpo.planning.settings import NOT_PLANNED, RunSettings

SWIFT = importlib.util.find_spec("swift")
ROOT = Path(__file__).resolve().parents[2]
# Other values than ms-swift's own, which mean the same.
SETTLED = {
    "moe_aux_loss_coeff",  # one number there, a list of them in a file
    "model",
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
        folder / "megatron/arguments/rlhf_args.py",
        ROOT / "megatron_bvpo/training/arguments.py",
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
    """The default as a value, a list as a tuple; an unknown expression equals nothing else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        given = {k.arg: k.value for k in node.keywords}
        if "default" in given:
            node = given["default"]
        elif ast.unparse(given.get("default_factory")) == "list":
            return ()
        elif isinstance(given.get("default_factory"), ast.Lambda):
            node = given["default_factory"].body
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return Unknown(node)
    return tuple(value) if isinstance(value, list) else value


class Unknown:
    """A default that the test cannot read."""

    def __init__(self, node):
        self.node = node

    def __repr__(self):
        return "no default" if self.node is None else ast.unparse(self.node)


def test_defaults_that_cannot_be_read_equal_nothing():
    def read(text):
        return _literal(ast.parse(text).body[0].value)

    assert read("field(default_factory=lambda: ['a'])") == ("a",) and read("field(default_factory=list)") == ()
    assert read("field(default=3)") == 3 and read("None") is None
    assert read("compute()") is not None and _literal(None) is not None


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
            megatron_extra_kwargs={"moe_expert_capacity_factor": 1.0},
        ).items()
    ],
)
def test_what_the_plan_does_not_know_is_refused(key, value):
    with pytest.raises(UserError, match="not planned") as found:
        settings_from({"max_length": 100, key: value})
    assert found.value.field == key


# Beside each refused setting of the run, a value of it and what else the refusal needs.
REFUSED = {
    "optimizer": "muon",
    "global_batch_size": {"loss_type": "kto", "global_batch_size": 1},
    "moe_expert_capacity_factor": 1.0,
    "async_save": True,
    "calculate_per_token_loss": True,
    "f_divergence_type": "js_divergence",
    "task_type": "seq_cls",
    "packing": {"packing": True, "streaming": True},
    "fp16": True,
    "main_grads_dtype": {"main_grads_dtype": "bf16", "use_precision_aware_optimizer": True},
    "use_precision_aware_optimizer": True,
    "optimizer_cpu_offload": {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True, "bvpo_alpha": 0.5},
    "group_by_length": True,
    "use_megatron_fsdp": True,
    "mtp_num_layers": 1,
    "fp8_param_gather": True,
    "cp_partition_mode": "contiguous",
    "bridge_backend": "megatron-bridge",
    "ref_model": {"ref_model": "there", "loss_type": "simpo"},
    "mcore_ref_model": {"mcore_ref_model": "there", "reference_free": True},
    "mcore_model": {"mcore_model": "there", "bvpo_new_layers_only": True},
    "ref_adapters": {"ref_adapters": "there", "loss_type": "simpo"},
    "mcore_ref_adapter": {"mcore_ref_adapter": "there", "loss_type": "simpo"},
    "new_special_tokens": ["<a>"],
    **{
        flag: {"lora_rank": 16}.get(flag, "q_proj")
        for flag in ("lora_rank", "target_modules", "lora_bias", "lora_dtype")
    },
    "lora_alpha": 64,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_regex": ".*qkv",
    "modules_to_save": ["embedding"],
    "loss_scale": "default",
    "truncation_strategy": "split",
    "freeze_parameters_ratio": 1.0,
    "moe_token_dispatcher_type": {
        "moe_token_dispatcher_type": "allgather",
        "moe_permute_fusion": True,
        "expert_model_parallel_size": 2,
    },
}
ADAPTERS = {"tuner_type": "lora"}
REFUSED_WITH_ADAPTERS = {
    "tuner_type": {"tuner_type": "lora_llm"},
    "lora_bias": ADAPTERS | {"lora_bias": "all"},
    "lora_dtype": ADAPTERS | {"lora_dtype": "float32"},
    "ref_model": ADAPTERS | {"ref_model": "there"},
    "mcore_ref_model": {"adapters": "there", "mcore_ref_model": "there"},
    "freeze_parameters": ADAPTERS | {"freeze_parameters": ["embedding"]},
    "freeze_parameters_regex": ADAPTERS | {"freeze_parameters_regex": r".*\.router\.weight"},
    "freeze_parameters_ratio": ADAPTERS | {"freeze_parameters_ratio": 0.5},
    "trainable_parameters": ADAPTERS | {"trainable_parameters": ["embedding"]},
    "trainable_parameters_regex": ADAPTERS | {"trainable_parameters_regex": ".*norm"},
}


def test_the_list_of_refusals_is_the_runs():
    def flags(**values):
        return {flag for _, flag, _, _ in refusals(settings_from({"max_length": 1, **values}))}

    always = flags() & flags(**ADAPTERS)
    assert flags() == set(REFUSED)
    either = {
        "ref_model",
        "mcore_ref_model",
        "lora_bias",
        "lora_dtype",
        "freeze_parameters_ratio",
    }  # for different reasons
    assert (flags(**ADAPTERS) - always) | either == set(REFUSED_WITH_ADAPTERS)


@pytest.mark.parametrize(
    ("flag", "values"),
    [*((f, v if isinstance(v, dict) else {f: v}) for f, v in REFUSED.items()), *REFUSED_WITH_ADAPTERS.items()],
)
def test_what_the_run_refuses_is_refused(flag, values):
    with pytest.raises(UserError) as found:
        check_run(settings_from({"max_length": 1, **values}), "run.yaml")
    plans_own = any(words in str(found.value) for words in ("not planned", "the plan knows"))
    assert found.value.field == flag and found.value.file == (None if plans_own else "run.yaml")
    assert "--" not in str(found.value)


def test_a_fixed_alpha_and_other_methods_are_refused_less():
    check_run(settings_from({"max_length": 1, "bvpo_alpha": 0.5, "group_by_length": True}))
    check_run(settings_from({"max_length": 1, "rlhf_type": "dpo", "async_save": True}))
    with pytest.raises(UserError, match="sorted by length"):
        check_run(settings_from({"max_length": 1, "group_by_length": True}))


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"attention_backend": "unfused"}, "attention_backend", "pads every sequence"),
        ({"attention_backend": "local"}, "attention_backend", "square of the length"),
        ({"recompute_granularity": "some"}, "recompute_granularity", "is 'some'; expected one of selective, full"),
        ({"recompute_granularity": "full", "recompute_method": "all"}, "recompute_method", "uniform, block"),
        ({"recompute_granularity": "full", "recompute_method": "block"}, "recompute_num_layers", "is missing"),
        ({"recompute_method": "block"}, "recompute_method", "takes none with selective"),
        ({"recompute_num_layers": 0}, "recompute_num_layers", "is 0; expected 1 or more"),
        ({"recompute_modules": "core_attn layer"}, "recompute_modules", "has 'layer'"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": False}, "overlap_param_gather", "no shards"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload", "not planned"),
        ({"bvpo_alpha": 1.5}, "bvpo_alpha", "number in .0, 1., or auto"),
        ({"bvpo_alpha": "abc"}, "bvpo_alpha", "is 'abc'"),
        ({"bvpo_kappa": 0}, "bvpo_kappa", r"number in \(0, 1\]"),
        ({"bvpo_logp_memory": ".nan"}, "bvpo_logp_memory", "expected a number"),
        ({"bvpo_logp_memory": float("nan")}, "bvpo_logp_memory", "expected a number"),
        ({"lora_rank": 0}, "lora_rank", "is 0"),
        ({"max_length": 0}, "max_length", "is 0; expected 1 or more"),
        ({"max_length": True}, "max_length", "is True; expected a whole number"),
        ({"max_length": float("inf")}, "max_length", "is inf; expected a whole number"),
        ({"lora_dropout": False}, "lora_dropout", "is False; expected a number"),
        ({"decoder_first_pipeline_num_layers": 0}, "decoder_first_pipeline_num_layers", "is 0"),
        ({"bvpo_probe_interval": 0}, "bvpo_probe_interval", "is 0"),
        ({"exp_avg_dtype": "int4"}, "exp_avg_dtype", "is 'int4'"),
    ],
)
def test_values_that_cannot_work(values, field, message):
    with pytest.raises(UserError, match=message) as found:
        settings_from({"max_length": 100, **values}, "run.yaml")
    assert (found.value.field, found.value.file) == (field, "run.yaml")


@pytest.mark.parametrize("backend", ["flash", "flash_3", "fused", "auto"])
def test_attention_without_a_matrix_is_planned(backend):
    assert settings_from({"max_length": 1, "attention_backend": backend})


def test_packing_has_no_padding():
    """ms-swift turns padding_free on, whatever the file says."""
    assert settings_from({"max_length": 1, "packing": True, "padding_free": False}).padding_free


def test_dashes_in_keys_are_read_as_the_parser_reads_them(tmp_path):
    (tmp_path / "run.yaml").write_text("max-length: 100\n")
    assert read_settings(tmp_path / "run.yaml").max_length == 100


# ---- lists that repeat ms-swift's


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("num_generations", 4, "GRPO"),
        ("num_generations", "8", None),
        ("quant_bits", 4, "not quantised"),
        ("attn_impl", "flash_attn", "attention_backend"),
        ("sequence_packing_scheduler", "dp_balanced", "packing true"),
        ("vllm_server_port", [8000], None),
        ("vllm_server_port", "8001 8002", "GRPO"),
        ("enable_dft_loss", "false", None),
        ("enable_dft_loss", True, "another trainer"),
        ("temperature", None, None),
        ("temperature", "0.90", None),
        ("temperature", 1.0, "GRPO"),
    ],
)
def test_flags_that_nothing_would_read_are_told(key, value, refused):
    values = {"max_length": 1, "tuner_type": "lora", key: value}
    settings_from(values | {"rlhf_type": "dpo"}, "run.yaml")
    if refused is None:
        settings_from(values, "run.yaml")
        return
    with pytest.raises(UserError, match=refused) as found:
        settings_from(values, "run.yaml")
    assert (found.value.field, found.value.file) == (key, "run.yaml") and "--" not in str(found.value)


def argument_classes() -> list[ast.ClassDef]:
    """BvpoArguments and every class under it, from their source; those whose fields win come first."""
    folder = Path(SWIFT.submodule_search_locations[0])
    files = [*folder.glob("megatron/arguments/*.py"), *folder.glob("arguments/base_args/*.py")]
    files += [folder / "ray_utils/arguments.py", ROOT / "megatron_bvpo/training/arguments.py"]
    nodes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    by_name = {node.name: node for node in nodes}
    found, names = {}, ["BvpoArguments"]
    while names:
        node = by_name[names.pop()]
        found[node.name] = node
        names += [ast.unparse(base) for base in reversed(node.bases) if ast.unparse(base) not in found]
    return list(found.values())


def fields_of(node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    return {i.target.id: i for i in node.body if isinstance(i, ast.AnnAssign)}


@pytest.mark.skipif(SWIFT is None, reason="ms-swift is not installed")
def test_the_list_of_names_is_complete():
    names = {name for node in argument_classes() for name in fields_of(node)}
    assert flag_names() == sorted(names)


@pytest.mark.skipif(SWIFT is None, reason="ms-swift is not installed")
def test_choices_are_the_parsers():
    literals = {}
    for node in argument_classes():
        for name, item in fields_of(node).items():
            literals.setdefault(name, item.annotation)
    for name, allowed in CHOICES.items():
        text = ast.unparse(literals[name])
        listed = ast.literal_eval(text[text.index("Literal[") + 7 :])
        assert [x for x in listed if x is not None] == list(allowed), name


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
        ({"bf16": True, "main_grads_dtype": "bf16", "use_precision_aware_optimizer": True}, 2, 2),
        ({"fp16": True}, 2, 2),
        ({"torch_dtype": "float32", "bf16": "false"}, 4, 4),
    ],
)
def test_bytes_of_an_element(values, parameter, gradient):
    run = settings_from({"max_length": 1, **values})
    assert (run.dtype_bytes, run.grad_bytes) == (parameter, gradient)


@pytest.mark.parametrize("name", ["main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"])
def test_small_dtypes_need_the_precision_aware_optimizer(name):
    small = {"max_length": 1, name: "bf16" if name == "main_grads_dtype" else "fp16"}
    with pytest.raises(UserError, match="with the precision-aware optimizer only") as found:
        settings_from(small)
    assert found.value.field == name
    settings_from({**small, "use_precision_aware_optimizer": True})


def test_a_frozen_router_is_known_and_nothing_else():
    assert settings_from({"max_length": 1, "freeze_parameters_regex": r".*\.router\.weight"}).router_frozen
    with pytest.raises(UserError, match="a frozen router only"):
        settings_from({"max_length": 1, "freeze_parameters_regex": ".*"})


def test_overrides_win(tmp_path):
    (tmp_path / "run.yaml").write_text("max_length: 100\nmicro_batch_size: 4\n")
    assert read_settings(tmp_path / "run.yaml", {"micro_batch_size": "2"}).micro_batch_size == 2
