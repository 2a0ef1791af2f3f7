"""Log-probs of a few rows: what was trained against what was exported, both by transformers in float32 on this machine.

What was trained is the base model with the checkpoint's adapter in peft, whose log-probs are those of the run's own
evaluation (tests/distributed/test_saved_models.py), or the checkpoint's whole model. What was exported is read from its
new folder: a whole model as it is, an adapter by adding each pair of factors to the weights that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.adapter import Adapter, updates
from megatron_bvpo.export.sources import Source
from megatron_bvpo.export.tensor_files import ModelFiles
from megatron_bvpo.launching.adapter_folders import CONFIG

ROWS, TOKENS = 10, 1024
# Exported log-probs may differ from the trained ones by this share of what training moved them.
TOLERANCE = 0.1
# Rounding of float32 itself, a token.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Differences of tokens' log-probs: exported and trained, and what training moved them."""

    rows: int
    tokens: int
    largest: float
    mean: float
    mean_moved: float

    @property
    def agrees(self) -> bool:
        return self.mean <= max(ROUNDING, TOLERANCE * self.mean_moved)

    def lines(self) -> list[str]:
        said = [
            f"check: {self.tokens} tokens of {self.rows} rows: the exported log-probs differ from the trained ones by "
            f"at most {self.largest:.1e}, {self.mean:.1e} on average; training moved them by {self.mean_moved:.1e}"
        ]
        if not self.agrees:
            said.append(
                f"check: that is more than {TOLERANCE:.0%} of what training did. A merge into bfloat16 weights rounds "
                "small updates away: serve the adapter instead. Else do not use this export."
            )
        return said


def sequences_of(base: ModelFiles, rows_file: str) -> list[tuple[Tensor, int]]:
    """(ids, how many of them the prompt has) of the first rows of a file; before anything is written.

    Raises:
        UserError: rows that cannot be used, or a machine that cannot hold the model in float32.
    """
    _require_memory(base)
    return list(_sequences(base.folder, rows_file))


def check(source: Source, exported: Path, base: ModelFiles, sequences: list[tuple[Tensor, int]]) -> Comparison:
    """Compare the log-probs of sequences.

    Raises:
        UserError: a model that transformers cannot load, or an adapter without peft's form.
    """
    if source.kind == "adapter":
        moved, trained = _with_peft(source, base, sequences)
        if (exported / CONFIG).is_file():
            found = _logps(_with_factors(base, Adapter(exported)), sequences)
        else:
            found = _logps(_load(exported), sequences)
    else:
        moved = _logps(_load(base.folder), sequences)
        trained, found = _logps(_load(source.folder), sequences), _logps(_load(exported), sequences)
    off, step = (found - trained).abs(), (trained - moved).abs()
    return Comparison(len(sequences), len(off), off.max().item(), off.mean().item(), step.mean().item())


def _require_memory(base: ModelFiles) -> None:
    import psutil

    needed = 4 * sum(entry.parameters for entry in base.entries.values())
    available = psutil.virtual_memory().available
    if needed > 0.8 * available:
        raise UserError(
            f"the model takes {needed / 2**30:.0f} GiB in float32, and {available / 2**30:.0f} GiB are available",
            field="--check",
            remedy="check on a machine with more memory, or leave --check out",
        )


def _sequences(folder: Path, rows_file: str) -> Iterator[tuple[Tensor, int]]:
    """(ids, how many of them the prompt has) of the first rows' chosen responses."""
    from itertools import islice

    from transformers import AutoTokenizer

    from megatron_bvpo.data.readers import read_rows

    if not Path(rows_file).is_file():
        raise UserError(f"there is no file {rows_file}", field="--check")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # of a damaged tokenizer, whatever its reader raises
        raise UserError(f"its tokenizer cannot be loaded ({_told(e)})", file=str(folder), field="--check") from e
    texts = (found for _, row in read_rows(rows_file) if (found := _texts(row, tokenizer)) is not None)
    n = 0
    for n, (prompt, response) in enumerate(islice(texts, ROWS), start=1):  # noqa: B007
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"][-TOKENS // 2 :]
        ids = given + tokenizer(response, add_special_tokens=False)["input_ids"][: TOKENS - len(given)]
        yield torch.tensor(ids), len(given)
    if not n:
        raise UserError(
            "no row has messages that end in a response, or an empty_response",
            file=rows_file,
            field="--check",
            remedy="give rows as a run takes them: bvpo rows FILE says what is wrong with them",
        )


def _texts(row: Any, tokenizer) -> tuple[str, str] | None:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return None
    *prompt, last = messages
    response = last.get("content") if last.get("role") == "assistant" else row.get("empty_response")
    prompt = prompt if last.get("role") == "assistant" else messages
    if not prompt or not isinstance(response, str) or not response:
        return None
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), response


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as e:  # a family that it does not know, code that it may not run
        raise UserError(
            f"transformers cannot load it ({_told(e)})",
            file=str(folder),
            field="--check",
            remedy="leave --check out; the export itself needs no transformers",
        ) from e


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _logps(model: nn.Module, sequences: list[tuple[Tensor, int]]) -> Tensor:
    """Log-probs of all responses' tokens, one after the other, float64."""
    found = []
    with torch.no_grad():
        for ids, given in sequences:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, given - 1 : -1]
            found.append(logits.double().log_softmax(-1).gather(1, ids[given:, None])[:, 0])
    return torch.cat(found)


def _with_peft(source: Source, base: ModelFiles, sequences) -> tuple[Tensor, Tensor]:
    """The base's own log-probs, and those with the checkpoint's adapter."""
    import warnings

    from peft import PeftModel

    folder = source.checkpoint if (source.checkpoint / CONFIG).is_file() else source.folder
    if folder == source.folder and any(".experts." in path for path in Adapter(folder).factors):
        # A mixture's checkpoint has peft's form above the engine's.
        raise UserError(
            "the adapter has no form for peft here, so that nothing on this machine computes what was trained",
            file=str(source.checkpoint),
            field="--check",
            remedy="give the checkpoint itself, not a folder below it; a run's next save writes a form that is missing",
        )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of layers whose parameters are targeted
        model = PeftModel.from_pretrained(_load(base.folder), folder, autocast_adapter_dtype=False).eval()
    with model.disable_adapter():
        moved = _logps(model, sequences)
    return moved, _logps(model, sequences)


def _with_factors(base: ModelFiles, adapter: Adapter) -> nn.Module:
    model = _load(base.folder)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, changes in updates(adapter, shapes, str(base.folder), _transposed(model)).items():
            weight = parameters[name]
            rows = weight.view(-1, weight.shape[-1])
            for change in changes:
                lora_a, lora_b = adapter.delta(change.path)
                rows[change.first : change.first + len(lora_b)] += (lora_b @ lora_a).to(weight.dtype)
    return model


def _transposed(model: nn.Module) -> Callable[[str], Any]:
    return lambda experts: getattr(model.get_submodule(experts), "is_transposed", True)
