"""`bvpo report`: series, spikes, settings that differ and names of runs, all of them pure."""

import math
import random
from pathlib import Path, PurePath

import pytest

from megatron_bvpo.reporting import differing_settings as settings
from megatron_bvpo.reporting import series
from megatron_bvpo.reporting.run_log import read_log
from megatron_bvpo.reporting.spikes import FEWEST, spikes
from tests.unit.report_runs import made_run


def line(step, **metrics):
    return {"step": step, **{name.replace("__", "/"): value for name, value in metrics.items()}}


def test_a_step_that_was_done_again_counts_once_and_in_order():
    lines = [line(1, grad_norm=1.0), line(2, grad_norm=2.0), line(3, grad_norm=9.0), line(2, grad_norm=2.5)]
    assert series.series(lines, "grad_norm") == ([1, 2, 3], [1.0, 2.5, 9.0])


def test_a_dpo_run_overlays_the_trace_stream():
    dpo, empty_only = [line(1, loss=0.6)], [{"step": 1, "loss": 0.6, "loss/empty": 0.6}]
    assert series.series(dpo, "loss/trace") == ([1], [0.6])
    assert series.series(empty_only, "loss/trace") == ([], [])


def test_thinning_keeps_ends_and_extremes_and_order():
    steps = list(range(10_000))
    values = [math.sin(step / 300) for step in steps]
    values[4321], values[8765] = 50.0, -50.0
    kept, shown = series.thinned(steps, values, 500)
    assert 250 <= len(kept) <= 510
    assert kept == sorted(set(kept)) and (kept[0], kept[-1]) == (0, 9999)
    assert shown[kept.index(4321)] == 50.0 and shown[kept.index(8765)] == -50.0


def test_what_is_no_number_is_a_gap():
    assert series.thinned([1, 2, 3], [1.0, math.nan, math.inf]) == ([1, 2, 3], [1.0, None, None])
    kept, shown = series.thinned(list(range(4000)), [math.nan] * 4000)
    assert set(shown) == {None} and kept[-1] == 3999


def test_the_band_has_the_steps_that_have_both_edges():
    lines = [line(1, alpha__low=0.1, alpha__high=0.9), line(2, alpha__low=0.2)]
    lines.append(line(3, alpha__low=0.3, alpha__high=0.5))
    assert series.band(lines) == [[1, 3], [0.1, 0.3], [0.9, 0.5]]
    assert series.band([line(1, loss=1.0)]) == [[], [], []]


def test_a_run_is_drawn_with_every_stream_and_kind(tmp_path):
    training, evaluation = read_log(made_run(tmp_path / "run", steps=60, spikes=(45,)))
    found = series.drawn(training, evaluation)
    of_others = ("short/", "expert/", "loss/short", "loss/expert", "weight/")
    assert set(found["lines"]) == {key for key in series.KEYS if not key.startswith(of_others)}
    assert set(found["lines"]["empty/rewards/margins"]) == {"t", "h"}
    assert set(found["lines"]["grad_norm"]) == {"t"}
    assert series.found_spikes(training) == {"grad_norm": [45]}
    assert len(found["band"][0]) == 13


@pytest.mark.parametrize("spread", [0.1, 0.4, 0.8])
def test_noise_is_no_spike_and_a_jump_is(spread):
    found = planted = 0
    for seed in range(10):
        rng = random.Random(seed)
        values = [math.exp(-step / 400 + rng.gauss(0, spread)) for step in range(1000)]
        found += len(spikes(range(1000), values))
        values[500] = math.exp(-500 / 400 + 8 * spread + math.log(1.5))
        planted += 500 in spikes(range(1000), values)
    assert (found, planted) == (0, 10)


def test_short_runs_are_seldom_called_wrongly():
    """With 20 to 30 steps the spread is known badly: about one in three thousand steps."""
    found = 0
    for seed in range(1000):
        rng = random.Random(seed)
        found += len(spikes(range(30), [math.exp(rng.gauss(0, 0.4)) for _ in range(30)]))
    assert found <= 10


