"""Which settings go with which kind of loss."""

from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.objective.preference import PreferenceConfig
from megatron_bvpo.objective.unpaired import UnpairedConfig
from megatron_bvpo.training.config import preference_settings, refuse_useless_cache

DEFAULTS = {
    "loss_type": "sigmoid",
    "beta": 0.1,
    "bvpo_empty_beta": None,
    "bvpo_short_beta": None,
    "label_smoothing": 0.0,
    "rpo_alpha": None,
    "reference_free": False,
    "bvpo_simpo_gamma": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}


def test_a_loss_of_pairs():
    found = preference_settings({**DEFAULTS, "loss_type": "sigmoid_norm", "beta": 5, "bvpo_empty_beta": 0.5})
    assert found == PreferenceConfig("sigmoid_norm", 5.0, empty_beta=0.5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_loss_of_single_responses(loss_type):
    given = {"loss_type": loss_type, "bvpo_empty_beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 2}
    assert preference_settings({**DEFAULTS, **given}) == UnpairedConfig(loss_type, 0.1, 1.2, 2.0, 0.5)


@pytest.mark.parametrize(
    ("loss_type", "name", "value", "kind"),
    [
        ("kto", "label_smoothing", 0.1, "pairs"),
        ("kto", "rpo_alpha", 1.0, "pairs"),
        ("apo_zero_unpaired", "reference_free", True, "pairs"),
        ("kto", "bvpo_short_beta", 0.1, "pairs"),
        ("sigmoid", "desirable_weight", 1.5, "single responses"),
        ("sigmoid_norm", "undesirable_weight", 0.5, "single responses"),
    ],
)
def test_settings_of_the_other_kind_are_refused(loss_type, name, value, kind):
    with pytest.raises(UserError, match=f"--{name}: is {value}.*belongs to losses of {kind}"):
        preference_settings({**DEFAULTS, "loss_type": loss_type, name: value})


def test_the_cache_keeps_pairs():
    values = {"bvpo_refs_only": False, "bvpo_ref_cache": "folder", "streaming": False}
    with pytest.raises(UserError, match="--bvpo_ref_cache: .*kto takes single responses"):
        refuse_useless_cache(values, UnpairedConfig("kto"))


@pytest.mark.parametrize(
    ("loss_type", "beta"), [(None, 0.1), ("sigmoid", 0.1), ("sigmoid_norm", 5.0), ("simpo", 2.0), ("kto", 0.1)]
)
def test_the_default_beta(loss_type, beta):
    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    from megatron_bvpo.training.arguments import settle_preference_defaults

    args = SimpleNamespace(loss_type=loss_type, beta=None)
    settle_preference_defaults(args)
    assert (args.loss_type, args.beta) == (loss_type or "sigmoid", beta)
