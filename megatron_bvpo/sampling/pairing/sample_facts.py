"""Folders of samples, read for pairing: what is known of every sample, without its text; then the texts that are used.

Texts of long traces take a hundred times the room of what pairing needs to know, and shards hold the samples in the
order of their arrival. So the folders are read twice: once for `Candidate`s, and, when the pairs are known, once for
the texts of these, which go to a file beside the output (`Texts`).
"""

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, own_answer, split_trace
from megatron_bvpo.data.response_checks import own_answer_problem, response_problem
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.pairing.pairing import FAILED, Candidate
from megatron_bvpo.sampling.samples import (
    JUDGEMENTS,
    MODES,
    NO_TRACE_END,
    OF_SOME_MODES,
    SETTINGS,
    THINKS,
    TRUNCATED,
    Judgement,
    Prompt,
    Sample,
    judges,
    read_prompts,
    stored_judgements,
    stored_samples,
)

CUT = "truncated"
STILL_THINKS = "thinks although thinking was off"
BROKEN = "a character that is none"

# Settings of which no answer depends: how many there are, and of which prompts.
_OF_ONE_FOLDER = {"version", "modes", "samples", "seed", "budget", "prompts"}
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")

SampleName = tuple[int, str, str, int]  # folder, prompt_id, mode, number


class Folder(NamedTuple):
    """A folder of samples and the name that `--mix` and the rows know it by."""

    name: str
    path: Path


@dataclass
class PromptFacts:
    """A prompt, in whichever folders and under whichever ids it was asked.

    Attributes:
        key: stands for the messages and the answer.
        split_key: stands for what was said, however it is spaced: what held-out splits are made by.
        prompt_id: its first id.
        folder: number of the first folder that holds it.
        source: `file:line` of its first row.
        candidates: its samples by mode.
    """

    key: str
    split_key: str
    prompt_id: str
    folder: int
    source: str
    candidates: dict[str, list[Candidate]] = field(default_factory=lambda: {mode: [] for mode in MODES})


@dataclass
class Facts:
    """All prompts of all folders, in their order.

    Attributes:
        judge: whose words the candidates have.
        prompts: by key.
        asked: the key of each folder's prompt ids.
        excluded: why prompts must not be used, by key.
        samples: how many there are in each mode.
        strays: how many samples belong to nothing.
    """

    folders: list[Folder]
    judge: str = ""
    prompts: dict[str, PromptFacts] = field(default_factory=dict)
    asked: dict[tuple[int, str], str] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    strays: int = 0

    def find(self, folder: int, sample: Sample | Judgement) -> Candidate | None:
        """The candidate of a sample. A prompt has few: a list of them is smaller than an index of all."""
        prompt = self.prompts.get(self.asked.get((folder, sample.prompt_id), ""))
        for candidate in prompt.candidates.get(sample.mode, ()) if prompt else ():
            if candidate.name == (folder, sample.prompt_id, sample.number):
                return candidate
        return None

    def pools(self) -> Iterator[tuple[PromptFacts, str, list[Candidate]]]:
        for prompt in self.prompts.values():
            for mode, candidates in prompt.candidates.items():
                yield prompt, mode, candidates


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def trained_text(mode: str, text: str) -> str:
    """A sample's text as it stands in a row: an answer with thinking off has no empty block in front."""
    return (own_answer(text) if mode == "empty" else None) or text.strip()


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the messages but the system's say, without regard to case and white space."""
    texts = [message.get("content") for message in messages if message.get("role") != "system"]
    spoken = [text if isinstance(text, str) else json.dumps(text, sort_keys=True) for text in texts]
    return "\n".join(" ".join(text.casefold().split()) for text in spoken)


def settled_judge(folders: Sequence[Folder], name: str | None) -> str:
    """The judge to go by: the one that is named, else the only one there is.

    Raises:
        UserError: a folder was judged by none, or by several of which none is named.
    """
    there = {folder.name: judges(folder.path) for folder in folders}
    for folder in folders:
        if not there[folder.name]:
            remedy = f"bvpo judge {folder.path} --with SPEC"
            raise UserError("no judge has judged these samples", file=str(folder.path), remedy=remedy)
        if name is not None and name not in there[folder.name]:
            have = ", ".join(there[folder.name])
            raise UserError(
                f"judge {name!r} has not judged this folder; there: {have}",
                file=str(folder.path),
                field="--judge",
                remedy=f"name one of them, or run bvpo judge {folder.path} --with SPEC --name {name}",
            )
    if name is not None:
        return name
    common = sorted(set.intersection(*(set(found) for found in there.values())))
    if len(common) == 1 and all(len(found) == 1 for found in there.values()):
        return common[0]
    told = "; ".join(f"{folder}: {', '.join(found)}" for folder, found in there.items())
    remedy = "name the one to go by, which must have judged every folder"
    raise UserError(f"which judge is meant? {told}", field="--judge", remedy=remedy)


