"""What makes a reference another one: every file that is loaded, and every setting that changes its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.host import reference_key as key

FILES = {"reference/model.safetensors": "a1"}
ALL = [*key.SETTINGS, *key.ADAPTER_SETTINGS, "seed"]


def args(**changed):
    values = dict.fromkeys(ALL, "as it was") | {"new_special_tokens": [], "bvpo_new_layers_only": False}
    return SimpleNamespace(**(values | changed))


@pytest.mark.parametrize("name", [n for n in key.SETTINGS if n != "new_special_tokens"])
def test_a_setting_that_changes_the_numbers_changes_the_key(name):
    assert key.key_of(FILES, args(**{name: "another"}))[0] != key.key_of(FILES, args())[0]


@pytest.mark.parametrize("name", key.ADAPTER_SETTINGS)
def test_lora_settings_count_where_the_reference_is_an_adapter(name):
    changed = args(**{name: "another"})
    assert key.key_of(FILES, changed)[0] == key.key_of(FILES, args())[0]
    adapter = FILES | {"adapter/adapter_model.safetensors": "b2"}
    assert key.key_of(adapter, changed)[0] != key.key_of(adapter, args())[0]


def test_without_its_new_layers_a_model_is_another_reference():
    """Of a model whose new layers were trained, the same files are the reference of a run that trains all."""
    assert key.key_of(FILES, args(bvpo_new_layers_only=True))[0] != key.key_of(FILES, args())[0]


def test_with_adapters_beside_them_it_is_the_same_reference(tmp_path):
    given = dict.fromkeys(("ref_model", "mcore_ref_model")) | {"model": "grown", "bvpo_new_layers_only": True}
    given["model_info"] = SimpleNamespace(model_dir=str(tmp_path))
    folders = [key.reference_folders(args(tuner_type=tuner, **given)) for tuner in ("full", "lora")]
    assert folders == [{"reference": str(tmp_path)}] * 2


def test_random_rows_of_new_tokens_come_from_the_seed():
    assert key.key_of(FILES, args(seed="another"))[0] == key.key_of(FILES, args())[0]
    added = dict(new_special_tokens=["<x>"])
    assert key.key_of(FILES, args(**added, seed="another"))[0] != key.key_of(FILES, args(**added))[0]


@pytest.mark.parametrize("files", [{"reference/model.safetensors": "a2"}, {**FILES, "adapter/config.json": "a1"}])
def test_other_files_are_another_reference(files):
    assert key.key_of(files, args())[0] != key.key_of(FILES, args())[0]


def test_another_version_is_another_reference(monkeypatch):
    before = key.key_of(FILES, args())[0]
    monkeypatch.setattr(key.versions, "installed", lambda name: "99.0")
    assert key.key_of(FILES, args())[0] != before


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return str(folder)


def test_every_file_that_is_loaded_is_found(tmp_path):
    names = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "README.md", "vocab.json"]
    hub = write(tmp_path / "hub", *names)
    megatron = write(
        tmp_path / "megatron",
        "latest_checkpointed_iteration.txt",
        "iter_0000002/.metadata",
        "iter_0000002/__0_0.distcp",
        "args.json",
    )
    assert set(key.reference_files({"reference": hub})) == {f"reference/{name}" for name in names[:3]}
    assert set(key.reference_files({"reference": megatron, "shape": hub})) == {
        "reference/latest_checkpointed_iteration.txt",
        "reference/iter_0000002/.metadata",
        "reference/iter_0000002/__0_0.distcp",
        "shape/config.json",
        "shape/model.safetensors.index.json",
    }


def test_a_folder_without_weights_is_no_reference(tmp_path):
    with pytest.raises(UserError, match="no weight file"):
        key.reference_files({"reference": write(tmp_path / "hub", "config.json")})
