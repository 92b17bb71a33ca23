from __future__ import annotations

from collections import Counter

import numpy as np

from skinsynth.data.order import Mixture, nth, sample_rng


def test_every_epoch_holds_each_sample_once_and_epochs_differ() -> None:
    first, second = ([nth(50, 7, e * 50 + i) for i in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_mixture_gives_exact_shares_and_no_sample_twice_within_a_pass() -> None:
    mixture = Mixture((30, 7), (3.0, 1.0), seed=1)
    drawn = [mixture.at(k) for k in range(120)]
    assert Counter(source for source, _ in drawn) == {0: 90, 1: 30}
    for start in range(0, 120, 4):
        assert Counter(source for source, _ in drawn[start:start + 4]) == {0: 3, 1: 1}
    from_first = [index for source, index in drawn if source == 0]
    for start in (0, 30, 60):
        assert sorted(from_first[start:start + 30]) == list(range(30))


def test_position_is_found_without_what_came_before() -> None:
    far = 10**9 + 13
    assert Mixture((30, 7), (0.5, 0.25), seed=1).at(far) == Mixture((30, 7), (0.5, 0.25), seed=1).at(far)
    assert Mixture((30, 7), (0.5, 0.25), seed=1).cycle == (0, 1, 0)


def test_sample_randomness_depends_on_seed_and_position() -> None:
    values = {(s, k): sample_rng(s, k).standard_normal(4).tobytes() for s in (0, 1) for k in (0, 1, 2**40)}
    assert len(set(values.values())) == 6
    assert np.array_equal(sample_rng(1, 5).standard_normal(4), sample_rng(1, 5).standard_normal(4))
