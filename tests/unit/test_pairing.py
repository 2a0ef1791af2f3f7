"""Which samples become pairs: on drawn samples, the promises of each policy; and what the mixing and splits promise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.pairing import pairing
from megatron_bvpo.sampling.pairing.pair_mixing import Lot, held_out, mixed, read_heldout, read_shares
from megatron_bvpo.sampling.pairing.pairing import Candidate, PairRules, choose_pairs, pool_of, preferring_shorter

SCORES = st.sampled_from([None, -1.0, 0.0, 0.5, 1.0])


@st.composite
def candidates(draw, most=9):
    found = []
    for number in range(draw(st.integers(0, most))):
        length = draw(st.integers(1, 6))
        found.append(
            Candidate(
                draw(st.integers(0, 1)),
                "q",
                number,
                draw(st.integers(0, 12)),
                length,
                draw(st.sampled_from([None, length, 7])),
                draw(st.sampled_from([None, -2.0, -0.5])),
                draw(st.sampled_from([None, None, None, "truncated"])),
                draw(st.booleans()),
                draw(st.sampled_from([None, True, False])),
                draw(SCORES),
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    return found


def pairs_of(found, rules, mode="thinking"):
    pool, left_out = pool_of("q", mode, found, rules)
    return pool, choose_pairs([pool], rules).get(("q", mode), []), left_out


@settings(max_examples=300, deadline=None)
@given(
    found=candidates(),
    mode=st.sampled_from(["thinking", "empty"]),
    rejected=st.sampled_from(["random", "likely"]),
    margin=st.sampled_from([0.0, 0.5, 2.0]),
    most=st.integers(1, 4),
    match=st.booleans(),
    seed=st.integers(0, 3),
)
def test_right_wrong_never_gives_a_wrong_chosen_or_a_right_or_unread_rejected(
    found, mode, rejected, margin, most, match, seed
):
    rules = PairRules("right_wrong", rejected, margin, most, match, seed)
    pool, pairs, _ = pairs_of(found, rules, mode)
    assert bool(pairs) == (pool.reason is None) and len(pairs) <= most
    for chosen, other in pairs:
        assert chosen.right is True and other.right is False and other.parsed
        assert chosen.unusable is None and other.unusable is None and chosen.digest != other.digest
        assert not margin or chosen.score - other.score >= margin
        assert mode == "empty" or chosen.traced or other.traced
    used = [c.name for pair in pairs for c in pair]
    texts = [c.digest for pair in pairs for c in pair]
    assert len(used) == len(set(used)) and len(texts) == len(set(texts)), "a text counts once"
    for text in texts:  # no judge calls the same text right in one sample and wrong in another
        assert len({c.right for c in found if c.digest == text and not c.unusable} - {None}) == 1
    assert pairs == pairs_of(list(reversed(found)), rules, mode)[1], "the order of the samples has a say"


@settings(max_examples=200, deadline=None)
@given(found=candidates(), margin=st.sampled_from([0.0, 0.75]), match=st.booleans(), seed=st.integers(0, 3))
def test_best_worst_is_arg_max_and_arg_min(found, margin, match, seed):
    rules = PairRules("best_worst", margin=margin, match_length=match, seed=seed)
    pool, pairs, _ = pairs_of(found, rules, "empty")
    usable = pairing.distinct(found)[0]
    scores = [c.score for c in usable if c.score is not None]
    gap = max(scores) - min(scores) if scores else 0
    if any(c.judged for c in usable) and gap > 0 and gap >= margin:
        ((chosen, other),) = pairs
        assert chosen.score == max(scores) and other.score == min(scores)
    else:
        assert not pairs and pool.reason


@settings(max_examples=100, deadline=None)
@given(found=candidates())
def test_likely_takes_the_wrong_one_with_the_highest_mean_log_probability(found):
    pool, pairs, _ = pairs_of(found, PairRules(rejected="likely"), "empty")
    for pair in pairs:
        best = max(pairing._likelihood(c) for c in pool.rejected)
        assert pairing._likelihood(pair.rejected) == best


def many_prompts(seed, prompts, lengths_right, lengths_wrong):
    draw = random.Random(seed)
    pools = []
    for i in range(prompts):
        found = []
        for number in range(8):
            right = number < draw.randint(1, 7)
            length = draw.choice(lengths_right if right else lengths_wrong)
            found.append(Candidate(0, f"q{i}", number, draw.getrandbits(60), length, length + number % 2, right=right))
            found[-1].parsed = True
        pools.append(pool_of(f"q{i}", "empty", found, PairRules())[0])
    return pools


LENGTHS = {
    "right ones are longer": (range(20, 80), range(10, 60)),
    "right ones are shorter": (range(10, 40), range(15, 50)),
    "few lengths, many ties": ([2, 3, 3], [2, 3, 4]),
    "ties or longer": ([4, 5], [4]),
}


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("case", LENGTHS)
def test_match_length_brings_preferring_the_shorter_to_one_half(case, most):
    pools = many_prompts(3, 300, *LENGTHS[case])
    scores = {}
    for match in (False, True):
        found = choose_pairs(pools, PairRules(most=most, match_length=match))
        lengths = [(p.chosen.characters, p.rejected.characters) for pairs in found.values() for p in pairs]
        scores[match] = preferring_shorter(lengths)
    assert not 0.45 <= scores[False] <= 0.55, "there is nothing to match"
    if most == 1:
        assert 0.45 <= scores[True] <= 0.55
    else:  # all pairs of a prompt together leave less choice
        assert abs(scores[True] - 0.5) < abs(scores[False] - 0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, unique=True), min_size=1, max_size=12))
def test_match_length_gets_as_near_as_the_samples_allow(choices):
    """Against all sums of signs that one choice a prompt can have."""
    pools, reachable = [], {0}
    for i, signs in enumerate(choices):
        chosen = Candidate(0, f"q{i}", 0, 1, 10, right=True)
        wrong = [Candidate(0, f"q{i}", n, n + 1, 10 + s, right=False, parsed=True) for n, s in enumerate(signs, 1)]
        pools.append(pool_of(f"q{i}", "empty", [chosen, *wrong], PairRules())[0])
        reachable = {total + sign for total in reachable for sign in signs}
    found = choose_pairs(pools, PairRules(match_length=True))
    total = sum(pairing.shorter(pair) for pairs in found.values() for pair in pairs)
    assert abs(total) <= min(map(abs, reachable)) + 1


def test_a_prompts_pair_does_not_depend_on_the_others():
    pools = many_prompts(5, 40, range(10, 40), range(10, 40))
    some = choose_pairs(pools[::3], PairRules())
    everything = choose_pairs(pools, PairRules())
    assert all(everything[name] == pairs for name, pairs in some.items())
    assert choose_pairs(pools, PairRules(seed=1)) != everything


def one(number, digest=None, **more):
    given = {"right": True, "parsed": True, **more}
    return Candidate(0, "q", number, number if digest is None else digest, 5, **given)


REASONS = {
    "no samples": [],
    "all right": [one(0), one(1)],
    "all wrong": [one(0, right=False), one(1, right=False)],
    "truncated": [one(0, unusable="truncated"), one(1, unusable="truncated", right=False)],
    "the wrong ones cannot be used: truncated": [one(0), one(1, unusable="truncated", right=False)],
    "the right ones cannot be used: truncated": [one(0, unusable="truncated"), one(1, right=False)],
    "no answer was read out of the wrong ones": [one(0), one(1, right=False, parsed=False)],
    "the same text was judged right and wrong": [one(0, 7), one(1, 7, right=False)],
    "not judged": [one(0, right=None)],
    "without a verdict": [one(0, right=None, seen=True), one(1, right=None)],
    "no two of them of which one has a trace": [one(0, traced=False), one(1, right=False, traced=False)],
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_there_is_no_pair(reason):
    assert pairs_of(REASONS[reason], PairRules())[0].reason == reason


SCORED = {
    "no score": [one(0, score=None)],
    "one text alone": [one(0, 5, score=1.0), one(1, 5, score=1.0)],
    "equal scores": [one(0, score=1.0), one(1, score=1.0)],
    "the scores differ by less than --margin": [one(0, score=1.0), one(1, score=0.9)],
}


@pytest.mark.parametrize("reason", SCORED)
def test_why_there_is_no_best_and_worst(reason):
    assert pairs_of(SCORED[reason], PairRules("best_worst", margin=0.5))[0].reason == reason


# --- mixing and splits ---


def lots(n, texts, source="a"):
    return [Lot(f"{source}{i}", f"text {i % texts}", source) for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 80), texts=st.integers(2, 60), amount=st.sampled_from([0.1, 0.5, 0.9, 1]), seed=st.integers(0, 9)
)
def test_a_split_shares_no_prompt(n, texts, amount, seed):
    found = lots(n, texts)
    held = held_out(found, amount, seed)
    split = {True: set(), False: set()}
    for lot in found:
        split[lot.key in held].add(lot.split_key)
    assert split[True] and split[False] and not split[True] & split[False]


def test_a_held_out_prompt_stays_held_out_when_there_are_more():
    few, more = lots(100, 100), lots(1000, 1000)
    held = held_out(few, 0.2, 0)
    assert held == held_out(more, 0.2, 0) & {lot.key for lot in few}
    assert 150 < len(held_out(more, 0.2, 0)) < 250 and len(held_out(more, 70, 0)) == 70
    with pytest.raises(UserError, match="100 prompts are to be held out, and 100 have a pair"):
        held_out(few, 100, 0)


@pytest.mark.parametrize(("a", "b", "kept"), [(30, 700, (30, 70)), (600, 70, (30, 70)), (300, 700, (300, 700))])
def test_a_mix_takes_as_much_as_its_shares_allow(a, b, kept):
    shares = read_shares(["a=0.3", "b=.7"], ["a", "b"])
    found = mixed([*lots(a, a, "a"), *lots(b, b, "b")], shares, 0)
    assert tuple(sum(key.startswith(name) for key in found) for name in "ab") == kept
    assert mixed([*lots(a, a, "a"), *lots(b, b, "b")], {"a": 1.0, "b": 0.0}, 0) == {lot.key for lot in lots(a, a)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a"], "expected NAME=SHARE, found 'a'"),
        (["a=x", "b=1"], "expected NAME=SHARE, found 'a=x'"),
        (["c=0.3", "a=0.7"], "no folder is called 'c'"),
        (["a=1"], "no share for b"),
        (["a=0.3", "b=0.3"], "the shares add up to 0.6"),
        (["a=0.5", "a=0.5"], "a has two shares"),
        (["a=-1", "b=2"], "expected NAME=SHARE, found 'a=-1'"),
        (["a=nan", "b=1"], "expected NAME=SHARE, found 'a=nan'"),
    ],
)
def test_shares_that_are_none(given, told):
    with pytest.raises(UserError, match=told):
        read_shares(given, ["a", "b"])


def test_amounts_to_hold_out():
    assert read_heldout("0.05") == 0.05 and read_heldout("500") == 500 and read_shares(["a=30%", "b=0.7"], ["a", "b"])
    for text in ("0", "1.5", "-3", "half", "nan", "0.0"):
        with pytest.raises(UserError, match="expected a share between 0 and 1, or a number of prompts"):
            read_heldout(text)
