"""Rows of pairs: written as the trainer reads them, and judged by the trainer's own checks before they are written."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.verdicts import RowRules, RowTally
from megatron_bvpo.sampling.pairing.pairing import Pair
from megatron_bvpo.sampling.pairing.sample_facts import Facts, PromptFacts, Texts
from megatron_bvpo.sampling.samples import Prompt

PREFIXES = {"thinking": "", "empty": "empty_", "short": "short_"}
# What the trainer writes a prompt from beside the messages.
_PROMPT_COLUMNS = ("tools", "chat_template_kwargs")
SHORT_ALONE = "short: a short pair alone is no row"


@dataclass
class RowWriter:
    """Makes the rows of one file, and counts what became of them.

    Attributes:
        written: the pairs that stand in rows, by mode.
        lost: pairs that the trainer's checks would have lost, by mode and reason.
        tally: what the trainer will say of the rows.
        prompts: prompts with a row.
        rows_of: rows by the prompts' first folder.
    """

    facts: Facts
    texts: Texts
    rates: Mapping[tuple[str, str], float | None]
    written: dict[str, list[Pair]] = field(default_factory=lambda: {mode: [] for mode in PREFIXES})
    lost: Counter[str] = field(default_factory=Counter)
    tally: RowTally = field(default_factory=RowTally)
    prompts: int = 0
    rows_of: Counter[str] = field(default_factory=Counter)
    reading: Reading = field(default_factory=lambda: Reading(RowRules()))

    def rows(self, prompt: Prompt, facts: PromptFacts, pairs: Mapping[str, list[Pair]]) -> Iterator[dict[str, Any]]:
        """The rows of one prompt: its first pairs of all modes together, its second ones, and so on."""
        before = self.tally.rows
        for number in range(max(map(len, pairs.values()), default=0)):
            mine = {mode: found[number] for mode, found in pairs.items() if number < len(found)}
            row = self._kept(prompt, facts, mine)
            if row is not None:
                self.rows_of[self.facts.folders[facts.folder].name] += 1
                yield row
        self.prompts += self.tally.rows > before

    def _kept(self, prompt: Prompt, facts: PromptFacts, pairs: dict[str, Pair]) -> dict[str, Any] | None:
        """The row, without a pair that would cost it; None where nothing is left."""
        while "thinking" in pairs or "empty" in pairs:
            row = self._row(prompt, facts, pairs)
            _, verdict = self.reading.canonical(row)
            lost = [p.reason for p in verdict.problems]
            if verdict.trace_ok == ("thinking" in pairs) and (verdict.empty_source == "own") == ("empty" in pairs):
                self.tally.add(verdict)
                for mode, pair in pairs.items():
                    self.written[mode].append(pair)
                return row
            # Which pair it was: the trace pair, unless that is fine or not there.
            bad = "empty" if verdict.trace_ok or "thinking" not in pairs else "thinking"
            self.lost[f"{bad}: {lost[0] if lost else 'not kept'}"] += 1
            pairs = {mode: pair for mode, pair in pairs.items() if mode != bad}
        if pairs:
            self.lost[SHORT_ALONE] += 1
        return None

    def _row(self, prompt: Prompt, facts: PromptFacts, pairs: Mapping[str, Pair]) -> dict[str, Any]:
        row: dict[str, Any] = {"messages": list(prompt.messages)}
        for mode, pair in pairs.items():
            sides = [self.texts[c.folder, c.prompt_id, mode, c.number] for c in pair]
            if mode == "thinking":
                row["messages"].append({"role": "assistant", "content": sides[0]})
                row["rejected_response"] = sides[1]
            else:
                row[f"{PREFIXES[mode]}response"], row[f"{PREFIXES[mode]}rejected_response"] = sides
        for mode, prefix in PREFIXES.items():
            if (rate := self.rates.get((facts.key, mode))) is not None:
                row[f"{prefix}accept_rate"] = round(rate, 6)
        row |= {name: prompt.columns[name] for name in _PROMPT_COLUMNS if prompt.columns.get(name)}
        row |= {"prompt_id": facts.prompt_id, "judge": self.facts.judge}
        if prompt.answer is not None:
            row["answer"] = prompt.answer
        row["numbers"] = {mode: [candidate.number for candidate in pair] for mode, pair in pairs.items()}
        if len(self.facts.folders) > 1:
            names = [folder.name for folder in self.facts.folders]
            row["folders"] = {mode: [names[candidate.folder] for candidate in pair] for mode, pair in pairs.items()}
        return row
