"""Rows to batches: a template that encodes a trace pair and an empty-trace pair, and collates both.

A batch lays its sequences out as `[c₁…c_Nt, r₁…r_Nt, ec₁…ec_Ne, er₁…er_Ne]`: chosen and rejected of the
trace stream, then of the empty stream. `PairLayout` says how many there are. A row may have lost one
of its pairs, so the two streams need not hold the same rows.

ms-swift builds its template from the model; `make_bvpo_template` turns that very object into one of a
subclass, so every model's own encoding stays in force.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.handover import VERDICT_KEY
from megatron_bvpo.data.reference_cache import pair_key
from megatron_bvpo.data.rows import RowRules, RowVerdict, check_row, normalise_row

LAYOUT_KEY = "bvpo_layout"
ITEMS_KEY = "bvpo_items"
ROW_KEY = "bvpo_row"
WEIGHT_KEY = "bvpo_weight"
UNUSED_KEY = "bvpo_unused"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairLayout:
    """What the sequences of a batch are.

    Attributes:
        rows: for each stream, the row numbers of its pairs, in the batch's order.
        weights: for each stream, 1.0 a pair; 0.0 for a pair that only fills the batch up.
        keys: for each stream, what stands for a tokenised pair (data/reference_cache.py); only where wanted.
        unused: rows that were read before these and could not be used, by reason; only where rows are encoded while
            training.
        members: how many rows the batch holds.
    """

    rows: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[float, ...]]
    keys: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    members: int = 0

    def all_keys(self) -> list[bytes]:
        return [key for keys in self.keys.values() for key in keys]

    def pairs(self, stream: str) -> int:
        return len(self.rows[stream])

    def real_pairs(self, stream: str) -> float:
        """Pairs that count, that is the sum of their weights."""
        return float(sum(self.weights[stream]))

    def slices(self, stream: str) -> tuple[slice, slice]:
        """Sequence ranges of the chosen and of the rejected responses of `stream`."""
        n_t, n_e = self.pairs("trace"), self.pairs("empty")
        start, n = (0, n_t) if stream == "trace" else (2 * n_t, n_e)
        return slice(start, start + n), slice(start + n, start + 2 * n)


@dataclass(frozen=True)
class TemplateSettings:
    """What the template needs to know of the run.

    Attributes:
        rules: which rows and streams are usable.
        block: text of an empty trace.
        mask_block: leave the block's tokens out of the loss. They are the same in both answers, so for
            losses of the plain difference this changes nothing, and for length-normalised ones it must be so.
        keep_items: hand the uncollated rows on with the batch, for probe steps.
        pair_keys: compute what stands for each tokenised pair, for the cache of reference log-probs.
        count_unused: rows are encoded while training; what cannot be used travels with the next row that can.
    """

    rules: RowRules
    block: str
    mask_block: bool = True
    keep_items: bool = False
    pair_keys: bool = False
    count_unused: bool = False


class UnusableRow(ValueError):
    """A row without a usable pair; the text is the reason, without what is particular to the row."""


class Items(list):
    """Uncollated rows. A data loader that pins memory would walk every token id of them."""

    def pin_memory(self) -> Items:
        return self


class BvpoTemplateMixin:
    """Encodes and collates both streams; sits in front of the model's own template class."""

    bvpo: TemplateSettings
    unused: Counter[str]  # rows that could not be used since the last that could

    def encode(self, inputs, return_template_inputs: bool = False, return_length: bool = False):
        if not self.bvpo.count_unused:
            return self._encode_row(inputs, return_template_inputs, return_length)
        try:
            encoded = self._encode_row(inputs, return_template_inputs, return_length)
        except Exception as error:  # whoever asked deals with it; here it is counted
            self.unused[self._reason(error)] += 1
            raise
        encoded[UNUSED_KEY] = dict(self.unused)
        self.unused.clear()
        return encoded

    def _reason(self, error: Exception) -> str:
        """Why a row cannot be used, in words that do not change from row to row."""
        from swift.template import MaxLengthError

        if isinstance(error, MaxLengthError):
            return f"longer than --max_length {self.max_length}"
        if isinstance(error, UnusableRow):
            return str(error)
        return f"cannot be encoded ({type(error).__name__})"

    def _encode_row(self, inputs, return_template_inputs: bool, return_length: bool):
        row = None
        if isinstance(inputs, dict):
            rules = self.bvpo.rules
            said = inputs.get(VERDICT_KEY)  # of streams; others have lost their bad rows by now
            verdict = RowVerdict.from_json(said) if said else check_row(inputs, rules)
            if not verdict.kept:
                raise UnusableRow("; ".join(problem.reason for problem in verdict.problems))
            row = inputs.get(ROW_KEY)
            inputs = normalise_row(inputs, verdict, rules)
        encoded = super().encode(inputs, return_template_inputs, return_length)
        encoded[ROW_KEY] = -1 if row is None else int(row)
        return encoded

    def _rlhf_encode(self, inputs, check_rejected: bool = True) -> dict[str, Any]:
        from swift.template import MaxLengthError  # here: the names of this module are used without ms-swift, too

        streams = self.bvpo.rules.streams
        answers = [inputs.chosen.extra_kwargs.get(k) for k in ("empty_response", "empty_rejected_response")]
        encoded: dict[str, Any] = {}
        if "empty" in streams and None not in answers:
            try:
                for side, answer in zip(SIDES, answers, strict=True):
                    encoded_answer = self._encode_truncated(self._empty_inputs(inputs.chosen, answer))
                    encoded.update({f"empty_{side}_{k}": v for k, v in encoded_answer.items()})
            except MaxLengthError:
                if "trace" not in streams:
                    raise
                encoded = {}  # the trace pair may still fit
        if "trace" in streams:
            encoded = {**super()._rlhf_encode(inputs, check_rejected), **encoded}
        if not encoded:
            raise ValueError("the row has no usable pair")
        return encoded

    def _empty_inputs(self, chosen, answer: str):
        """The prompt of `chosen` with an empty trace and `answer` as its response."""
        inputs = deepcopy(chosen)
        while inputs.messages and inputs.messages[-1]["role"] not in ("user", "tool"):
            inputs.messages.pop()
        # Two messages, because ms-swift then tokenises them apart: that is how the answer was generated
        # (the block stood in the prompt), and it makes the block's last token known.
        inputs.messages += [
            {"role": "assistant", "content": self.bvpo.block, "loss": False if self.bvpo.mask_block else None},
            {"role": "assistant", "content": answer},
        ]
        return inputs

    def data_collator(self, batch, *, padding_to: int | None = None) -> dict[str, Any]:
        collated = super().data_collator(batch, padding_to=padding_to)
        if self.bvpo.keep_items:
            collated[ITEMS_KEY] = Items(batch)
        return collated

    def _rlhf_data_collator(self, batch, *, padding_to: int | None = None, **kwargs) -> dict[str, Any]:
        rows: dict[str, tuple] = {}
        weights: dict[str, tuple] = {}
        keys: dict[str, tuple] = {}
        sequences: list[dict[str, Any]] = []
        for stream, prefix in (("trace", ""), ("empty", "empty_")):
            members = [row for row in batch if f"{prefix}chosen_input_ids" in row]
            rows[stream] = tuple(row.get(ROW_KEY, -1) for row in members)
            weights[stream] = tuple(float(row.get(WEIGHT_KEY, 1.0)) for row in members)
            if self.bvpo.pair_keys:
                tokens = [f"{prefix}{side}_{what}" for side in SIDES for what in ("input_ids", "labels")]
                keys[stream] = tuple(pair_key(*(row[name] for name in tokens)) for row in members)
            for side in SIDES:
                # The collator pads the lists it is given in place; a row may be collated twice.
                sequences += [
                    {k: list(v) if isinstance(v, list) else v for k, v in sequence.items()}
                    for sequence in self._fetch_inputs_startswith(members, f"{prefix}{side}_")
                ]
        collated = self._data_collator(sequences, padding_to=padding_to)
        unused: Counter[str] = Counter()
        for row in batch:
            unused.update(row.get(UNUSED_KEY) or {})
        collated[LAYOUT_KEY] = PairLayout(rows, weights, keys, dict(unused), len(batch))
        return collated

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle (packing workers, dataset fingerprints) must be told how.
        return _rebuild_template, (type(self)._model_template, self.__getstate__())


