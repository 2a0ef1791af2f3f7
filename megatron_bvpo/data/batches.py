"""Rows to batches: a template that encodes what a row has for each stream of the run, and collates all of it.

A batch lays its sequences out stream by stream, in the table's order, and within a stream side by side:
`[c₁…c_Nt, r₁…r_Nt, ec₁…ec_Ne, er₁…er_Ne, …]`. `BatchLayout` says how many there are. A row need not take part in
every stream, so the streams need not hold the same rows.

ms-swift builds its template from the model; `make_bvpo_template` turns that very object into one of a
subclass, so every model's own encoding stays in force.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.encoded_rows import has_stream, right_key
from megatron_bvpo.data.handover import SOURCE_KEY, VERDICT_KEY
from megatron_bvpo.data.pair_checks import Account, Loss, Pair, PairRules, check_pairs
from megatron_bvpo.data.reference_cache import pair_key
from megatron_bvpo.data.rows import ALONE_KEY, STREAMS_KEY, RowRules, RowVerdict, check_row, normalise_row
from megatron_bvpo.data.verdicts import LABELS, member_of
from megatron_bvpo.streams import TABLE, sides_of

LAYOUT_KEY = "bvpo_layout"
ITEMS_KEY = "bvpo_items"
ROW_KEY = "bvpo_row"
WEIGHT_KEY = "bvpo_weight"
UNUSED_KEY = "bvpo_unused"
WHOLE_ROW = "row"
ACCOUNT_KEY = "bvpo_account"


@dataclass(frozen=True)
class BatchLayout:
    """What the sequences of a batch are. A stream's members are its pairs, or its demonstrations.

    Attributes:
        rows: for each stream of the run, the row numbers of its members, in the batch's order.
        weights: for each stream, 1.0 a member; 0.0 for one that only fills the batch up.
        tokens: for each stream that demonstrates, the counted tokens of its members.
        right: for each stream of single responses, whether they are right.
        keys: for each stream that has a reference, what stands for a tokenised pair (data/reference_cache.py); only
            where wanted.
        unused: what was lost of rows that were read before these, and of these, by (`row`, or the stream of a member
            alone; reason); only where rows are encoded while training.
        members: how many rows the batch holds.
    """

    rows: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[float, ...]]
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    right: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    keys: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    unused: dict[tuple[str, str], int] = field(default_factory=dict)
    members: int = 0

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def compared(self, *values_Q):
        """Of numbers of the batch's sequences, those of sequences that a loss compares with the reference."""
        if not self.tokens:
            return values_Q
        parts = [range(part.start, part.stop) for s in self.rows if s not in self.tokens for part in self.slices(s)]
        places = [i for part in parts for i in part]
        return tuple(values[places] for values in values_Q)

    def all_keys(self) -> list[bytes]:
        return [key for keys in self.keys.values() for key in keys]

    def count(self, stream: str) -> int:
        return len(self.rows[stream])

    def real_count(self, stream: str) -> float:
        """What its mean is taken over: pairs that count, or counted tokens of demonstrations that do."""
        weights = self.weights[stream]
        if stream not in self.tokens:
            return float(sum(weights))
        return float(sum(weight * n for weight, n in zip(weights, self.tokens[stream], strict=True)))

    def slices(self, stream: str) -> tuple[slice, ...]:
        """Sequence ranges of the stream's sides: of a pair, the chosen and the rejected responses."""
        start = 0
        for name in self.rows:
            n, sides = self.count(name), len(sides_of(name, unpaired=name in self.right))
            if name == stream:
                return tuple(slice(start + i * n, start + (i + 1) * n) for i in range(sides))
            start += n * sides
        raise KeyError(stream)


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
        count_unused: rows are encoded while training: what is lost travels with the next row that is used.
        tell_losses: and is told, each of the first rows in a line.
    """

    rules: RowRules
    block: str
    mask_block: bool = True
    keep_items: bool = False
    pair_keys: bool = False
    count_unused: bool = False
    tell_losses: bool = True


class Items(list):
    """Uncollated rows. A data loader that pins memory would walk every token id of them."""

    def pin_memory(self) -> Items:
        return self


class BvpoTemplateMixin:
    """Encodes and collates the streams; sits in front of the model's own template class, which only a subclass can do:
    ms-swift makes its templates by class, and calls them by their methods."""

    bvpo: TemplateSettings
    unused: Counter[tuple[str, str]]  # what was lost since the last row that was used

    def encode(self, inputs, return_template_inputs: bool = False, return_length: bool = False):
        """The row's pairs, tokenised. Raises ms-swift's MaxLengthError where none is left: that one it passes over."""
        from swift.template import MaxLengthError  # here: the names of this module are used without ms-swift, too

        counts = self.unused if self.bvpo.count_unused else Counter()
        try:
            encoded, account = self.encode_with_account(inputs, return_template_inputs, return_length)
        except Exception as error:  # whoever asked deals with it; here it is counted
            counts[WHOLE_ROW, f"cannot be encoded ({type(error).__name__})"] += 1
            raise
        if account.lost and self.bvpo.count_unused and self.bvpo.tell_losses:
            self._tell(inputs, account)
        if not account.pairs:
            counts[WHOLE_ROW, next(iter(account.lost.values())).reason] += 1
            raise MaxLengthError("; ".join(f"{member_of(stream)}: {loss}" for stream, loss in account.lost.items()))
        if self.bvpo.count_unused:
            counts.update((stream, loss.reason) for stream, loss in account.lost.items())
            counts.update(_lost_when_judged(inputs))
            encoded[UNUSED_KEY] = dict(counts)
            counts.clear()
        return encoded

    def encode_with_account(
        self, inputs, return_template_inputs: bool = False, return_length: bool = False
    ) -> tuple[dict[str, Any], Account]:
        """The row's pairs as `encode` gives them, none where none is left, and what became of each."""
        row = None
        if isinstance(inputs, dict):
            rules = self.bvpo.rules
            said = inputs.get(VERDICT_KEY)  # of streams; others have lost their bad rows by now
            verdict = RowVerdict.from_json(said) if said else check_row(inputs, rules)
            if not verdict.kept:
                problem = verdict.decisive
                loss = Loss(problem.reason, problem.remedy, problem.found)
                return {}, Account(lost=dict.fromkeys(rules.streams, loss))
            row = inputs.get(ROW_KEY)
            inputs = normalise_row(inputs, verdict, rules)
        encoded = super().encode(inputs, return_template_inputs, return_length)
        encoded[ROW_KEY] = -1 if row is None else int(row)
        return encoded, encoded.pop(ACCOUNT_KEY)

    def _tell(self, inputs, account: Account) -> None:
        """One line for each of the first rows that lose a pair in this process, later for every thousandth."""
        from swift.utils import get_logger

        self._told = getattr(self, "_told", 0) + 1
        if self._told > 10 and self._told % 1000:
            return
        name = row_in_words(inputs) if isinstance(inputs, dict) else "a row"
        losses = "; ".join(f"its {member_of(stream)} is not trained: {loss}" for stream, loss in account.lost.items())
        # `_if`: ms-swift's logger is quiet on all but the first rank of a node, and each rank reads rows of its own.
        get_logger().warning_if(f"{name}: {losses} ({self._told} such rows in this process so far)", cond=True)

    def _rlhf_encode(self, inputs, check_rejected: bool = True) -> dict[str, Any]:
        streams, mine = self.bvpo.rules.streams, inputs.chosen.extra_kwargs.get(STREAMS_KEY)
        mine = tuple(stream for stream in streams if mine is None or stream in mine)  # a gate may have chosen
        with self._without_limit():
            whole = self._whole_pairs(inputs, mine)
        pairs, account = check_pairs(whole, self._pair_rules)
        if "trace" not in mine:
            account = account.only(mine)
        encoded: dict[str, Any] = {ACCOUNT_KEY: account}
        for stream in streams:
            for side in self._sides(stream):
                sequence = pairs[stream][side] if stream in pairs else {"length": 0}
                encoded.update({f"{TABLE[stream].key_prefix}{side}_{key}": v for key, v in sequence.items()})
        if self.bvpo.rules.unpaired:
            given = inputs.chosen.extra_kwargs | {"label": inputs.chosen.label}
            encoded.update({right_key(stream): given.get(LABELS[stream]) for stream in streams if stream in LABELS})
        return encoded

    def _sides(self, stream: str) -> tuple[str, ...]:
        return sides_of(stream, unpaired=self.bvpo.rules.unpaired)

    def _whole_pairs(self, inputs, streams: tuple[str, ...]) -> dict[str, Pair]:
        """What the row has for these streams; a trace pair also where only its prompts are needed."""
        if inputs.rejected is None:
            raise ValueError("the row has no rejected response")
        given = inputs.chosen.extra_kwargs
        others: dict[str, Pair] = {}
        # First, because encoding changes the messages of the trace pair.
        for stream in streams:
            sides = self._sides(stream)
            responses = [given.get(name) for name in TABLE[stream].fields[: len(sides)]]
            if stream != "trace" and None not in responses:
                written = zip(sides, responses, strict=True)
                others[stream] = {side: self._encode_beside(inputs.chosen, stream, text) for side, text in written}
        alone = given.get(ALONE_KEY)
        if self.bvpo.rules.unpaired:  # the rejected side stands for nothing
            if "trace" in streams and not alone:
                trace = self._encode_truncated(_count_responses_only(inputs.chosen, 1))
                return {"trace": {"response": trace}, **others}
            return others
        one_prompt = alone or _prompt_fields(inputs.chosen) == _prompt_fields(inputs.rejected)
        if ("trace" in streams and not alone) or not one_prompt:
            sides = TABLE["trace"].sides
            trace = {side: self._encode_truncated(_count_responses_only(getattr(inputs, side), 1)) for side in sides}
            return {"trace": trace, **others}
        return others

    def _encode_beside(self, chosen, stream: str, response: str) -> dict[str, Any]:
        """The prompt of `chosen` with another response; of the empty stream with an empty trace in front of it."""
        inputs = deepcopy(chosen)
        while inputs.messages and inputs.messages[-1]["role"] not in ("user", "tool"):
            inputs.messages.pop()
        # The block is a message of its own, because ms-swift then tokenises the two apart: that is how the answer was
        # generated (the block stood in the prompt), and it makes the block's last token known.
        texts = [self.bvpo.block, response] if stream == "empty" else [response]
        inputs.messages += [{"role": "assistant", "content": text} for text in texts]
        counted = 1 if self.bvpo.mask_block else len(texts)
        return self._encode_truncated(_count_responses_only(inputs, counted))

    @contextmanager
    def _without_limit(self) -> Iterator[None]:
        """Pairs are cut as pairs, and judged before: ms-swift must not cut their sequences one by one."""
        limit, self.max_length = self.max_length, None
        try:
            yield
        finally:
            self.max_length = limit

    @property
    def _pair_rules(self) -> PairRules:
        if not hasattr(self, "_frame_tokens"):
            self._frame_tokens = frame_tokens(self)
            self._closing_tokens = tuple(self._encode_context_list(self.template_meta.suffix)[0])
        return PairRules(
            max_length=self.max_length,
            truncation=self.truncation_strategy,
            block=tuple(self._tokenize(self.bvpo.block)) if self.bvpo.mask_block else (),
            frame=self._frame_tokens,
            closing=self._closing_tokens,
            decode=self.tokenizer.decode,
        )

    def data_collator(self, batch, *, padding_to: int | None = None) -> dict[str, Any]:
        batch = [[_present(row) for row in item] if isinstance(item, list) else _present(item) for item in batch]
        collated = super().data_collator(batch, padding_to=padding_to)
        if self.bvpo.keep_items:
            collated[ITEMS_KEY] = Items(batch)
        return collated

    def _rlhf_data_collator(self, batch, *, padding_to: int | None = None, **kwargs) -> dict[str, Any]:
        layout = BatchLayout({}, {}, members=len(batch))
        sequences: list[dict[str, Any]] = []
        for stream in map(TABLE.get, self.bvpo.rules.streams):
            members = [row for row in batch if has_stream(row, stream.name)]
            layout.rows[stream.name] = tuple(row.get(ROW_KEY, -1) for row in members)
            layout.weights[stream.name] = tuple(float(row.get(WEIGHT_KEY, 1.0)) for row in members)
            names = [f"{stream.key_prefix}{side}" for side in self._sides(stream.name)]
            if self.bvpo.rules.unpaired and stream.estimates:
                layout.right[stream.name] = tuple(bool(row[right_key(stream.name)]) for row in members)
            if not stream.estimates:
                counted = (sum(label != -100 for name in names for label in row[f"{name}_labels"]) for row in members)
                layout.tokens[stream.name] = tuple(counted)
            elif self.bvpo.pair_keys:
                tokens = [f"{name}_{what}" for name in names for what in ("input_ids", "labels")]
                layout.keys[stream.name] = tuple(pair_key(*(row[name] for name in tokens)) for row in members)
            for name in names:
                # The collator pads the lists it is given in place; a row may be collated twice.
                sequences += [
                    {k: list(v) if isinstance(v, list) else v for k, v in sequence.items()}
                    for sequence in self._fetch_inputs_startswith(members, f"{name}_")
                ]
        collated = self._data_collator(sequences, padding_to=padding_to)
        for row in batch:
            for what, number in (row.get(UNUSED_KEY) or {}).items():
                layout.unused[what] = layout.unused.get(what, 0) + number
        collated[LAYOUT_KEY] = layout
        return collated

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle (packing workers, dataset fingerprints) must be told how.
        return _rebuild_template, (type(self)._model_template, self.__getstate__())


