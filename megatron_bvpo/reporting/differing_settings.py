"""The settings of runs, side by side: which belong into a table of runs, and how each is written. Pure.

A run's settings are ms-swift's `args.json`: every flag with its value, defaults too, and some things that are no flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.secret_flags import is_secret_flag
from megatron_bvpo.launching.secret_masks import MASK, SHORTEST, known_secrets, masked

# The columns of every table, differing or not: what preference training is tuned by. The rest comes where it differs.
ALWAYS = ("dataset", "lora_rank", "lora_alpha", "lr", "beta", "target_modules", "bvpo_alpha")
MOST_COLUMNS = 20
NONE = "–"
_SAYS_NOTHING = (NONE, "true", "false")
# Names of places, processes and runs, which differ between any two runs, and what ms-swift derives from its flags.
_NO_SETTING = re.compile(
    r"_.*|.*(?:output|tensorboard|logging|ckpt|model)_dir|.*_exp_name|.*rank_?id|(?:local_)?rank|add_version|hub"
    r"|(?:model|megatron_model|template)_(?:info|meta)|model_suffix|callbacks|mcore_(?:model|adapter)|seq_length"
    r"|(?:start|end)_weight_decay|master_(?:addr|port)|num_microbatches"
)
_LORA = re.compile(r"lora_.*|target_modules|target_regex|use_rslora")


def plain_settings(arguments: Mapping[str, object]) -> dict[str, str]:
    """`args.json` as name → text, with secrets masked by their name, by their shape, and wherever they appear again."""
    texts = {str(name): _text(value) for name, value in arguments.items()}
    named = {name for name, text in texts.items() if _secret(name) and text not in _SAYS_NOTHING}
    # The keys are numbers, so that these are the passwords in addresses only: as a variable's name, `lazy_tokenize` and
    # `teacher_tag_key` would count as secrets, and "dataset" would be masked everywhere.
    known = known_secrets({str(i): text for i, text in enumerate(texts.values())})
    known |= {texts[name] for name in named if len(texts[name]) >= SHORTEST}
    return {name: MASK if name in named else masked(text, known) for name, text in texts.items()}


def _secret(name: str) -> bool:
    return is_secret_flag(name.lower(), flag_names())


def _text(value: object) -> str:
    if value is None or value == [] or value == {} or value == "":
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def columns(runs: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """Settings for the table of runs, and those that differ but are too many for it.

    Args:
        runs: of each, its `plain_settings`. A name that one lacks (it is of another version, or nothing is known)
            makes no difference.
    """
    known = [run for run in runs if run]
    names = dict.fromkeys(name for run in known for name in run)
    always = [name for name in ALWAYS if any(shown(run, name) != NONE for run in known)]
    differing = [
        name
        for name in names
        if name not in ALWAYS
        and not _NO_SETTING.fullmatch(name)
        and len({shown(run, name) for run in known if name in run}) > 1
    ]
    # Ours first, then in the order of args.json, where neighbours belong together.
    differing.sort(key=lambda name: not name.startswith("bvpo_"))
    room = MOST_COLUMNS - len(always)
    return always + differing[:room], differing[room:]


def shown(run: Mapping[str, str], name: str) -> str:
    """A setting as the table has it; none where it plays no part (a rank without LoRA)."""
    if _LORA.fullmatch(name) and run.get("tuner_type", "lora") != "lora":
        return NONE
    return run.get(name, NONE)


def short_paths(texts: Sequence[str]) -> list[str]:
    """Lists of files as a table has them: names, with as many of their folders as tell them from each other."""
    lists = [text.split(", ") for text in texts]
    paths = list(dict.fromkeys(part for parts in lists for part in parts))
    short = dict(zip(paths, unique_names([PurePath(path) for path in paths]), strict=True))
    return [", ".join(short[part] or part for part in parts) for parts in lists]


def unique_names(folders: Sequence[PurePath]) -> list[str]:
    """A name for each run: the shortest ends of the paths that differ from each other.

    `v0-20261127-104500`, which ms-swift adds, says nothing without the folder above it.
    """
    lengths = [2 if re.fullmatch(r"v\d+-\d{8}-\d{6}", folder.name) else 1 for folder in folders]
    while True:
        names = [str(PurePath(*f.parts[-n:])) for f, n in zip(folders, lengths, strict=True)]
        again = [names.count(name) > 1 and n < len(f.parts) for name, f, n in zip(names, folders, lengths, strict=True)]
        if not any(again):
            return names
        lengths = [n + more for n, more in zip(lengths, again, strict=True)]
