"""The settings of the plugin entry, whose parser knows none of our flags: BVPO_CONFIG, then BVPO_* variables.

Pure: a mapping goes in, a dictionary of `bvpo_*` values comes out. Ranges and choices are checked where the
flags' values are checked too, so that both entries say the same.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError

CONFIG = "BVPO_CONFIG"

_LAUNCH = """
    APPTAINER ATTEMPT BINDS DATA_CACHE ENGINE_COMMAND ENGINE_IMAGE ENGINE_MODEL ENGINE_NAME ENGINE_PORT
    ENGINE_RESTARTS ENGINE_START_S GPUS IMAGE LOOP_ENGINE MARGIN_S MAX_RESTARTS MIN_BUSBW_GBS MIN_FREE_GIB NEWEST_TRL
    NODES NODE_NAME NODE_SILENCE_S PREFLIGHT PREFLIGHT_SECONDS PYTHON_BIN RESUME RUN_DIR RUN_TOKEN SHARED_FOLDERS
    SLURM_POLL_S STAGE STOP_FILE STOP_WINDOW_S VLLM_PYTHON XDG_CACHE_HOME
"""
_IMAGE = """
    APEX_COMMIT APPTAINER_ROOT APPTAINER_WRAP BASE BUILD_ARGS BUILD_ON CACHE CA_BUNDLE CUDA_ARCH DEBIAN_MIRROR
    IN_IMAGE LOCK_DATE MAX_JOBS PIP_CONF PROFILE SETTINGS TORCH_INDEX UV
