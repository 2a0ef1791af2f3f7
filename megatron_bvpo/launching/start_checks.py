"""What must be true before a BVPO run loads anything heavy."""

import importlib.util
import json
import os
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import argv as flags
from megatron_bvpo.launching import path_rules, plugin_settings


def check(argv: list[str]) -> None:
    """Raise UserError where a BVPO run with these arguments cannot start on this machine."""
    from megatron_bvpo.launching import versions  # only here: an ordinary `swift rlhf` has no use for packaging

    versions.require_supported()
    stray = plugin_settings.given(os.environ)
    if stray:
        flag = plugin_settings.SETTINGS[stray[0]].field
        raise UserError(
            f"{', '.join(stray)}: set in the environment, which only the plugin of --external_plugins reads.",
            remedy=f"Unset it and use --{flag} or the same key in the YAML file.",
        )
    if flags.wants_help(argv):
        return
    _check_ranks(os.environ)
    for flag in path_rules.DATA:
        path_rules.check_data(flags.option_list(argv, flag), flag)
    if not flags.rehearsal_requested():
        require_gpu()


def _check_ranks(env) -> None:
    """torchrun would answer these with a trace."""
    for name, least in (("NPROC_PER_NODE", 1), ("NNODES", 1), ("NODE_RANK", 0)):
        value = env.get(name)
        if value is None or (name == "NPROC_PER_NODE" and value in ("gpu", "cpu", "auto")):
            continue
        if name == "NNODES" and ":" in value:
            continue  # torchrun's own way of giving a range
        if not value.isdigit() or int(value) < least:
            raise UserError(f"is {value!r}; expected a whole number of {least} or more", field=name)


def scan_data(argv: list[str]) -> list[str] | None:
    """Look through the data files before anything is started; returns the report for rank 0's log.

    None where that must wait for ms-swift: files may then belong to data sets that the user has registered,
    or a flag is wrong and will be refused.

    Raises:
        UserError: a file would stop the run.
    """
    from megatron_bvpo.data.handover import Reading
    from megatron_bvpo.data.scan import scan_files
    from megatron_bvpo.launching.stream_flags import rules_of_command

    if os.environ.get("NODE_RANK", "0") != "0" or flags.wants_help(argv):
        return None
    if any(flags.option_values(argv, name) for name in ("custom_register_path", "custom_dataset_info")):
        return None
    if flags.option_values(argv, "external_plugins"):
        return None
    columns = read_columns((flags.option_values(argv, "columns") or ["{}"])[-1])
    try:
        rules = rules_of_command(argv)
    except UserError:
        return None
    specs = [*flags.option_list(argv, "dataset"), *flags.option_list(argv, "val_dataset")]
    if not specs:
        return None
    reading = Reading(rules, columns, auto_mapping=not flags.is_true(argv, "disable_auto_column_mapping"))
    return scan_files(specs, reading, fresh=not flags.is_true(argv, "load_from_cache_file")).lines()


def read_columns(text: str) -> dict[str, str]:
    """The value of `--columns`: a JSON object of texts, in the command or in a file."""
    try:
        if os.path.exists(text):
            text = Path(text).read_text(encoding="utf-8")
        columns = _parsed(text)
        if (
            isinstance(columns, dict)
            and (columns or text.strip() == "{}")
            and all(isinstance(name, str) for name in columns.values())
        ):
            return columns
    except (OSError, ValueError):
        pass
    raise UserError(
        f"expected a JSON object from the file's column names to ms-swift's, found {text!r}",
        field="--columns",
        remedy="""Write it like '{"prompt": "query", "worse": "rejected_response"}'.""",
    )


def _parsed(text: str):
    try:
        return json.loads(text)
    except ValueError:
        import json_repair  # as ms-swift does: single quotes and the like pass

        return json_repair.loads(text)


def help_without_engine(argv: list[str]) -> bool:
    """Whether the flags are only to be explained, on a machine whose ms-swift cannot load its Megatron half.

    It cannot without Transformer Engine; the stand-ins serve for printing the help.
    """
    return flags.wants_help(argv) and importlib.util.find_spec("transformer_engine") is None


def require_gpu() -> None:
    """Raise UserError without a CUDA device, or without the Transformer Engine that Megatron needs on one."""
    import torch

    if torch.cuda.device_count() == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden!r})"
        ranks = os.environ.get("NPROC_PER_NODE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
        raise UserError(
            f"no CUDA device is visible{seen}.",
            remedy="To rehearse the same run on CPU ranks, put BVPO_REHEARSAL=1 "
            f"NPROC_PER_NODE={ranks} before the command.",
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "transformer_engine is not installed, and Megatron's layers need it on a GPU.",
            remedy="Run: pip install --no-build-isolation 'megatron-bvpo[gpu]'",
        )