def gather(folders: Sequence[Folder], judge: str, *, keep_truncated: bool = False, exclude=None) -> Facts:
    """Everything but the texts.

    Args:
        folders: read in this order; the same messages with the same answer are one prompt, wherever they stand.
        judge: its name.
        keep_truncated: truncated samples may be sides of pairs where their text allows it.
        exclude: Prompt → why it must not be used, or None (`prompt_overlap.Overlap.reason`).

    Raises:
        UserError: a folder is none of samples, is damaged, or that judge has not judged it.
    """
    facts = Facts(list(folders), judge)
    for number, folder in enumerate(folders):
        for prompt in read_prompts(folder.path):
            _add_prompt(facts, number, prompt, exclude)
        for sample in stored_samples(folder.path):
            key = facts.asked.get((number, sample.prompt_id))
            if key is None or sample.mode not in MODES:
                facts.strays += 1
            elif key in facts.prompts:
                if facts.find(number, sample) is None:
                    facts.samples[sample.mode] += 1
                    facts.prompts[key].candidates[sample.mode].append(_candidate(number, sample, keep_truncated))
        for judgement in stored_judgements(folder.path, judge):
            candidate = facts.find(number, judgement)
            if candidate is not None:
                candidate.right, candidate.score = judgement.right, judgement.score
                candidate.parsed = judgement.parsed is not None
                candidate.seen = True
    return facts


def _add_prompt(facts: Facts, folder: int, prompt: Prompt, exclude) -> None:
    whole = json.dumps([prompt.messages, prompt.answer, prompt.columns.get("tools")], sort_keys=True)
    key = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    facts.asked[folder, prompt.prompt_id] = key
    if key in facts.prompts or key in facts.excluded:
        return
    if exclude is not None and (why := exclude(prompt)):
        facts.excluded[key] = why
        return
    split_key = hashlib.blake2b(said(prompt.messages).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    facts.prompts[key] = PromptFacts(key, split_key, prompt.prompt_id, folder, prompt.source)


def _candidate(folder: int, sample, keep_truncated: bool) -> Candidate:
    text = trained_text(sample.mode, sample.text or "")
    logprob = sample.logprob_sum / sample.tokens if sample.logprob_sum is not None and sample.tokens else None
    why = _why_unusable(sample, text, keep_truncated)
    traced = sample.mode == "empty" or bool(split_trace(text).trace.strip())
    # Of a short sample only the answer's tokens are counted, so its length in tokens is not known.
    tokens = None if sample.mode == "short" else sample.tokens
    return Candidate(
        folder, sys.intern(sample.prompt_id), sample.number, digest(text), len(text), tokens, logprob, why, traced
    )  # fmt: skip


def _why_unusable(sample, text: str, keep_truncated: bool) -> str | None:
    """Why a sample can be no side of a pair: in part the user's choice, in part what the trainer would refuse."""
    if sample.text is None:
        return FAILED
    if _HALF_A_CHARACTER.search(text):
        return BROKEN
    if not keep_truncated and (TRUNCATED in sample.marks or sample.finish_reason == "length"):
        return CUT
    if sample.mode == "empty":
        if THINKS in sample.marks or own_answer(text) is None:
            return STILL_THINKS
        problem = own_answer_problem("empty_response", text, DEFAULT_TAGS)
    else:
        if NO_TRACE_END in sample.marks and not keep_truncated:
            return "no end of its trace"
        problem = response_problem("response", text, DEFAULT_TAGS)
    return problem.problem if problem else None


def other_settings(folders: Sequence[Folder], judge: str) -> list[str]:
    """In words, in what the folders' samples or judgements differ: joined, their pairs compare other things."""
    told = []
    for file in (Path(SETTINGS), Path(JUDGEMENTS, judge, SETTINGS)):
        found = [_settings(folder.path / file) for folder in folders]
        for name in sorted({name for settings in found for name in settings} - _OF_ONE_FOLDER):
            values = {
                folder.name: json.dumps(settings.get(name), ensure_ascii=False)
                for folder, settings in zip(folders, found, strict=True)
                if settings.get(name) is not None or name not in OF_SOME_MODES
            }
            if len(set(values.values())) > 1:
                told.append(f"{name}: " + ", ".join(f"{folder} {value[:80]}" for folder, value in values.items()))
    return told


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Texts:
    """The texts of the samples that stand in pairs, in a temporary file.

    Args:
        folders: where the samples are.
        wanted: their names.
        beside: a folder with room for them.
    """

    def __init__(self, folders: Sequence[Folder], wanted: set[SampleName], beside: Path):
        self._file = tempfile.TemporaryFile(dir=beside)
        self._places: dict[SampleName, tuple[int, int]] = {}
        at = 0
        for number, folder in enumerate(folders):
            for sample in stored_samples(folder.path):
                name = (number, sample.prompt_id, sample.mode, sample.number)
                if name in wanted and name not in self._places and sample.text is not None:
                    raw = trained_text(sample.mode, sample.text).encode("utf-8")
                    self._file.write(raw)
                    self._places[name] = at, len(raw)
                    at += len(raw)
        missing = len(wanted) - len(self._places)
        if missing:
            raise UserError(
                f"{missing} samples that were there a moment ago are gone",
                file=str(folders[0].path),
                remedy="start again once nothing writes to the folder",
            )

    def __getitem__(self, name: SampleName) -> str:
        at, size = self._places[name]
        self._file.seek(at)
        return self._file.read(size).decode("utf-8")

    def close(self) -> None:
        self._file.close()
