"""`--bvpo_streams`, `--bvpo_weights`, `--bvpo_alpha`: what they mean together, what is refused; a user's own loss."""

import math

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.stream_flags import read_streams, rules_of_command
from megatron_bvpo.objective.own_loss import own_function
from megatron_bvpo.streams import ORDER, TABLE, estimators, in_order

TWO = ("trace", "empty")


@pytest.mark.parametrize(
    ("given", "streams", "measured", "weights"),
    [
        ((None, None, "auto"), TWO, True, {"trace": 0.5, "empty": 0.5}),
        ((["empty", "trace"], [], 0.3), TWO, False, {"trace": 0.3, "empty": 0.7}),
        ((None, None, "1"), ("trace",), False, {"trace": 1.0, "empty": 0.0}),
        ((None, None, 0), ("empty",), False, {"trace": 0.0, "empty": 1.0}),
        ((["expert", *TWO], None, 1), ("trace", "expert"), False, {"trace": 1.0, "empty": 0.0}),
        ((["trace", "short"], None, "auto"), ("trace", "short"), True, {"trace": 0.5, "short": 0.5}),
        (("trace empty short", ["auto"], "auto"), (*TWO, "short"), True, {"trace": 0.5, "empty": 0.25, "short": 0.25}),
        (
            (ORDER, ["trace=.5", "empty=.2", "short=.3"], "auto"),
            ORDER,
            False,
            {"trace": 0.5, "empty": 0.2, "short": 0.3},
        ),
        ((TWO, "trace=1 empty=0", "auto"), ("trace",), False, {"trace": 1.0, "empty": 0.0}),
        ((["expert"], None, "auto"), ("expert",), False, {}),
        ((["short"], None, "auto"), ("short",), False, {"short": 1.0}),
    ],
)
def test_what_they_mean(given, streams, measured, weights):
    found = read_streams(*given)
    assert (found.streams, found.measured) == (streams, measured)
    assert found.weights == pytest.approx(weights) and list(found.weights) == list(weights)


def test_the_prior_is_the_first_streams_and_the_others_share_the_rest():
    assert read_streams("trace short empty", None, "auto", prior=0.8).weights == pytest.approx(
        {"trace": 0.8, "empty": 0.1, "short": 0.1}
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((["trace", "words"], None, "auto"), "--bvpo_streams: has 'words'; expected of trace, empty, short, expert"),
        ((["trace", "trace"], None, "auto"), "a stream twice"),
        ((None, ["trace=.5", "empty=.5"], 0.5), "--bvpo_alpha: is 0.5, and bvpo_weights is given, too"),
        ((["trace", "short"], None, 0.5), "--bvpo_alpha: is 0.5, which weighs trace against empty"),
        ((None, ["trace=.5"], "auto"), "--bvpo_weights: names trace; the streams to weigh are trace, empty"),
        ((ORDER, ["trace=.5", "empty=.2", "short=.2", "expert=.1"], "auto"), "demonstrations have a schedule"),
        ((None, ["trace=.5", "empty=.6"], "auto"), "add up to 1.1; expected 1"),
        ((None, ["trace=half", "empty=.5"], "auto"), "has 'trace=half'; expected NAME=NUMBER"),
        ((None, ["trace=-1", "empty=2"], "auto"), "has 'trace=-1'"),
        ((None, None, "2"), "expected a number in"),
        ((["empty", "short"], None, "auto"), "--bvpo_weights: are to be measured for empty, short.* add trace"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        read_streams(*given)


def test_rules_of_a_command():
    rules = rules_of_command("--bvpo_streams trace expert --bvpo_gate hpt --bvpo_gate_threshold 0.25".split())
    assert (rules.streams, rules.gate_threshold, rules.empty) == (("trace", "expert"), 0.25, "strip")
    assert rules_of_command(["--bvpo_alpha", "1"]).streams == ("trace",)
    assert rules_of_command(["--bvpo_alpha", "0.0"]).streams == ("empty",)
    assert rules_of_command(["--loss_type", "kto"]).unpaired


def test_the_table():
    assert in_order(reversed(ORDER)) == ORDER and estimators(ORDER) == ("trace", "empty", "short")
    assert TABLE["trace"].key_prefix == TABLE["trace"].log_prefix == ""
    fields = [field for stream in TABLE.values() for field in stream.fields]
    assert len(fields) == len(set(fields))


def test_a_function_of_a_users_own():
    assert own_function("sft", ("sft",), "--x") == "sft"
    assert own_function("math:sqrt", ("sft",), "--x") is math.sqrt
    for name, said in {
        "another": "is 'another'; expected sft, or module:function",
        "no_such_module_here:f": "cannot be loaded",
        "math:no_such_function": "cannot be loaded",
        "math:pi": "is no function",
        ":f": "expected sft",
    }.items():
        with pytest.raises(UserError, match=said):
            own_function(name, ("sft",), "--x")
