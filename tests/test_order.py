from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from skinsynth.data.order import Mixture, epoch_order, sample_rng, share, stream_bounds
from skinsynth.knobs import proportion

SHARDS = (100, 7, 100, 1, 93, 100, 59, 100, 100, 40)  # 700 samples


def order(epoch: int = 0, streams: int = 4, window: int = 30, shards: tuple[int, ...] = SHARDS) -> list[int]:
    return epoch_order(shards, 7, epoch, streams, window).tolist()


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (4, 30), (16, 9), (3, 700), (699, 1), (10_000, 1)])
def test_every_epoch_holds_each_sample_once_and_epochs_differ(streams: int, window: int) -> None:
    first, second = order(0, streams, window), order(1, streams, window)
    assert sorted(first) == sorted(second) == list(range(700))
    assert first != second
    assert order(0, streams, window) == first


def test_a_small_set_is_shuffled_as_a_whole_and_an_empty_one_is_empty() -> None:
    assert len(stream_bounds(60, 16, 31)) == 2
    first_halves = [set(order(e, 16, 64, (30, 30))[:30]) for e in range(40)]
    together = np.mean([0 in half and 59 in half for half in first_halves])
    assert 0.05 < together < 0.5, "samples of both shards meet in either half"
    assert order(shards=()) == []


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_stream_goes_through_its_shards_from_front_to_back(epoch: int) -> None:
    streams, window = 4, 30
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    bounds = stream_bounds(700, streams, window)
    found = order(epoch)
    seen_in: dict[int, set[int]] = {}
    for stream in range(streams):
        mine = found[stream::streams]  # 700 is a multiple of 4: every row is whole
        assert len(mine) == bounds[stream + 1] - bounds[stream]
        blocks = [mine[at:at + window] for at in range(0, len(mine), window)]
        for block in blocks:
            assert sorted(block) != block or len(block) < 5, "shuffled within the window"
        line = [sample for block in blocks for sample in _as_written(block, shard_of, SHARDS, epoch)]
        changes = sum(shard_of[a] != shard_of[b] for a, b in pairwise(line))
        assert changes == len({shard_of[s] for s in line}) - 1, "a shard is begun once and read to its end"
        for a, b in pairwise(line):
            assert shard_of[a] != shard_of[b] or b == a + 1, "in the order in which its samples lie"
        for sample in line:
            seen_in.setdefault(int(shard_of[sample]), set()).add(stream)
    torn = sum(len(streams_of) - 1 for streams_of in seen_in.values())
    assert torn <= streams - 1, "only a shard on which two streams meet is read by both"


def _as_written(block: list[int], shard_of: np.ndarray, shards: tuple[int, ...], epoch: int) -> list[int]:
    """A window's samples in the order of the line: shards as the epoch permuted them, samples as they lie in them."""
    every = order(epoch, 1, 1, shards)  # one stream, windows of one sample: the line itself
    place = {int(shard_of[sample]): i for i, sample in reversed(list(enumerate(every)))}
    return sorted(block, key=lambda sample: (place[int(shard_of[sample])], sample))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 16), (1, 4), (2, 8), (2, 2), (4, 4), (4, 1), (8, 2), (8, 1)])
def test_the_global_batches_are_the_same_on_any_number_of_ranks(ranks: int, micro: int) -> None:
    mixture = Mixture((700, 41), (3.0, 1.0), 1, (SHARDS, (41,)), 8, 20)
    for step in (0, 1, 17, 10**6):
        whole = {position: mixture.at(position) for position in range(step * 16, step * 16 + 16)}
        per_rank = [share(step, 16, micro, rank, ranks) for rank in range(ranks)]
        assert {len(ranges) for ranges in per_rank} == {16 // ranks // micro}
        assert {len(positions) for ranges in per_rank for positions in ranges} == {micro}
        drawn = [position for ranges in per_rank for positions in ranges for position in positions]
        assert sorted(drawn) == sorted(whole), "none lost, none twice"
        own = Mixture((700, 41), (3.0, 1.0), 1, (SHARDS, (41,)), 8, 20)  # a process of its own knows nothing of the others
        assert {position: own.at(position) for position in drawn} == whole


def test_a_change_of_ranks_in_mid_epoch_loses_and_repeats_nothing() -> None:
    mixture = Mixture((700,), (1.0,), 3, (SHARDS,), 4, 30)
    drawn: list[int] = []
    for step in range(50):  # 50 steps of 14: one epoch
        ranks = 1 if step < 13 else 7 if step < 31 else 2
        for rank in range(ranks):
            drawn += [mixture.at(p)[1] for positions in share(step, 14, 14 // ranks, rank, ranks) for p in positions]
    assert sorted(drawn) == list(range(700))


def test_ranks_keep_to_their_own_streams() -> None:
    """With one source, and streams that the ranks divide, each rank reads about its share of the shards."""
    shards, streams = (10,) * 64, 8
    mixture = Mixture((640,), (1.0,), 0, (shards,), streams, 10)
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            mine = {mixture.at(p)[1] // 10 for step in range(40) for positions in share(step, 16, 16 // ranks, rank, ranks) for p in positions}
            assert len(mine) == 64 // ranks


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
    assert Mixture((30, 7), (0.5, 0.25), seed=1).cycle.pattern == (0, 1, 0)


def test_shares_are_of_the_sum_where_the_weights_alone_are_too_small_to_tell() -> None:
    assert Mixture((30,), (0.0004,), seed=1).at(7) == Mixture((30,), (1.0,), seed=1).at(7)
    assert proportion((0.0004, 0.0008)) == [1, 2]
    assert proportion((1, 0.0004)) == [1, 0], "which the check of the configuration refuses"
    assert [proportion(weights) for weights in ((3, 1), (3000, 1), (1 / 3, 2 / 3), (0.123, 0.456), (1, 0.0006), (3000, 1, 0))] == [
        [3, 1], [3000, 1], [1, 2], [41, 152], [1000, 1], [3000, 1, 0]], "as ever: the order of a mixture stays"


def test_a_long_cycle_costs_no_more_per_sample() -> None:
    mixture = Mixture((33126, 30001), (33126.0, 30001.0), seed=1)
    pattern = mixture.cycle.pattern
    assert len(pattern) == 63127
    assert mixture.at(63126)[0] == pattern[-1]
    assert mixture.cycle.given == (33126, 30001)
    assert all(mixture.cycle.before[k] == pattern[:k].count(pattern[k]) for k in (0, 1, 77, 31000, 63126))
    begin = time.perf_counter()
    for k in range(40000, 60000):
        mixture.at(k)
    assert time.perf_counter() - begin < 2, "20,000 samples; counting anew for each took a millisecond"


def test_orders_of_past_epochs_are_let_go() -> None:
    mixture = Mixture((5,), (1.0,), seed=1)
    drawn = [mixture.at(k)[1] for k in range(500)]
    assert len(mixture._orders) <= 3
    assert [mixture.at(k)[1] for k in range(500)] == drawn


def test_sample_randomness_depends_on_seed_and_position() -> None:
    values = {(s, k): sample_rng(s, k).standard_normal(4).tobytes() for s in (0, 1) for k in (0, 1, 2**40)}
    assert len(set(values.values())) == 6
    assert np.array_equal(sample_rng(1, 5).standard_normal(4), sample_rng(1, 5).standard_normal(4))