def test_edges_of_the_rule():
    flat = [1.0] * FEWEST
    steps = range(1, FEWEST + 2)
    assert spikes(steps, [*flat, 1.49]) == [] and spikes(steps, [*flat, 1.51]) == [FEWEST + 1]
    assert spikes(steps, [*flat[1:], 9.0, 1.0]) == [], "nothing is judged before so many steps"
    assert spikes(steps, [*flat, math.nan]) == [FEWEST + 1]
    assert spikes([1, 2], [1.0, math.inf]) == [2]
    assert spikes(range(60), [0.0] * 59 + [3.0]) == [], "a hinge loss of zeros has no logarithms to compare with"
    late = [1.0] * 100 + [5.0] * 60
    assert spikes(range(160), late) == list(range(100, 125)), "a new level stops to be one when it is the median"


def test_columns_are_the_tuned_ones_and_those_that_differ():
    flags = {"lr": 5e-5, "beta": 0.1, "tuner_type": "lora", "lora_rank": 16, "seed": 1, "bvpo_kappa": 0.1}
    base = settings.plain_settings(flags | {"output_dir": "a"})
    other = base | {"seed": "2", "output_dir": "b", "model_info": "x", "bvpo_kappa": "0.2"}
    assert settings.columns([base]) == (["lora_rank", "lr", "beta"], [])
    assert settings.columns([base, other]) == (["lora_rank", "lr", "beta", "bvpo_kappa", "seed"], [])
    assert settings.columns([base, {}]) == (["lora_rank", "lr", "beta"], []), "unknown settings do not differ"
    older = {name: text for name, text in base.items() if name != "seed"}
    assert settings.columns([base, older]) == (["lora_rank", "lr", "beta"], []), "nor those that another version lacks"


def test_a_rank_without_lora_is_not_shown():
    full = settings.plain_settings({"tuner_type": "full", "lora_rank": 8, "lr": 1e-6})
    assert settings.columns([full]) == (["lr"], [])
    assert settings.shown(full, "lora_rank") == settings.NONE


def test_too_many_that_differ_are_named():
    runs = [{f"flag_{i:02}": str(i + run) for i in range(40)} for run in range(2)]
    shown, left_out = settings.columns(runs)
    assert len(shown) == settings.MOST_COLUMNS and len(left_out) == 40 - settings.MOST_COLUMNS


def test_secrets_are_masked_by_name_by_shape_and_wherever_they_stand_again():
    plain = settings.plain_settings(
        {
            "hub_token": "my-own-secret-1",
            "swanlab_token": None,
            "system": "the token is my-own-secret-1",
            "model_kwargs": {"api_key": "another-secret"},
            "external": ["https://user:passw0rd@host/x", "hf_0123456789abcdefghij"],
            # Called like secrets by somebody, and none.
            "lazy_tokenize": False,
            "max_new_tokens": 512,
            "teacher_tag_key": "dataset",
            "download_mode": "reuse_dataset_if_exists",
        }
    )
    text = str(plain)
    for secret in ("my-own-secret-1", "another-secret", "passw0rd", "hf_0123456789abcdefghij"):
        assert secret not in text
    assert plain["hub_token"] == "***" and plain["swanlab_token"] == settings.NONE
    assert (plain["lazy_tokenize"], plain["max_new_tokens"]) == ("false", "512")
    assert (plain["teacher_tag_key"], plain["download_mode"]) == ("dataset", "reuse_dataset_if_exists")


def test_names_are_as_short_as_tells_them_apart():
    names = settings.unique_names([PurePath(p) for p in ("/out/a", "/out/b", "/old/b", "/out/c/v0-20261127-104500")])
    assert names == ["a", "out/b", "old/b", "c/v0-20261127-104500"]
    assert settings.unique_names([PurePath("/x/a"), PurePath("/a")]) == ["x/a", "/a"]


def test_files_are_named_with_no_more_folders_than_tell_them_apart():
    assert settings.short_paths(["/d/DS1.jsonl", "/d/DS2.jsonl"]) == ["DS1.jsonl", "DS2.jsonl"]
    assert settings.short_paths(["/d/1/x.jsonl", "/d/2/x.jsonl"]) == ["1/x.jsonl", "2/x.jsonl"]
    assert settings.short_paths(["/d/1/x.jsonl, a/y.jsonl", "–"]) == ["x.jsonl, y.jsonl", "–"]


def test_lines_that_are_none_are_left_out(tmp_path):
    log: Path = tmp_path / "logging.jsonl"
    bad = b'7\n[]\n{"iteration": 3}\n{"iteration": "x/9"}\n\xff\xfe\n'
    log.write_bytes(bad + b'{"iteration": "4/9", "loss": 1.0}\n{"iter')
    training, evaluation = read_log(tmp_path)
    assert [found["step"] for found in training] == [4] and evaluation == []
