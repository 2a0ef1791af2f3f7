"""Settings of the plugin entry: BVPO_CONFIG, then BVPO_* variables, and what is refused."""

import re
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.plugin_settings import OTHER_VARIABLES, SETTINGS, given, read_settings

ALL = {
    "BVPO_STREAMS": "trace short expert",
    "BVPO_WEIGHTS": "trace=.6 short=.4",
    "BVPO_ALPHA": "0.25",
    "BVPO_ALPHA_PRIOR": "0.4",
    "BVPO_CRITERION": "sgd",
    "BVPO_KAPPA": "0.5",
    "BVPO_PROBE_INTERVAL": "20",
    "BVPO_MOMENT_DECAY": "0.8",
    "BVPO_EMPTY": "require",
    "BVPO_EMPTY_BLOCK": "<think>\n\n</think>\n\n",
    "BVPO_SIMPO_GAMMA": "1.5",
    "BVPO_EMPTY_BETA": "0.3",
    "BVPO_SHORT_BETA": "0.2",
    "BVPO_EXPERT_LOSS": "dft",
    "BVPO_MU_PEAK": "0.9",
    "BVPO_MU_VALLEY": "0.05",
    "BVPO_MU_WARMUP_STEPS": "10",
    "BVPO_MU_DECAY_STEPS": "200",
    "BVPO_GATE": "hpt",
    "BVPO_GATE_THRESHOLD": "0.25",
    "BVPO_LOGP_IMPL": "torch",
    "BVPO_LOGP_MEMORY": "2.5",
    "BVPO_REFS_ONLY": "False",
    "BVPO_EVAL_ON_START": "true",
    "BVPO_NEW_LAYERS_ONLY": "true",
    "BVPO_REF_CACHE": "/data/refs",
}


def test_every_variable_fills_its_field():
    assert read_settings({"PATH": "/bin", **ALL}) == {
        "bvpo_streams": ["trace", "short", "expert"],
        "bvpo_weights": ["trace=.6", "short=.4"],
        "bvpo_alpha": 0.25,
        "bvpo_alpha_prior": 0.4,
        "bvpo_criterion": "sgd",
        "bvpo_kappa": 0.5,
        "bvpo_probe_interval": 20,
        "bvpo_moment_decay": 0.8,
        "bvpo_empty": "require",
        "bvpo_empty_block": "<think>\n\n</think>\n\n",
        "bvpo_simpo_gamma": 1.5,
        "bvpo_empty_beta": 0.3,
        "bvpo_short_beta": 0.2,
        "bvpo_expert_loss": "dft",
        "bvpo_mu_peak": 0.9,
        "bvpo_mu_valley": 0.05,
        "bvpo_mu_warmup_steps": 10,
        "bvpo_mu_decay_steps": 200,
        "bvpo_gate": "hpt",
        "bvpo_gate_threshold": 0.25,
        "bvpo_logp_impl": "torch",
        "bvpo_logp_memory": 2.5,
        "bvpo_refs_only": False,
        "bvpo_eval_on_start": True,
        "bvpo_new_layers_only": True,
        "bvpo_ref_cache": "/data/refs",
    }
    assert set(ALL) == set(SETTINGS)


def test_only_what_is_given_comes_back():
    assert read_settings({}) == {}
    assert read_settings({"BVPO_ALPHA": "auto"}) == {"bvpo_alpha": "auto"}
    assert given({"BVPO_ALPHA": "1", "BVPO_REHEARSAL": "1", "BVPO_CONFIG": "x"}) == [
        "BVPO_CONFIG",
        "BVPO_ALPHA",
    ]


def test_variables_that_are_no_settings_pass():
    assert read_settings({name: "" for name in OTHER_VARIABLES}) == {}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BVPO_ALPA", "BVPO_ALPHA"),
        ("BVPO_EMPTYBLOCK", "BVPO_EMPTY_BLOCK"),
        ("BVPO_REHEARSE", "BVPO_REHEARSAL"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=rf"^{name}: no such setting. Did you mean {nearest}\?$"):
        read_settings({name: "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BVPO_ALPHA", "half"),
        ("BVPO_KAPPA", ""),
        ("BVPO_PROBE_INTERVAL", "2.5"),
        ("BVPO_MOMENT_DECAY", "0,9"),
    ],
)
def test_text_that_is_no_number_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}: expected .*, found '{re.escape(value)}'"):
        read_settings({name: value})


def write(path: Path, text: str) -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    return {"BVPO_CONFIG": str(path)}


def test_a_variable_beats_the_file(tmp_path):
    environ = write(tmp_path / "b.yaml", 'bvpo_alpha: auto\nbvpo_kappa: 1\nbvpo_empty_block: "<t>\\n</t>\\n"\n')
    assert read_settings(environ) == {
        "bvpo_alpha": "auto",
        "bvpo_kappa": 1.0,
        "bvpo_empty_block": "<t>\n</t>\n",
    }
    assert read_settings({**environ, "BVPO_ALPHA": "0"})["bvpo_alpha"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bvpo_alpa: 0.5\n", r"b.yaml: bvpo_alpa: no such setting. Did you mean bvpo_alpha\?"),
        ("model: Qwen\n", r"b.yaml: model: no such setting. .*Flags of ms-swift belong on its command line."),
        ("bvpo_kappa: no\n", r"b.yaml: bvpo_kappa: expected a number in \(0, 1\], found False."),
        ("bvpo_probe_interval: 1.5\n", "b.yaml: bvpo_probe_interval: expected a whole number"),
        ("- bvpo_alpha\n", "b.yaml: expected `key: value` lines, found a list."),
        ("a: 1\nb: [\n", r"b.yaml:3: not YAML"),
    ],
)
def test_mistakes_in_the_file_name_file_and_key(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_settings(write(tmp_path / "b.yaml", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.yaml: BVPO_CONFIG: cannot be read: No such file"):
        read_settings({"BVPO_CONFIG": str(tmp_path / "none.yaml")})


def test_an_empty_file_gives_nothing(tmp_path):
    assert read_settings(write(tmp_path / "b.yaml", "# nothing\n")) == {}


def test_the_settings_are_the_flags():
    """One setting per `bvpo_*` flag. Read from the source: importing the arguments loads all of ms-swift."""
    arguments = Path(__file__).parents[2] / "megatron_bvpo" / "training" / "arguments.py"
    fields = re.findall(r"^    (bvpo_\w+): .* = ", arguments.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(fields) == sorted(setting.field for setting in SETTINGS.values())


def test_the_projects_own_variables_are_no_unknown_settings():
    """The launch kit sets its variables for every run, the plugin's among them."""
    root = Path(__file__).parents[2]
    kit = "launch/*", "containers/*.*", "megatron_bvpo/cluster/*.py", "megatron_bvpo/workflow/*"
    files = [file for pattern in kit for file in root.glob(pattern) if file.is_file()]
    names = {name for file in files for name in re.findall(r"\bBVPO_[A-Z_]+[A-Z]\b", file.read_text(errors="replace"))}
    assert {"BVPO_RUN_DIR", "BVPO_STOP_FILE", "BVPO_CACHE"} <= names
    assert names - {*SETTINGS, *OTHER_VARIABLES} == set()