def _count_responses_only(inputs, responses: int):
    """Marks the last messages, so many of them, as what counts: each token once, and nothing else of the talk.

    Left to itself, ms-swift leaves out an empty trace of a hybrid model's response (`ignore_empty_think`), follows
    `loss` fields, and counts earlier turns. The log-prob of a response is that of all its tokens after one prompt.
    """
    first = len(inputs.messages) - responses
    for i, message in enumerate(inputs.messages):
        if i >= first:
            message["loss"], message["loss_scale"] = True, 1.0
        elif message["role"] not in ("system", "user"):
            message["loss"] = False
    return inputs


def _lost_when_judged(inputs) -> list[tuple[str, str]]:
    """What a row lost that was judged as it was read."""
    said = inputs.get(VERDICT_KEY) if isinstance(inputs, dict) else None
    verdict = RowVerdict.from_json(said) if said else None
    return [(stream, problem.reason) for stream, problem in verdict.lost.items()] if verdict else []


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that a stream of rows fills with None, such as those of a pair that was lost."""
    return {key: value for key, value in row.items() if value is not None}


def row_in_words(row: dict[str, Any], length: int = 60) -> str:
    """Where a row came from, its number, and the start of its prompt: the data are shuffled."""
    asked = [m.get("content") for m in row.get("messages") or [] if m.get("role") == "user"]
    text = " ".join(str(asked[-1]).split()) if asked else ""
    shown = text if len(text) <= length else f"{text[:length]}…"
    place = f"{row[SOURCE_KEY]}: " if row.get(SOURCE_KEY) else ""
    return f"{place}row {row.get(ROW_KEY, '?')} ({shown!r})"


def _prompt_fields(inputs) -> tuple:
    """What a template can write a prompt from."""
    spoken = [(message["role"], message["content"]) for message in inputs.messages[:-1]]
    return inputs.system, inputs.tools, inputs.chat_template_kwargs, inputs.objects, spoken


def frame_tokens(template) -> frozenset[int]:
    """Control tokens (no tags, no words) that the template writes around messages."""
    meta, tokenizer = template.template_meta, template.tokenizer
    control = set(tokenizer.all_special_ids)
    control |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tags = template.bvpo.rules.tags
    control -= {token for tag in (tags.open, tags.close) for token in template._tokenize(tag)}
    parts = [part for part in (meta.prefix, meta.system_prefix, meta.prompt, meta.chat_sep, meta.suffix) if part]
    written = [template._encode_context_list(part)[0] for part in parts]
    return frozenset(token for tokens in written for token in tokens if token in control)


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
    """Turn ms-swift's template object into one that encodes the streams; returns the same object."""
    if not isinstance(template, BvpoTemplateMixin):
        template.__class__ = _bvpo_class(type(template))
    template.bvpo = settings
    template.unused = Counter()
    return template


def encoded_examples(encoded: dict[str, Any], template) -> list[str]:
    """One line for each sequence of an encoded row: what the model reads, and from where the loss counts."""
    lines = []
    names = [f"{stream.key_prefix}{side}" for stream in TABLE.values() for side in stream.sides]
    for name in names:
        ids, labels = encoded.get(f"{name}_input_ids"), encoded.get(f"{name}_labels")
        if ids is None:
            continue
        first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        prompt, response = template.tokenizer.decode(ids[:first]), template.tokenizer.decode(ids[first:])
        lines.append(f"[{name}] {len(ids)} tokens, loss on the last {len(ids) - first}: {prompt!r} >>> {response!r}")
    return lines
