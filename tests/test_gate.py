"""gate: the first reason counts, of near-duplicates one stays, and a set that fails says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skinsynth.knobs import Screen
from skinsynth.quality import copies, defects, gate, near

KEYS = [f"syn-{i}" for i in range(8)]


def measured(pairs: list[tuple[int, int]], **more: Any) -> gate.Measured:
    """Eight images: 1 broken (and black), 2 blank, 3 a copy and blurred, 4 blurred."""
    measures = np.tile(np.array([30, 5, 0, 0, 60], np.float32), (8, 1))
    measures[1], measures[2, 0], measures[3:5, 1] = 0, 1, 1
    nearness = np.where(np.arange(8) == 3, 0.9, 0.1)
    found = copies.Matches(np.arange(8), nearness, nearness)
    return gate.Measured({1: "cannot be decoded"}, measures, found, np.linspace(0.1, 0.8, 8, dtype=np.float32),
                         np.array(pairs, np.int64).reshape(-1, 2), {3: "test-3", 7: "test-7"} if more.get("held_out") else {},
                         lambda: np.zeros((8, near.SIDE, near.SIDE), np.int8), 0.98)


LIMITS = defects.Limits({"blank": 5.0, "blur": 2.0, "frame": 0.5})


def test_the_first_reason_counts() -> None:
    found = measured([]).reasons(LIMITS, 0.7, None)
    assert found == [None, "broken", "blank", "copy", "blur", None, None, None]
    assert measured([]).reasons(LIMITS, 0.7, 0.65)[5:] == ["class", None, None]


def test_of_near_duplicates_the_first_good_one_stays() -> None:
    one = measured([(4, 0), (5, 4), (6, 5), (7, 4), (7, 6)])
    found = one.reasons(LIMITS, 0.7, None)
    assert found[4:] == ["blur", None, "duplicate", None], "5 is like a blurred one only; 7 is like a blurred one and a duplicate, not like 5"
    assert one.told("duplicate", 6, KEYS, KEYS, found) == {"value": "syn-5"}
    chain = measured([(5, 0), (6, 0), (6, 5), (7, 5)])
    found = chain.reasons(LIMITS, 0.7, None)
    assert found[5:] == ["duplicate", "duplicate", None]
    assert chain.told("duplicate", 6, KEYS, KEYS, found) == {"value": "syn-0"}


def alike(count: int, blurred: list[int], different: tuple[int, ...] = ()) -> gate.Measured:
    """So many images, all the same but for the ``different`` ones."""
    rng = np.random.default_rng(0)
    prints = np.repeat(rng.integers(-127, 128, (1, near.SIDE, near.SIDE)), count, 0).astype(np.int8)
    prints[list(different)] = rng.integers(-127, 128, (len(different), near.SIDE, near.SIDE))
    measures = np.tile(np.array([30, 5, 0, 0, 60], np.float32), (count, 1))
    measures[blurred, 1] = 1
    nothing = np.zeros(count)
    return gate.Measured({}, measures, copies.Matches(np.arange(count), nothing, nothing), nothing.astype(np.float32),
                         near.near_pairs(prints, prints, 0.98, same=True), {}, lambda: prints, 0.98)


def test_of_many_near_duplicates_one_stays_though_the_first_ones_are_set_aside() -> None:
    eight = alike(8, [0, 1, 2, 3])
    found = eight.reasons(LIMITS, 0.7, None)
    assert found == ["blur"] * 4 + [None] + ["duplicate"] * 3
    assert eight.told("duplicate", 7, KEYS, KEYS, found) == {"value": "syn-4"}
    scattered = alike(3000, [0, 1, 2, 3, *range(7, 3000, 7)], tuple(range(5, 3000, 3)))
    found = scattered.reasons(LIMITS, 0.7, None)
    kept = {i for i in range(3000) if found[i] is None}
    assert kept == {4} | {i for i in range(5, 3000, 3) if i % 7}
    assert set(scattered.like.values()) == {4}


def test_each_reason_tells_its_figures() -> None:
    one = measured([])
    assert one.told("broken", 1, KEYS, KEYS, []) == {"value": "cannot be decoded"}
    assert one.told("blank", 2, KEYS, KEYS, []) == {"value": 1.0}
    assert one.told("copy", 3, KEYS, KEYS, []) == {"value": 0.9, "similarity": 0.9, "train_key": "syn-3"}
    assert one.told("class", 0, KEYS, KEYS, []) == {"value": 0.1}
    leaked = measured([], held_out=True)
    assert leaked.reasons(LIMITS, 0.7, None)[3:] == ["copy", "blur", None, None, "held-out"]
    assert leaked.told("held-out", 7, KEYS, KEYS, []) == {"value": "test-7"}


def test_an_image_of_a_class_that_no_classifier_knows_is_not_set_aside() -> None:
    one = measured([])
    one.agreement[:] = np.nan
    assert one.reasons(LIMITS, 0.7, 0.9)[5:] == [None, None, None]


def test_the_share_of_training_images_that_are_copied_counts_each_once() -> None:
    found = copies.Matches(np.array([3, 3, 7, 9]), np.zeros(4), np.array([0.9, 0.8, 0.75, 0.2]))
    assert gate.copied_share(found, 0.7, 50) == 2 / 50


def metrics(malignant: int = 30, **more: Any) -> dict[str, Any]:
    """Of 100 images, 50 a class, 60 are accepted, ``malignant`` of them so."""
    classes = {name: {"generated": 50, "accepted": good, "rejected": {"copy": max(0, 40 - good), "blur": 0, "blank": min(10, 50 - good)}}
               for name, good in (("benign", 60 - malignant), ("malignant", malignant))}
    return {"generated": 100, "accepted": 60, "rejected": {"copy": 30, "blank": 10, "blur": 0}, "classes": classes, "kid_ratio": 4.5,
            "features": "dinov2", **more}


@pytest.mark.parametrize(("knobs", "why"), [
    (Screen(), []), (Screen(min_accepted=0.6, max_copies=0.3, max_kid_ratio=4.5), []),
    (Screen(min_accepted=0.61), ["only 60 of 100 synthetic images were accepted (30 copy, 10 blank), less than screen.min_accepted=0.61",
                                 *(f"only 30 of 50 {name} images were accepted (10 copy, 10 blank), less than screen.min_accepted=0.61 of this class"
                                   for name in ("benign", "malignant"))]),
    (Screen(max_copies=0.29), ["30 of 100 synthetic images are copies of training images, more than screen.max_copies=0.29"]),
    (Screen(max_kid_ratio=4.0), ["KID (dinov2) of the synthetic images is 4.5 times that of real images, more than screen.max_kid_ratio=4.0"])])
def test_a_set_that_fails_says_why(knobs: Screen, why: list[str]) -> None:
    assert [failure.why for failure in gate.failures(metrics(), knobs)] == why


def test_a_class_of_which_too_few_are_accepted_keeps_the_set_from_passing() -> None:
    assert gate.failures(metrics(malignant=10), Screen()) == []
    assert gate.failures(metrics(malignant=9), Screen()) == [gate.Failure(
        "only 9 of 50 malignant images were accepted (31 copy, 10 blank), less than screen.min_accepted=0.2 of this class", "copy")]
    assert gate.failures(metrics(malignant=0), Screen(min_accepted=0)) == [
        gate.Failure("none of 50 malignant images was accepted (40 copy, 10 blank)", "copy")]
    none = {"generated": 0, "accepted": 0, "rejected": {"copy": 0}}
    assert gate.failures(metrics(classes={"benign": metrics()["classes"]["benign"], "malignant": none}), Screen()) == [
        gate.Failure("there is no malignant image, though some were asked for", "broken")]


def test_the_ratio_takes_the_spread_where_real_to_real_is_about_zero() -> None:
    assert gate.kid_ratio(0.5, -0.01, 0.05) == 10
    assert gate.kid_ratio(0.5, 0.25, 0.05) == 2
    assert gate.kid_ratio(None, 0.25, 0.05) is gate.kid_ratio(0.5, 0.25, None) is None
    [told] = gate.failures(metrics(kid_ratio=None), Screen(max_kid_ratio=0.1))
    assert "is unknown, so screen.max_kid_ratio=0.1 cannot be told" in told.why
