"""Adapters that a run is given: which folder Megatron reads, and settings that it would drop."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.adapter_folders import check_adapters, use_readable_forms

RUN = dict(lora_rank=8, lora_alpha=32, use_rslora=False, adapters=[], ref_adapters=[], finetune=True)
RUN |= dict(mcore_adapter=None, mcore_ref_adapter=None)


def adapter(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 32.0, "use_rslora": False, **config}))
    (folder / "adapter_model.safetensors").touch()
    return str(folder)


@pytest.mark.parametrize("flag", ["adapters", "ref_adapters"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'.* no place .*swift export --merge_lora true"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is"),
        ({"r": 4}, "r is 4 and this run's is 8, .*give --lora_rank 4"),
        ({"lora_alpha": 16}, "lora_alpha is 16 and this run's is 32, .*give --lora_alpha 16"),
        ({"use_rslora": True}, "use_rslora is True and this run's is False"),
    ],
)
def test_what_megatron_would_drop_is_told(tmp_path, flag, config, message):
    folder = adapter(tmp_path / "a", **config)
    with pytest.raises(UserError, match=message) as found:
        check_adapters(SimpleNamespace(**RUN | {flag: [folder]}))
    assert found.value.field == f"--{flag}" and found.value.file == f"{folder}/adapter_config.json"


@pytest.mark.parametrize("flag", ["mcore_adapter", "mcore_ref_adapter"])
def test_another_scale_of_megatrons_form_is_told(tmp_path, flag):
    (tmp_path / "args.json").write_text(json.dumps({"lora_rank": 8, "lora_alpha": 16.0, "use_rslora": False}))
    with pytest.raises(UserError, match="lora_alpha is 16.0 and this run's is 32") as found:
        check_adapters(SimpleNamespace(**RUN | {flag: str(tmp_path)}))
    assert found.value.file == f"{tmp_path}/args.json"
    check_adapters(SimpleNamespace(**RUN | {flag: str(tmp_path), "lora_alpha": 16}))
    resumed = SimpleNamespace(**RUN | {flag: str(tmp_path), "finetune": False})
    if flag == "mcore_adapter":  # a resume has its own comparison
        check_adapters(resumed)


def test_megatrons_form_of_adapters_beside_whole_layers_is_told(tmp_path):
    """The one holds layers that the other has no place for, under other names."""
    (tmp_path / "args.json").write_text(json.dumps({"lora_rank": 8, "bvpo_new_layers_only": True}))
    run = RUN | {"mcore_adapter": str(tmp_path), "bvpo_new_layers_only": False}
    with pytest.raises(UserError, match="bvpo_new_layers_only is True and this run's is False"):
        check_adapters(SimpleNamespace(**run))
    check_adapters(SimpleNamespace(**run | {"bvpo_new_layers_only": True}))


def test_what_megatron_keeps_passes(tmp_path):
    peft = {"init_lora_weights": True, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.5}
    (tmp_path / "bare").mkdir()  # no adapter_config.json: mcore-bridge needs none
    folders = [adapter(tmp_path / "a", **peft), adapter(tmp_path / "b", init_lora_weights="gaussian")]
    check_adapters(SimpleNamespace(**RUN | {"adapters": folders, "ref_adapters": [str(tmp_path / "bare")]}))


def test_a_broken_config_is_told(tmp_path):
    folder = adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        check_adapters(SimpleNamespace(**RUN | {"adapters": [folder]}))


def test_a_checkpoint_gives_the_form_that_megatron_reads(tmp_path):
    outer = adapter(tmp_path / "a")
    plain = adapter(tmp_path / "b")
    inner = adapter(tmp_path / "a" / "vllm")
    args = SimpleNamespace(adapters=outer, ref_adapters=[outer, plain, "some/hub-id"])
    use_readable_forms(args)
    assert args.adapters == [inner] and args.ref_adapters == [inner, plain, "some/hub-id"]
    use_readable_forms(args)
    assert args.adapters == [inner]
