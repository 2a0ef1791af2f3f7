"""The plugin file: BVPO without the route, in ms-swift's own DPO run."""

import sys

import pytest

from tests.contracts.console import ROOT, last_line

PLUGIN = ROOT / "plugins" / "megatron_bvpo_plugin.py"
IMPORT_PLUGIN = (
    "import runpy, sys, types; plugin, sys.argv[1:] = sys.argv[1], sys.argv[2:]\n"
    "if '--fake_megatron' in sys.argv: sys.modules['swift.megatron'] = types.ModuleType('swift.megatron')\n"
    "pipeline = sys.modules['megatron_bvpo.training.pipeline']\n"
    "pipeline.activate_plugin = lambda settings: print('settings', settings)\n"
    "runpy.run_path(plugin)"
)


def test_the_plugin_hands_its_settings_to_the_pipeline(call):
    flags = ["--rlhf_type", "dpo", "--fake_megatron"]
    result = call(sys.executable, "-c", IMPORT_PLUGIN, str(PLUGIN), *flags, BVPO_ALPHA="0.3", BVPO_EMPTY="require")
    assert result.stdout == "settings {'bvpo_alpha': 0.3, 'bvpo_empty': 'require'}\n", result.stderr


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--rlhf_type", "dpo"], {}, "found --rlhf_type dpo without the Megatron backend"),
        (["--rlhf_type", "kto", "--fake_megatron"], {}, "found --rlhf_type kto with the Megatron backend"),
        (["--rlhf_type", "bvpo", "--fake_megatron"], {}, "which needs no plugin"),
        (["--fake_megatron"], {"BVPO_ALFA": "1"}, "BVPO_ALFA: no such setting. Did you mean BVPO_ALPHA?"),
    ],
)
def test_the_plugin_refuses_a_run_that_would_not_be_bvpo(call, flags, env, message):
    result = call(sys.executable, "-c", IMPORT_PLUGIN, str(PLUGIN), *flags, **env)
    assert result.returncode == 1 and message in last_line(result)


def test_the_plugin_alone_finds_a_checkout_beside_it(call, tmp_path):
    """Without site-packages nothing of ours is importable; the refusal is ours, so the package was found."""
    (tmp_path / "mounted").mkdir()
    alone = tmp_path / "mounted" / PLUGIN.name
    alone.write_text(PLUGIN.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mounted" / "checkout").symlink_to(ROOT)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    assert "the BVPO plugin needs Megatron's DPO" in call(sys.executable, "-S", "-c", code, str(alone)).stderr
    (tmp_path / "mounted" / "checkout").unlink()
    assert "Set BVPO_ROOT" in call(sys.executable, "-S", "-c", code, str(alone)).stderr