_CLASSES: dict[type, type] = {}


def _bvpo_class(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Bvpo{base.__name__}", (BvpoTemplateMixin, base), {"_model_template": base})
    return _CLASSES[base]


def _rebuild_template(base: type, state: dict[str, Any]):
    template = object.__new__(_bvpo_class(base))
    template.__dict__.update(state)
    return template


def make_bvpo_template(template, settings: TemplateSettings):
    """Turn ms-swift's template object into one that encodes both streams; returns the same object."""
    if not isinstance(template, BvpoTemplateMixin):
        template.__class__ = _bvpo_class(type(template))
    template.bvpo = settings
    template.unused = Counter()
    return template


def encoded_examples(encoded: dict[str, Any], template) -> list[str]:
    """One line for each sequence of an encoded row: what the model reads, and from where the loss counts."""
    lines = []
    for name in ("chosen", "rejected", "empty_chosen", "empty_rejected"):
        ids, labels = encoded.get(f"{name}_input_ids"), encoded.get(f"{name}_labels")
        if ids is None:
            continue
        first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        prompt, response = template.tokenizer.decode(ids[:first]), template.tokenizer.decode(ids[first:])
        lines.append(f"[{name}] {len(ids)} tokens, loss on the last {len(ids) - first}: {prompt!r} >>> {response!r}")
    return lines
