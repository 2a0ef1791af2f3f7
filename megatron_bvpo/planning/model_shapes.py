"""The sizes of a model, from its Hugging Face config.json or from the copies that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError

SHIPPED = Path(__file__).parent / "shapes"
DENSE_TYPES = ("qwen2", "qwen3")
MOE_TYPES = ("qwen3_moe",)
BY_HAND = (
    "train without a plan: BVPO itself runs the models of ms-swift's Megatron backend. Start from the layout in "
    "configs/ of a model of its size and look at memory(GiB) of the first steps"
)


class UnplannedModelError(UserError):
    """A model whose sizes the plan does not know. The run itself may work, so this refuses the plan alone."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention and gated MLPs, all layers alike.

    Attributes:
        name: the model's name or folder.
        kind: config.json's `model_type`.
        layers, hidden, heads, kv_heads, head_dim, vocab: as in config.json.
        ffn: width of a dense MLP, or of one expert.
        experts: experts per layer; 0: a dense MLP.
        experts_per_token: experts that a token goes through; 0 for a dense model.
        qkv_bias: the query, key and value projections have a bias.
        qk_norm: queries and keys are normalised per head.
        tied: one matrix for the embedding and the output layer.
        max_positions: longest sequence the model was made for.
        new_layers: numbers of the layers that `bvpo expand` has added; () for a model that was not grown.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn: int
    experts: int
    experts_per_token: int
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    new_layers: tuple[int, ...] = ()

    @property
    def layer_matrices(self) -> int:
        """Elements of one layer's attention and dense-MLP (or router) matrices, experts left out."""
        attention = self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads) + self.heads * self.head_dim * (
            self.hidden
        )
        return attention + (self.hidden * self.experts if self.experts else 3 * self.hidden * self.ffn)

    @property
    def expert_matrices(self) -> int:
        """Elements of one expert's three matrices; 0 for a dense model."""
        return 3 * self.hidden * self.ffn if self.experts else 0

    @property
    def total_parameters(self) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        bias = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        layer = self.layer_matrices + self.experts * self.expert_matrices + norms + bias
        return self.layers * layer + self.hidden + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def active_matrices(self) -> int:
        """Elements of the matrices that one token is multiplied with, the output layer left out."""
        return self.layers * (self.layer_matrices + self.experts_per_token * self.expert_matrices)


def shape_from_config(config: dict[str, Any], name: str, file: str | None = None) -> ModelShape:
    """The shape in a config.json's content; raises UnplannedModelError for models whose layers are built otherwise."""
    family = _family(config)
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    kind = str(config.get("model_type"))
    if kind not in (*DENSE_TYPES, *MOE_TYPES):
        raise UnplannedModelError(
            f"is {family}, which the plan does not know{_what_differs(config)}. It knows "
            f"{', '.join((*DENSE_TYPES, *MOE_TYPES))}",
            file=file,
            field="model_type",
            remedy=BY_HAND,
        )
    moe = kind in MOE_TYPES
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UnplannedModelError(
            f"{family}: some layers have experts and some do not, which the plan does not know",
            file=file,
            field="mlp_only_layers",
            remedy=BY_HAND,
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise UserError(f"{key} is missing", file=file, field=key, remedy="name the model's own folder")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{key} is {value!r}; expected a whole number of 1 or more",
                file=file,
                field=key,
                remedy="download the model's config.json again",
            )
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return ModelShape(
        name=name,
        kind=kind,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", max(hidden // heads, 1)),
        vocab=size("vocab_size"),
        ffn=size("moe_intermediate_size" if moe else "intermediate_size"),
        experts=size("num_experts", size("num_local_experts", 0) or None) if moe else 0,
        experts_per_token=size("num_experts_per_tok") if moe else 0,
        # Qwen2 has no key for it, and always has the bias.
        qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=size("max_position_embeddings", 0),
        new_layers=_new_layers(config, file),
    )


def _new_layers(config: dict[str, Any], file: str | None) -> tuple[int, ...]:
    """What `bvpo expand` has written; raises UserError where that names no layers of the model."""
    found, layers = config.get("bvpo_new_layers") or [], config.get("num_hidden_layers")
    if not isinstance(found, list) or not all(n in range(layers) for n in found):
        raise UserError(
            f"is {found!r}; expected numbers of the model's {layers} layers",
            file=file,
            field="bvpo_new_layers",
            remedy="grow the model again with bvpo expand",
        )
    return tuple(found)


def _family(config: dict[str, Any]) -> str:
    """A model's kind as its config.json names it: `'qwen3_5_moe' (Qwen3_5MoeForConditionalGeneration)`."""
    kind, architectures = config.get("model_type"), config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    return repr(kind) + (f" ({named})" if named else "")


def _what_differs(config: dict[str, Any]) -> str:
    """Why sizes of the known families do not fit, where a key of config.json tells."""
    reasons = {
        "linear_num_value_heads": "some of its layers are linear attention",
        "shared_expert_intermediate_size": "every token goes through a shared expert",
        "n_shared_experts": "every token goes through shared experts",
        "kv_lora_rank": "it has latent attention",
    }
    found = [reason for key, reason in reasons.items() if config.get(key)]
    return f" ({', '.join(found)})" if found else ""


def shipped_names() -> dict[str, Path]:
    """Names of the models whose sizes come with the package, by the last part of the name in lower case."""
    return {file.stem.lower(): file for file in sorted(SHIPPED.glob("*.json"))}


def model_shape(model: str, *, beside: Path | None = None) -> ModelShape:
    """The shape of `model`: a folder with a config.json, the file itself, or the name of a shipped one.

    Args:
        beside: a folder against which a relative path is tried too, the YAML file's.

    Raises:
        UnplannedModelError: neither a folder with a config.json nor a known name, or a family that is not planned.
        UserError: a config.json that cannot be read or lacks a size.
    """
    for folder in [Path(model).expanduser(), *([beside / model] if beside else [])]:
        file = folder if folder.suffix == ".json" else folder / "config.json"
        if file.is_file():
            return shape_from_config(_read_json(file), name=model, file=str(file))
    known = shipped_names()
    file = known.get(model.rstrip("/").rsplit("/", 1)[-1].lower())
    if file is None:
        raise UnplannedModelError(
            f"{model!r} is no folder with a config.json, and none of the models that come with the package: "
            + ", ".join(path.stem for path in known.values()),
            field="model",
            remedy="download the model's config.json alone and name it: bvpo plan … --model FOLDER",
        )
    return shape_from_config(_read_json(file), name=model, file=str(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"cannot be read as JSON: {e}", file=str(file), remedy="download it again") from None
    if not isinstance(found, dict):
        raise UserError("holds no JSON object", file=str(file), remedy="download it again")
    return found
