"""Gram matrices from two halves are unbiased, also where rows lack some of their members, unevenly.

Each planted fault is one that the Monte Carlo, or the one rank that holds everything, must notice.
"""

from __future__ import annotations

import itertools
import threading
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bvpo.gradients import moments
from megatron_bvpo.gradients.alpha import Moments
from megatron_bvpo.gradients.moments import StreamCounts, grams_of, measure_grams
from megatron_bvpo.gradients.shards import Slice

NAMES = ("trace", "empty", "short", "other")
DRAWS, DIM = 2000, 8
BIAS = np.array([0.0, 0.4, -0.3, 0.2])  # of each element
OWN = np.array([1.0, 0.5, 0.8, 0.6])  # a row's noise of each stream
SHARED = np.array([0.6, 0.6, -0.5, 0.3])  # and its part in the row's common noise

# The streams that each row has, half A / half B, as letters of t(race), e(mpty), s(hort), o(ther).
CASES = {
    "whole": "te te te te / te te te te",
    "unequal halves": "te te te / te te te te te",
    "empty pairs lost": "te t t t / te te te te",
    "few rows": "te t t / te te",
    "of both kinds": "te e e e / te t t e",
    "no row has both": "t t e e e / t t e e",
    "three streams": "tes tes tes / tes tes tes tes",
    "three streams, lost unevenly": "tes t t t ts / tes tes tes es s",
    "three streams, short ones on few rows": "tes te te te te / ts te e tes",
    "two of three never on one row": "te te s / te te s s",
    "four streams, lost unevenly": "teso ts eo to / teso tes t eo s",
}


def rows_of(case: str) -> tuple[tuple[str, ...], list[list[str]]]:
    halves = [half.split() for half in case.split("/")]
    return tuple(n for n in NAMES if n[0] in case), halves


def counts_of(case: str) -> StreamCounts:
    names, halves = rows_of(case)

    def count(*wanted: str) -> tuple[float, float]:
        return tuple(float(sum(all(n[0] in row for n in wanted) for row in half)) for half in halves)

    shared = {pair: count(*pair) for pair in itertools.combinations(names, 2)}
    return StreamCounts({name: count(name) for name in names}, shared)


def draw(generator, case: str) -> dict:
    """Mean gradients of the halves, of DRAWS batches at once [DRAWS · DIM]."""
    names, halves = rows_of(case)
    found = {}
    for half, rows in zip("AB", halves, strict=True):
        common = generator.normal(size=(len(rows), DRAWS, DIM))
        for j, name in enumerate(names):
            mine = [i for i, row in enumerate(rows) if name[0] in row]
            noise = OWN[j] * generator.normal(size=(len(mine), DRAWS, DIM)) + SHARED[j] * common[mine]
            found[name, half] = torch.tensor(1 + BIAS[j] + noise.mean(0))
    return found


def truth(case: str) -> np.ndarray:
    """Upper triangles of C and D."""
    counts = counts_of(case)
    names = counts.streams
    n = np.array([sum(counts.members[name]) for name in names])
    both = np.diag(n)
    for (one, other), halves in counts.shared.items():
        both[names.index(one), names.index(other)] = both[names.index(other), names.index(one)] = sum(halves)
    k = len(names)
    C = DIM * (np.outer(SHARED[:k], SHARED[:k]) * both / np.outer(n, n) + np.diag(OWN[:k] ** 2 / n))
    apart = C - C[:1] - C[:, :1] + C[0, 0]
    D = DIM * np.outer(BIAS[:k], BIAS[:k]) + apart
    return np.concatenate([C[np.triu_indices(k)], D[1:, 1:][np.triu_indices(k - 1)]])


def measured(case: str, measure=None) -> np.ndarray:
    """Triangles of DRAWS batches [DRAWS, k²]."""
    counts, g = counts_of(case), draw(np.random.default_rng(0), case)
    measure = measure or (lambda part, counts: grams_of(moments._sums(part, counts).tolist(), counts))
    found = [measure({key: value[i] for key, value in g.items()}, counts).triangles() for i in range(DRAWS)]
    return np.array([[*C, *D] for C, D in found])


def worst(found: np.ndarray, case: str) -> float:
    """How many standard errors the mean is off, at worst."""
    error = np.maximum(found.std(0) / DRAWS**0.5, 1e-12)
    return float(np.abs((found.mean(0) - truth(case)) / error).max())


@pytest.mark.parametrize("name", CASES)
def test_unbiased(name):
    assert worst(measured(CASES[name]), CASES[name]) < 4.2


class OneFactorForAll(StreamCounts):
    """Today's c of the first stream for every pair."""

    def factor(self, one, other):
        return super().factor(self.streams[0], self.streams[0])


class CovarianceOfLostRows(StreamCounts):
    """Rows that both streams have, as if every row had both."""

    def factor(self, one, other):
        a, b = self.members[one]
        return super().factor(one, other) if one == other else a * b / (a + b) ** 2


class PlainAverages(StreamCounts):
    """Halves averaged without their sizes."""

    def fractions(self, stream):
        return 0.5, 0.5


def with_counts(kind):
    def measure(g, counts):
        wrong = kind(counts.members, counts.shared)
        return grams_of(moments._sums(g, wrong).tolist(), wrong)

    return measure


def turned_around(g, counts):
    """A stream's gradient with the wrong sign."""
    g = {key: -value if key[0] == "short" else value for key, value in g.items()}
    return grams_of(moments._sums(g, counts).tolist(), counts)


