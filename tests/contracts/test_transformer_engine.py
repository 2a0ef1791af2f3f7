"""The stand-ins against Transformer Engine's own sources: names, parameters, defaults, attributes of parameters.

What its GPU code computes cannot be compared without a GPU. What can: that the hosts' calls mean the same thing to
both, and that parameters carry the same marks, on which Megatron's reductions and norms depend.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_bvpo.rehearsal import install
from tests.contracts import engine_sources

install(device=False, transformer_engine=True)

import transformer_engine  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402

WHEEL = engine_sources.wheel()
pytestmark = pytest.mark.skipif(WHEEL is None, reason="Transformer Engine's wheel is not to be had (no index?)")

STAND_INS = engine_sources.Sources.of_folder(Path(transformer_engine.__file__).parent)
REAL = engine_sources.Sources.of_wheel(WHEEL) if WHEEL else None


def package_folder(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


USED = engine_sources.names_that_hosts_use(
    [package_folder("megatron.core"), package_folder("mcore_bridge"), package_folder("swift.megatron")]
)
NAMES = [f"{module}.{name}" for module, name in sorted(USED)]

# Names that Transformer Engine has, a host uses and the stand-ins lack: the hosts import them in a `try`, or in a
# function that no rehearsal calls. By the start of the full name.
LACKING = {
    "transformer_engine.pytorch.Float8Block": "8-bit parameters",
    "transformer_engine.pytorch.cpu_offload": "activations offloaded to the host, refused by the wrapper",
    "transformer_engine.pytorch.attention.rope.apply_fused_qkv_rotary_pos_emb": "fused rotary embedding of q and k",
    "transformer_engine.pytorch.constants.TE_DType": "inference",
    "transformer_engine.pytorch.cpp_extensions.": "compiled functions",
    "transformer_engine.pytorch.cross_entropy.": "--cross_entropy_fusion_impl te: BVPO has its own log-probs",
    "transformer_engine.pytorch.distributed.gather_along_first_dim": "inference",
    "transformer_engine.pytorch.distributed.reduce_scatter_along_first_dim": "inference",
    "transformer_engine.pytorch.graph.": "CUDA graphs",
    "transformer_engine.pytorch.module.layernorm_linear.general_gemm": "batch-invariant kernels",
    "transformer_engine.pytorch.module.linear.general_gemm": "batch-invariant kernels",
    "transformer_engine.pytorch.ops.": "the op fuser, refused by Sequential",
    "transformer_engine.pytorch.tensor.utils.": "8-bit parameters",
    "transformer_engine.pytorch.utils.make_weak_ref": "CUDA graphs",
}
# The same for what only megatron-core 0.18 and later use.
LACKING_FOR_NEWER_HOSTS = {
    **{
        f"transformer_engine.pytorch.{name}": "8-bit and 4-bit parameters"
        for name in (
            "constants.MXFP8_BLOCK_SCALING_SIZE",
            "constants.NVFP4_BLOCK_SCALING_SIZE",
            "distributed._NVFP4AllGatherAsyncHandle",
            "quantized_tensor.QuantizedTensor",
            "tensor.MXFP8TensorStorage",
            "tensor.NVFP4TensorStorage",
            "tensor.grouped_tensor.GroupedTensor",
            "tensor.mxfp8_tensor.MXFP8Quantizer",
            "utils.round_up_to_nearest_multiple",
        )
    },
    "transformer_engine.pytorch.ep": "NCCL's own expert parallelism, a dispatcher that has to be asked for",
    "transformer_engine.pytorch.permutation.moe_permute_and_pad_with_probs": "8-bit experts",
    "transformer_engine.pytorch.utils.nvtx_range_": "marks for a profiler",
}
if importlib.metadata.version("megatron-core") >= "0.19":
    LACKING |= LACKING_FOR_NEWER_HOSTS
# Names of older releases, which the stand-ins keep for hosts that look there first.
OLDER = {
    "transformer_engine.pytorch.attention._SplitAlongDim",
    "transformer_engine.pytorch.attention.apply_rotary_pos_emb",
}
# Whole functions and classes whose parameters are not compared.
NOT_COMPARED = {
    "transformer_engine.common.recipe.": "FP8 recipes: refused whatever they are called with",
    "transformer_engine.pytorch.router.": "refused whatever they are called with",
    "transformer_engine.pytorch.ops.": "activations called as op(x); the fuser is refused",
    "transformer_engine.pytorch.distributed.activation_recompute_forward": "a class there, a function here; both are "
    "called with the same two names, and compared as such below",
    "transformer_engine.pytorch.distributed.checkpoint": "the options hide in **kwargs there",
    "transformer_engine.pytorch.attention.dot_product_attention.utils.FlashAttentionUtils": "read, never called",
}
# Parameters that only one side has: `name.method(parameter)`, and why.
ONE_SIDED = {
    **{
        f"DotProductAttention.forward({name})": "newer than any host here: a call with it would fail"
        for name in "score_mod score_mod_bprop score_mod_tensors score_mod_bprop_tensors".split()
    },
    **{
        what: "newer than the pinned release; refused whatever it is"
        for what in (
            "DotProductAttention.__init__(softcap)",
            "DotProductAttention.forward(softcap)",
            "DotProductAttention.forward(bf16_backward)",
            "GroupedLinear.__init__(use_grouped_tensor)",
            "GroupedLinear.forward(out)",
            "GroupedLinear.forward(dgrad_out)",
        )
    },
    **{
        f"{norm}.__init__({name})": "passed on in **kwargs there"
        for norm in ("RMSNorm", "LayerNorm")
        for name in ("device", "dtype", "sm_margin", "kwargs")
    },
    **{
        f"{norm}.forward({name})": "for the op fuser, which is refused here"
        for norm in ("RMSNorm", "LayerNorm")
        for name in ("extra_inputs", "kwargs")
    },
}
# Defaults that differ: why.
OTHER_DEFAULTS = {
    **{
        f"DotProductAttention.set_context_parallel_group({name})": "hosts give all of them; optional here for tests"
        for name in ("cp_global_ranks", "cp_stream")
    },
    "FusedAdam.initialize_state(store_param_remainders)": "optional here for the stand-in's own calls",
    "FusedSGD.__init__(lr)": "torch's own `required` there",
}


def reason(table: dict[str, str], full_name: str) -> str | None:
    return next((why for start, why in table.items() if full_name.startswith(start)), None)


def split(full_name: str) -> tuple[str, str]:
    module, _, name = full_name.rpartition(".")
    return module, name


@pytest.mark.parametrize("full_name", NAMES)
def test_the_stand_ins_have_what_the_hosts_use(full_name):
    real, ours = REAL.find(*split(full_name)), STAND_INS.find(*split(full_name))
    if real is not None and ours is None:
        assert reason(LACKING, full_name), f"{full_name} is used by {USED[split(full_name)]} and has no stand-in"
    if ours is not None and real is None:
        assert full_name in OLDER, f"{full_name}: Transformer Engine {engine_sources.pinned_version()} has no such name"


def test_the_tables_name_what_is_there():
    """No reason for what no longer differs."""
    lacking = {n for n in NAMES if REAL.find(*split(n)) is not None and STAND_INS.find(*split(n)) is None}
    assert [start for start in LACKING if not any(n.startswith(start) for n in lacking)] == []
    assert [start for start in NOT_COMPARED if not any(n.startswith(start) for n in NAMES)] == []
    used = {found for name in COMPARED for found in one_sided(name) | other_defaults(name)}
    assert used == ONE_SIDED.keys() | OTHER_DEFAULTS.keys()


# ------------------------------------------------------------------------------------------------ parameters


def comparable(full_name: str) -> bool:
    real, ours = REAL.find(*split(full_name)), STAND_INS.find(*split(full_name))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return bool(real and ours) and isinstance(real.node, kinds) and reason(NOT_COMPARED, full_name) is None


COMPARED = [name for name in NAMES if REAL and comparable(name)]


def signatures(full_name: str) -> dict[str, tuple[inspect.Signature, inspect.Signature]]:
    """What is called → (the real signature, the stand-in's), for each public method that both classes have."""
    real, ours = REAL.find(*split(full_name)), STAND_INS.find(*split(full_name))
    name = split(full_name)[1]
    if isinstance(real.node, ast.FunctionDef):
        return {name: (REAL.signature(real), STAND_INS.signature(ours))}
    methods = {item.name for item in ours.node.body if isinstance(item, ast.FunctionDef)} | {"__init__", "forward"}
    public = sorted(m for m in methods if m == "__init__" or not m.startswith("_"))
    pairs = {f"{name}.{m}": (REAL.signature(real, m), STAND_INS.signature(ours, m)) for m in public}
    return {what: pair for what, pair in pairs.items() if None not in pair}


def one_sided(full_name: str) -> set[str]:
    return {
        f"{what}({parameter})"
        for what, (real, ours) in signatures(full_name).items()
        for parameter in real.parameters.keys() ^ ours.parameters.keys()
    }


def other_defaults(full_name: str) -> set[str]:
    return {
        f"{what}({name})"
        for what, (real, ours) in signatures(full_name).items()
        for name in real.parameters.keys() & ours.parameters.keys()
        if not same_default(real.parameters[name].default, ours.parameters[name].default)
    }


def same_default(a, b) -> bool:
    """Both as source text: 1e-05 and 1e-5 are the same."""
    if inspect.Parameter.empty in (a, b):
        return a is b
    try:
        return ast.literal_eval(a) == ast.literal_eval(b)
    except ValueError:
        return a == b


@pytest.mark.parametrize("full_name", COMPARED)
def test_parameters_and_defaults_are_the_real_ones(full_name):
    assert signatures(full_name) or not isinstance(REAL.find(*split(full_name)).node, ast.FunctionDef)
    assert one_sided(full_name) <= ONE_SIDED.keys()
    assert other_defaults(full_name) <= OTHER_DEFAULTS.keys()


@pytest.mark.parametrize("full_name", COMPARED)
def test_common_parameters_come_in_the_real_order(full_name):
    """A positional argument must mean the same to both."""
    for what, (real, ours) in signatures(full_name).items():
        common = [name for name in ours.parameters if name in real.parameters]
        assert common == [name for name in real.parameters if name in ours.parameters], what
        kinds = {name: ours.parameters[name].kind for name in common}
        assert kinds == {name: real.parameters[name].kind for name in common}, what


def test_recompute_marks_take_the_two_names_that_hosts_give():
    real = REAL.find("transformer_engine.pytorch.distributed", "activation_recompute_forward")
    ours = inspect.signature(te.distributed.activation_recompute_forward)
    assert list(REAL.signature(real, "__init__").parameters) == list(ours.parameters)


# ------------------------------------------------------------------------------------- attributes of parameters

LAYERS = {
    "Linear": ("reset_parameters", ["weight"], ["bias"], dict(in_features=8, out_features=8)),
    "LayerNormLinear": ("reset_parameters", ["weight"], ["bias"], dict(in_features=8, out_features=8)),
    "GroupedLinear": (
        "set_tensor_parallel_attributes",
        ["weight0", "weight1"],
        ["bias0", "bias1"],
        dict(num_gemms=2, in_features=8, out_features=8),
    ),
}
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def marks(parameter) -> dict:
    return {name: getattr(parameter, name) for name in MARKS if hasattr(parameter, name)}


class _OnlyMarks(ast.NodeTransformer):
    """Leaves of a function what sets attributes on parameters, and the conditions and loops around it."""

    def visit_Expr(self, node):
        text = ast.unparse(node)
        wanted = text.startswith("set_tensor_model_parallel_attributes(") or (
            text.startswith("setattr(") and "sequence_parallel" in text
        )
        return node if wanted else None


def real_marks(layer: str, attributes: dict) -> dict[str, dict]:
    """What the real class's own statements would set on parameters of a layer with these attributes."""
    method, weights, biases, _ = LAYERS[layer]
    found = REAL.find("transformer_engine.pytorch", layer)
    node = next(item for item in found.node.body if isinstance(item, ast.FunctionDef) and item.name == method)
    body = [_OnlyMarks().visit(item) for item in node.body]
    body = [item for item in body if isinstance(item, ast.If) and "parallel" in ast.unparse(item)]
    assert body, f"{layer}.{method} no longer sets attributes: look where it does now"
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in [*weights, *biases]}
    if layer == "LayerNormLinear":
        parameters["layer_norm_weight"] = torch.nn.Parameter(torch.zeros(1))
        attributes = {**attributes, "normalization": "RMSNorm"}
    me = SimpleNamespace(weight_names=weights, bias_names=biases, num_gemms=len(weights), **parameters, **attributes)
    if layer == "GroupedLinear":
        me.weight = me.bias = None
    helper = REAL.find("transformer_engine.pytorch.distributed", "set_tensor_model_parallel_attributes").node
    names = {"self": me, "defer_init": False, "_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS": {}}
    for part in ([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), helper], body):
        exec(compile(ast.fix_missing_locations(ast.Module(part, [])), str(WHEEL), "exec"), {**names}, names)
    return {name: marks(parameter) for name, parameter in parameters.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("parallel_mode", ["column", "row", None])
@pytest.mark.parametrize("layer", LAYERS)
def test_parameters_carry_the_real_marks(layer, parallel_mode, sequence_parallel):
    if layer == "LayerNormLinear" and parallel_mode == "row":
        pytest.skip("there is no row-parallel LayerNormLinear")
    _, weights, biases, sizes = LAYERS[layer]
    # A group is not needed for the marks; GroupedLinear has no bias under tensor parallelism.
    tp_size = 1 if layer == "GroupedLinear" else 2
    more = {"normalization": "RMSNorm"} if layer == "LayerNormLinear" else {}
    ours = getattr(te, layer)(
        **sizes, **more, tp_size=tp_size, parallel_mode=parallel_mode, sequence_parallel=sequence_parallel
    )
    expected = real_marks(
        layer,
        dict(use_bias=True, parallel_mode=parallel_mode, sequence_parallel=tp_size > 1 and sequence_parallel),
    )
    found = {name: marks(parameter) for name, parameter in ours.named_parameters()}
    assert found == expected


# ------------------------------------------------------------------------------------------ fused weight gradients

# What of a weight the layers look at, or set, when they write its gradient: known to the stand-in, or not needed.
KNOWN_TO_THE_STAND_IN = {"grad_added_to_main_grad", "overwrite_main_grad", "zero_out_wgrad"}
OF_OTHERS = {
    "__fsdp_param__": "Megatron's own FSDP, which ms-swift does not use",
    "split_into_quantized_tensors": "8-bit parameters",
}


def attributes_of_weights(tree: ast.Module) -> set[str]:
    """Names that `hasattr` and `getattr` ask of something called a weight."""
    asked = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
    )
    return {call.args[1].value for call in asked if "weight" in ast.unparse(call.args[0]) and _is_text(call.args[1])}


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("module", ["linear", "layernorm_linear", "grouped_linear"])
def test_a_fused_gradient_depends_on_the_attributes_that_the_stand_in_knows(module):
    found = attributes_of_weights(REAL.trees[f"transformer_engine.pytorch.module.{module}"])
    assert KNOWN_TO_THE_STAND_IN <= found <= KNOWN_TO_THE_STAND_IN | OF_OTHERS.keys()
