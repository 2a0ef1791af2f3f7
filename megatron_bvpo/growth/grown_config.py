"""Which models can be grown, and the config.json of a grown one."""

from __future__ import annotations

from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.tensor_files import ModelFiles, read_json
from megatron_bvpo.growth.layer_choice import new_numbers

KINDS = ("qwen2", "qwen3", "qwen3_moe", "qwen2_moe")
# In config.json of a grown model: the numbers of its new layers. Runs and plans read it.
NEW_LAYERS = "bvpo_new_layers"
NOTE = "expansion.json"
FIELD = "MODEL"


def require_known(model: ModelFiles) -> int:
    """The number of layers of a model that can be grown.

    Raises:
        UserError: of another kind, grown already, quantised, or with layers that are not all alike.
    """
    config, file = model.config, str(model.folder / "config.json")

    def refuse(field: str, message: str, remedy: str) -> UserError:
        return UserError(message, file=file, field=field, remedy=remedy)

    if config.get("model_type") not in KINDS:
        raise refuse(
            "model_type",
            f"is {config.get('model_type')!r}; what its layers add to the residual stream is known of "
            f"{', '.join(KINDS)} only",
            "grow one of these",
        )
    _require_not_grown(model, refuse)
    if config.get("quantization_config"):
        raise refuse("quantization_config", "the model is quantised", "give the same model in bfloat16")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise refuse("num_hidden_layers", f"is {layers!r}; expected a whole number", "copy the model again")
    unlike = {
        "mlp_only_layers": "some layers have experts and some do not",
        "use_sliding_window": "some layers see a window of the text and some all of it",
    }
    for field, why in unlike.items():
        if config.get(field):
            raise refuse(field, why, "grow a model whose layers are alike")
    if config.get("decoder_sparse_step", 1) != 1:
        raise refuse("decoder_sparse_step", unlike["mlp_only_layers"], "grow a model whose layers are alike")
    types = config.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        raise refuse("layer_types", f"is {types!r}; expected a list of names", "copy the model again")
    if types and (len(types) != layers or len(set(types)) > 1):
        raise refuse(
            "layer_types",
            f"names {len(types)} layers of {len(set(types))} kinds",
            "grow a model whose layers are alike",
        )
    return layers


def _require_not_grown(model: ModelFiles, refuse) -> None:
    if NEW_LAYERS not in model.config and not (model.folder / NOTE).exists():
        return
    made_of = read_json(model.folder / NOTE).get("model") or "it was made of"
    raise refuse(
        NEW_LAYERS,
        "the model is grown already, and a layer between a new one and its neighbour would leave open which layers "
        "are the old model",
        f"grow the model {made_of} at all its places at once",
    )


def grown_config(config: dict[str, Any], places: list[int]) -> dict[str, Any]:
    """The config of the model with new layers at `places`; every other key as it was."""
    layers = config["num_hidden_layers"]
    found = dict(config)
    found["num_hidden_layers"] = layers + len(places)
    if config.get("layer_types"):
        found["layer_types"] = config["layer_types"] + config["layer_types"][:1] * len(places)
    if config.get("max_window_layers") == layers:  # "all of them", which some engines compare
        found["max_window_layers"] = layers + len(places)
    found[NEW_LAYERS] = sorted(new_numbers(places, layers)[1].values())
    return found