def halves_mixed_up(g, counts):
    """One stream's halves taken for each other, so that the rows do not pair."""
    other = {"A": "B", "B": "A"}
    g = {(s, other[h]) if s == "short" else (s, h): value for (s, h), value in g.items()}
    return grams_of(moments._sums(g, counts).tolist(), counts)


@pytest.mark.parametrize(
    "fault",
    [
        with_counts(OneFactorForAll),
        with_counts(CovarianceOfLostRows),
        with_counts(PlainAverages),
        turned_around,
        halves_mixed_up,
    ],
    ids=["one c for all", "lost rows not counted", "plain averages", "a stream's sign", "halves mixed up"],
)
def test_a_planted_fault_is_noticed(fault):
    case = CASES["three streams, lost unevenly"]
    assert worst(measured(case, fault), case) > 8, "see test_unbiased"


def test_two_streams_are_what_they_were():
    """D, X, W and V_t as MATH.md §3 has them, with §5's factor."""
    g = {key: value[0] for key, value in draw(np.random.default_rng(1), CASES["empty pairs lost"]).items()}
    counts = counts_of(CASES["empty pairs lost"])
    found = grams_of(moments._sums(g, counts).tolist(), counts).moments()
    (n_a, n_b), (m_a, m_b) = counts.members.values()
    t, e = (g[s, "A"] - g[s, "B"] for s in ("trace", "empty"))
    gap = (n_a * g["trace", "A"] + n_b * g["trace", "B"]) / (n_a + n_b)
    gap = gap - (m_a * g["empty", "A"] + m_b * g["empty", "B"]) / (m_a + m_b)
    V_t, V_e = n_a * n_b / (n_a + n_b) ** 2 * (t @ t), m_a * m_b / (m_a + m_b) ** 2 * (e @ e)
    k_a, k_b = counts.shared["trace", "empty"]
    C = (k_a + k_b) / ((n_a + n_b) * (m_a + m_b)) / (k_a / (n_a * m_a) + k_b / (n_b * m_b)) * (t @ e)
    right = Moments(D=float(gap @ gap), X=float(V_t - C), W=max(float(V_t + V_e - 2 * C), 0.0), V_t=float(V_t))
    for name in ("D", "X", "W", "V_t"):
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=1e-12)


def test_a_half_without_a_stream_cannot_be_measured():
    assert counts_of("tes t / tes e").usable
    assert not counts_of("tes t / te e").usable


# ---------------------------------------------------------------------- many ranks against one

SIZES = (37, 64, 5)  # elements of a sharded, an expert and a replicated parameter of a rank
RANKS = 4


def everything(generator) -> tuple[dict, StreamCounts]:
    """Float32 gradients of every pass for each rank [rank][part], the replicated part the same on all."""
    counts = counts_of(CASES["three streams, lost unevenly"])
    same = {}
    passes = {}
    for key in itertools.product(counts.streams, "AB"):
        same[key] = torch.tensor(generator.normal(size=SIZES[2])).float()
        passes[key] = [
            [*(torch.tensor(generator.normal(size=n)).float() for n in SIZES[:2]), same[key]] for _ in range(RANKS)
        ]
    return passes, counts


def of_one_rank(passes, counts):
    """The whole model on one rank, in float64."""
    whole = {
        key: torch.cat([*(p for r in ranks for p in r[:2]), ranks[0][2]]).double() for key, ranks in passes.items()
    }
    return grams_of(moments._sums(whole, counts).tolist(), counts)


def of_many_ranks(passes, counts, copies: int = RANKS) -> list:
    """What each rank finds, by a real all-reduce between threads."""
    store, found = dist.HashStore(), [None] * RANKS

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, RANKS, timedelta(seconds=60))
        mine = {key: ranks[rank] for key, ranks in passes.items()}
        slices = []
        for i, (g, n) in enumerate(zip(mine["trace", "A"], SIZES, strict=True)):
            ranges = ((0, 20), (20, n)) if i == 1 else ((0, n),)
            slices.append(Slice(g, ranges, copies if i == 2 else 1))
        found[rank] = measure_grams(slices, mine, counts, "cpu", group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def off(found, right) -> float:
    """Largest distance of any entry, in units of the largest entry."""
    one, other = (np.concatenate([np.ravel(g.C), np.ravel(g.D)]) for g in (found, right))
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_many_ranks_are_one_rank(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK", 16)
    passes, counts = everything(np.random.default_rng(2))
    right, reductions = of_one_rank(passes, counts), []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, group: (reductions.append(t.numel()), all_reduce(t, group=group)))
    found = of_many_ranks(passes, counts)
    assert all(f == found[0] for f in found) and off(found[0], right) < 1e-12
    assert reductions == [9] * RANKS, "one all-reduce of k² numbers on each rank"


def test_a_fault_of_the_reduction_is_noticed(monkeypatch):
    passes, counts = everything(np.random.default_rng(2))
    right = of_one_rank(passes, counts)
    assert off(of_many_ranks(passes, counts, copies=1)[0], right) > 1e-2, "copies not divided"
    all_reduce = dist.all_reduce

    def part_twice(tensor, group):
        all_reduce(tensor, group=group)
        part = tensor[:3].clone()
        all_reduce(part, group=group)
        tensor[:3] = part

    monkeypatch.setattr(dist, "all_reduce", part_twice)
    assert off(of_many_ranks(passes, counts)[0], right) > 1e-2, "a part reduced twice"
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    assert off(of_many_ranks(passes, counts)[0], right) > 1e-2, "not reduced"
