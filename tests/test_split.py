"""Groups of images and their splits."""

import random
import time
from collections import Counter

import pytest
from conftest import REAL

from skinsynth.data import isic
from skinsynth.data.isic import Row
from skinsynth.data.split import groups, split_groups
from skinsynth.errors import UserError

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def row(name: str, target: int = 0, patient: str | None = None, lesion: str | None = None) -> Row:
    return Row(name, target, patient, lesion)


def test_groups_join_patients_lesions_copies_and_pairs() -> None:
    rows = [row("a", patient="P2"), row("b", patient="P1", lesion="L1"), row("c", lesion="L1"), row("d"), row("e"),
            row("f", lesion="L9"), row("g"), row("h", lesion="P1")]
    found = groups(rows, {"a": "1" * 64, "d": "1" * 64, "e": "2" * 64, "g": "3" * 64}, [("a", "elsewhere"), ("elsewhere", "b"), ("g", "e")])
    assert found == {"a": "P1", "b": "P1", "c": "P1", "d": "P1", "e": "sha-" + "2" * 16, "g": "sha-" + "2" * 16, "f": "L9", "h": "lesion-P1"}
    assert groups(rows[::-1], {}, []) == groups(rows, {}, [])


def cohort(patients: int, seed: int) -> list[Row]:
    """Patients with 1 to 40 images, one image in ten malignant."""
    rng = random.Random(seed)
    return [row(f"I{p}_{i}", int(rng.random() < 0.1), f"P{p}") for p in range(patients) for i in range(rng.choice((1, 1, 2, 3, 10, 40)))]


def deviation(rows: list[Row], split_of: dict[str, str]) -> float:
    """The largest difference between a class's share in a split and the one asked for."""
    total = Counter(r.target for r in rows)
    found = Counter((split_of[r.image_name], r.target) for r in rows)
    return max(abs(found[s, t] / total[t] - share) for s, share in SHARES.items() for t in total)


def test_splits_keep_groups_whole_and_shares_right_and_follow_the_seed_alone() -> None:
    rows = cohort(150, 0)
    targets, of = {r.image_name: r.target for r in rows}, groups(rows, {}, [])
    split_of = split_groups(of, targets, SHARES, 3)
    assert all(len({split_of[n] for n in of if of[n] == g}) == 1 for g in set(of.values()))
    assert deviation(rows, split_of) < 0.02
    mixed = random.Random(1).sample(rows, len(rows))
    again = split_groups(groups(mixed, {}, []), {r.image_name: r.target for r in mixed}, SHARES, 3)
    assert again == split_of
    assert split_groups(of, targets, SHARES, 4) != split_of


@pytest.mark.parametrize("seed", range(8))
def test_every_split_gets_every_class_even_with_three_groups_of_it(seed: int) -> None:
    rows = [row(f"b{i}", 0, f"P{i % 5}") for i in range(40)] + [row(f"m{i}", 1, f"M{i % 3}") for i in range(20)]
    split_of = split_groups(groups(rows, {}, []), {r.image_name: r.target for r in rows}, SHARES, seed)
    assert {(split_of[r.image_name], r.target) for r in rows} == {(s, t) for s in SHARES for t in (0, 1)}


def test_an_empty_class_is_an_error_that_counts_the_groups() -> None:
    rows = [row(f"b{i}") for i in range(9)] + [row("m1", 1, "P1"), row("m2", 1, "P1"), row("m3", 1, "P2")]
    with pytest.raises(UserError, match=r"class 1 \(malignant\) has 2 groups .* 3 splits"):
        split_groups(groups(rows, {}, []), {r.image_name: r.target for r in rows}, SHARES, 0)


@pytest.mark.skipif(not (REAL / "isic2020_groundtruth.csv").exists(), reason=f"{REAL} with the ISIC 2020 ground truth is not here")
def test_isic_2020_is_split_by_patient_within_two_percent_in_seconds() -> None:
    start = time.process_time()
    rows, aside = isic.read_metadata(REAL / "isic2020_groundtruth.csv")
    pairs = isic.read_pairs(REAL / "isic2020_duplicates.csv", (r.image_name for r in rows))
    split_of = split_groups(groups(rows, {}, pairs), {r.image_name: r.target for r in rows}, SHARES, 0)
    assert time.process_time() - start < 5
    assert (len(rows), len(aside), len(pairs)) == (33_126, 0, 425)
    assert deviation(rows, split_of) < 0.02
    assert max(Counter(p for p, _ in {(r.patient_id, split_of[r.image_name]) for r in rows}).values()) == 1
    assert all(split_of[one] == split_of[other] for one, other in pairs)