"""
# BVPO_ variables that are not settings. Launch scripts may add to this list, with a word of what they are.
OTHER_VARIABLES = {
    CONFIG: "a YAML file of settings, for the plugin",
    "BVPO_REHEARSAL": "1: CPU stand-ins in place of a GPU",
    "BVPO_ROOT": "where the plugin finds the megatron_bvpo checkout",
    "BVPO_SKIP_VERSION_CHECK": "1: go on with unsupported versions",
    "BVPO_VENV": "launch scripts: the virtual environment",
    "BVPO_PYTHON": "launch scripts: the Python that makes it",
    "BVPO_EXTRAS": "launch scripts: extras to install",
    "BVPO_TORCH": "launch scripts: the torch requirement",
    "BVPO_PIP_ARGS": "launch scripts: more arguments for pip",
    "BVPO_REHEARSAL_DIR": "launch scripts: where the rehearsal keeps its files",
    "BVPO_REHEARSAL_VOCAB": "launch scripts: the rehearsal model's vocabulary",
    # of launch/train.sh, launch/slurm.sbatch and `bvpo preflight`, whose heads say what they are
    **{f"BVPO_{name}": "the launch kit" for name in _LAUNCH.split()},
    **{f"BVPO_{name}": "the image (containers/)" for name in _IMAGE.split()},
}


@dataclass(frozen=True)
class Setting:
    """A setting: the argument field it fills, how its text is read, and what is expected, in words."""

    field: str
    read: Callable[[str], Any]
    expected: str


def _number_or_auto(text: str) -> float | str:
    return "auto" if text == "auto" else float(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


SETTINGS = {
    "BVPO_STREAMS": Setting("bvpo_streams", str.split, "names of streams"),
    "BVPO_WEIGHTS": Setting("bvpo_weights", str.split, "NAME=NUMBER for each stream, or auto"),
    "BVPO_ALPHA": Setting("bvpo_alpha", _number_or_auto, "a number in [0, 1], or auto"),
    "BVPO_ALPHA_PRIOR": Setting("bvpo_alpha_prior", float, "a number in [0, 1]"),
    "BVPO_CRITERION": Setting("bvpo_criterion", str, "mse or sgd"),
    "BVPO_KAPPA": Setting("bvpo_kappa", float, "a number in (0, 1]"),
    "BVPO_PROBE_INTERVAL": Setting("bvpo_probe_interval", int, "a whole number of optimizer steps"),
    "BVPO_MOMENT_DECAY": Setting("bvpo_moment_decay", float, "a number in [0, 1)"),
    "BVPO_EMPTY": Setting("bvpo_empty", str, "strip, require or own"),
    "BVPO_EMPTY_BLOCK": Setting("bvpo_empty_block", str, "the text of an empty trace"),
    "BVPO_SIMPO_GAMMA": Setting("bvpo_simpo_gamma", float, "a number"),
    "BVPO_EMPTY_BETA": Setting("bvpo_empty_beta", float, "a number"),
    "BVPO_SHORT_BETA": Setting("bvpo_short_beta", float, "a number"),
    "BVPO_EXPERT_LOSS": Setting("bvpo_expert_loss", str, "sft, dft, sft_phi or module:function"),
    "BVPO_MU_PEAK": Setting("bvpo_mu_peak", float, "a number in [0, 1]"),
    "BVPO_MU_VALLEY": Setting("bvpo_mu_valley", float, "a number in [0, 1]"),
    "BVPO_MU_WARMUP_STEPS": Setting("bvpo_mu_warmup_steps", int, "a whole number of optimizer steps"),
    "BVPO_MU_DECAY_STEPS": Setting("bvpo_mu_decay_steps", int, "a whole number of optimizer steps"),
    "BVPO_GATE": Setting("bvpo_gate", str, "none or hpt"),
    "BVPO_GATE_THRESHOLD": Setting("bvpo_gate_threshold", float, "a number in [0, 1)"),
    "BVPO_LOGP_IMPL": Setting("bvpo_logp_impl", str, "auto, fused, triton, te or torch"),
    "BVPO_LOGP_MEMORY": Setting("bvpo_logp_memory", float, "GiB"),
    "BVPO_NEW_LAYERS_ONLY": Setting("bvpo_new_layers_only", _boolean, "true or false"),
    "BVPO_REF_CACHE": Setting("bvpo_ref_cache", str, "a folder"),
    "BVPO_REFS_ONLY": Setting("bvpo_refs_only", _boolean, "true or false"),
    "BVPO_EVAL_ON_START": Setting("bvpo_eval_on_start", _boolean, "true or false"),
}
_BY_FIELD = {setting.field: setting for setting in SETTINGS.values()}


def given(environ: Mapping[str, str]) -> list[str]:
    """The names of the settings, BVPO_CONFIG included, that the environment holds."""
    return [name for name in (CONFIG, *SETTINGS) if name in environ]


def read_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """The values of `bvpo_*` fields that BVPO_CONFIG and the environment give; a variable beats the file.

    Returns only what was given: `bvpo_alpha` as a float or "auto", the other numbers as float or int.
    Raises UserError for an unknown BVPO_ name or key, an unreadable file, or text that is no number.
    """
    known = [*SETTINGS, *OTHER_VARIABLES]
    for name in sorted(environ):
        if name.startswith("BVPO_") and name not in known:
            raise UserError("no such setting.", field=name, remedy=_nearest(name, known))
    values = _read_file(environ[CONFIG]) if environ.get(CONFIG) else {}
    for name, setting in SETTINGS.items():
        if name in environ:
            values[setting.field] = _convert(setting, environ[name], field=name)
    return values


def _read_file(path: str) -> dict[str, Any]:
    import yaml  # ms-swift has it; the variables alone do not need it

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field=CONFIG, file=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise UserError(f"not YAML: {getattr(error, 'problem', error)}", file=path, line=line) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"expected `key: value` lines, found a {type(content).__name__}.", file=path)
    values = {}
    for key, value in content.items():
        setting = _BY_FIELD.get(key)
        if setting is None:
            remedy = _nearest(str(key), list(_BY_FIELD)) + " Flags of ms-swift belong on its command line."
            raise UserError("no such setting.", file=path, field=str(key), remedy=remedy)
        if value is not None:
            values[key] = _convert(setting, value, field=key, file=path)
    return values


def _convert(setting: Setting, value: Any, *, field: str, file: str | None = None) -> Any:
    # YAML gives numbers, the environment text; as text both are read alike. A YAML `no` is a mistake here.
    try:
        if isinstance(value, (list, dict)) or (isinstance(value, bool) and setting.read is not _boolean):
            raise ValueError(value)
        return setting.read(value if setting.read is str and isinstance(value, str) else str(value).strip())
    except ValueError:
        raise UserError(f"expected {setting.expected}, found {value!r}.", field=field, file=file) from None


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known are {', '.join(sorted(known))}."
