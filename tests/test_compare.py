"""compare: a planted effect is found with an interval that holds it, none is claimed where there is none, and the tests against known formulas."""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from skinsynth.quality.compare import age_band, compare, difference, differences, estimates, holm, patients, subgroups
from skinsynth.quality.delong import delong, placements
from skinsynth.quality.predictions import Predictions
from skinsynth.quality.verdict import claimed, verdict

TAU = 0.06  # spread of the seeds' separation


def simulate(number: int, separations: dict[str, float], people: int = 250, seeds: int = 3, malignant: float = 0.35) -> Predictions:
    """Binormal scores of some patients with one to four images each. Part of an image's score is the patient's, part the image's, the same for
    all arms; part is the training run's own. Each has a standard deviation of 1 in all, so that AUROC is known."""
    rng = np.random.default_rng([2024, number])
    group = np.repeat(np.arange(people), rng.integers(1, 5, people))
    n = len(group)
    target = (rng.random(n) < malignant).astype(int)
    shared = sqrt(0.2) * rng.normal(size=people)[group] + sqrt(0.45) * rng.normal(size=n)
    scores = {arm: np.stack([norm.cdf((d + TAU * rng.normal()) * target + shared + sqrt(0.35) * rng.normal(size=n)) for _ in range(seeds)])
              for arm, d in separations.items()}
    return Predictions(np.arange(n).astype(str), group.astype(str), target, scores, {arm: list(range(seeds)) for arm in scores})


def truth(separation: float) -> float:
    """The mean AUROC of such training runs: the normal distribution at d / sqrt(2), averaged over the seeds' spread."""
    return float(norm.cdf(separation / sqrt(2 + TAU**2)))


def auroc_row(found: Predictions) -> dict:
    of = estimates(found, 1000, ("auroc",))
    first, second = of
    row = {"arms": [second, first], "metric": "auroc", **difference(of[first]["auroc"], of[second]["auroc"])}
    holm([row])
    return row


def test_a_planted_effect_is_found_and_its_size_lies_in_the_interval() -> None:
    planted = truth(1.35) - truth(0.85)
    rows = [auroc_row(simulate(number, {"baseline": 0.85, "hybrid": 1.35})) for number in range(20)]
    assert sum(row["ci"][0] <= planted <= row["ci"][1] for row in rows) >= 18
    assert sum(claimed(row) and row["value"] > 0 for row in rows) >= 18


def test_where_no_effect_was_planted_none_is_claimed() -> None:
    rows = [auroc_row(simulate(100 + number, {"baseline": 1.0, "hybrid": 1.0})) for number in range(20)]
    assert sum(claimed(row) for row in rows) <= 2


def test_an_arms_own_interval_holds_its_auroc() -> None:
    held = 0
    for number in range(20):
        low, high = estimates(simulate(200 + number, {"only": 1.2}), 1000, ("auroc",))["only"]["auroc"].summary()["ci"]
        held += low <= truth(1.2) <= high
    assert held >= 18


def delong_by_definition(target: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """The variance of the difference as DeLong wrote it: covariance matrices of the components, pair by pair."""
    components = []
    for of_class, other in ((1, 0), (0, 1)):
        rows = [[np.mean([(s[i] > s[j]) + 0.5 * (s[i] == s[j]) if of_class else (s[j] > s[i]) + 0.5 * (s[i] == s[j])
                          for j in np.flatnonzero(target == other)]) for i in np.flatnonzero(target == of_class)] for s in (first, second)]
        components.append(np.cov(rows) / len(rows[0]))
    whole = components[0] + components[1]
    return whole[0, 0] + whole[1, 1] - 2 * whole[0, 1]


def test_delong_with_single_images_is_delongs_own() -> None:
    rng = np.random.default_rng(5)
    target = rng.integers(0, 2, 60)
    first, second = rng.integers(0, 12, 60) / 12, np.clip(rng.integers(0, 12, 60) / 12 + 0.2 * target, 0, 1)
    found = delong(target, np.arange(60), first[None], second[None])
    assert found is not None
    assert found["value"] == pytest.approx(roc_auc_score(target, second) - roc_auc_score(target, first))
    assert found["se"] ** 2 == pytest.approx(delong_by_definition(target, first, second), rel=1e-9)
    assert found["p"] == pytest.approx(erfc(abs(found["value"] / found["se"]) / sqrt(2)))


def test_delong_counts_copies_of_an_image_once() -> None:
    """Each image five times over, in one group: the groups' sums know no more than the single images."""
    one = simulate(7, {"a": 0.8, "b": 1.2}, people=80, seeds=1)
    group, times = np.arange(len(one.target)), 5
    once = delong(one.target, group, one.scores["a"], one.scores["b"])
    copied = delong(np.tile(one.target, times), np.tile(group, times), np.tile(one.scores["a"], times), np.tile(one.scores["b"], times))
    apart = delong(np.tile(one.target, times), np.arange(len(group) * times), np.tile(one.scores["a"], times), np.tile(one.scores["b"], times))
    assert once and copied and apart  # noqa: PT018
    assert copied["se"] == pytest.approx(once["se"], rel=1e-6)
    assert apart["se"] == pytest.approx(once["se"] / sqrt(times), rel=0.02)


def test_delong_of_what_cannot_be_told() -> None:
    scores = np.array([[0.1, 0.2, 0.8, 0.9]])
    assert delong(np.zeros(4, int), np.arange(4), scores, scores) is None
    assert delong(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2]), scores, scores) is None  # one patient has all the malignant images
    same = delong(np.array([0, 0, 1, 1]), np.arange(4), scores, scores)
    assert same == {"value": 0.0, "se": 0.0, "z": None, "p": None}


def test_the_mean_of_placement_values_is_the_auroc() -> None:
    rng = np.random.default_rng(1)
    target, score = rng.integers(0, 2, 50), rng.integers(0, 6, 50) / 5
    values = placements(target, score)
    assert values[target == 1].mean() == pytest.approx(roc_auc_score(target, score))
    assert values[target == 0].mean() == pytest.approx(roc_auc_score(target, score))


def test_a_resample_draws_as_many_patients_as_there_are() -> None:
    groups = np.array(["b", "a", "b", "c"])
    drawn = np.concatenate(list(patients(groups, 700)), axis=1)
    assert drawn.shape == (3, 700)
    assert (drawn.sum(0) == 3).all()
    assert drawn.mean() == pytest.approx(1)
    again = np.concatenate(list(patients(groups, 700)), axis=1)
    other = np.concatenate(list(patients(groups, 700, stream=1)), axis=1)
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, other)


def test_images_of_one_group_count_as_one() -> None:
    """Twenty images a patient, on all of which the arms agree or differ alike, say no more than one would."""
    target = np.repeat([0, 1, 0, 1], 20)
    spread = {}
    for name, groups in (("each", np.arange(80)), ("patient", np.repeat(np.arange(4), 20))):
        found = Predictions(np.arange(80).astype(str), groups.astype(str), target, {"a": np.full((1, 80), 0.2)}, {"a": [0]})
        spread[name] = np.std(estimates(found, 500, ("accuracy",))["a"]["accuracy"].draws)
    assert spread["patient"] > 2 * spread["each"]


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = simulate(3, {"a": 1.0}, seeds=1)
    alike.scores["a"] = np.repeat(alike.scores["a"], 4, axis=0)
    apart = Predictions(alike.keys, alike.groups, alike.target, {"a": alike.scores["a"].copy()}, {"a": [0, 1, 2, 3]})
    for seed in (0, 1):  # two runs that went wrong
        apart.scores["a"][seed] = 1 - apart.scores["a"][seed]

    def width(found: Predictions) -> float:
        low, high = estimates(found, 500, ("auroc",))["a"]["auroc"].summary()["ci"]
        return high - low

    assert width(apart) > 3 * width(alike)


def test_of_equal_arms_the_difference_is_nothing() -> None:
    found = simulate(4, {"a": 1.0, "b": 1.0}, seeds=1)
    found.scores["b"] = found.scores["a"].copy()
    for row in differences(found, estimates(found, 300)):
        assert (row["value"], row["ci"], row["p"]) == (0.0, [0.0, 0.0], 1.0), row["metric"]


def test_holm_corrects_for_the_number_of_pairs() -> None:
    rows = [{"p": 0.04}, {"p": 0.01}, {"p": None}, {"p": 0.03}]
    holm(rows)
    assert [row["p_holm"] for row in rows] == [0.06, 0.03, None, 0.06]


@pytest.mark.parametrize(("age", "band"), [("0", "0 to 39"), ("39.5", "0 to 39"), ("40", "40 to 59"), ("80", "80 and over"), ("", "unknown"),
                                           ("old", "unknown"), ("-5", "unknown"), ("nan", "unknown")])
def test_age_bands(age: str, band: str) -> None:
    assert age_band(age) == band


def test_subgroups_are_counted_and_small_ones_marked() -> None:
    found = simulate(5, {"a": 1.5}, people=200, seeds=2)
    n = len(found.target)
    found.columns = {"sex": np.where(np.arange(n) % 2, "female", "male"), "site": np.where(np.arange(n) < 6, "", "torso")}
    rows = {(row["by"], row["name"]): row for row in subgroups(found)}
    assert list(rows) == [("sex", "female"), ("sex", "male"), ("site", "torso"), ("site", "unknown")]
    assert rows["site", "unknown"]["n"] == 6
    assert rows["site", "unknown"]["small"]
    female = np.arange(n) % 2 == 1
    row = rows["sex", "female"]
    assert (row["n"], row["positive"], row["small"]) == (female.sum(), found.target[female].sum(), False)
    assert row["arms"]["a"]["auroc"]["value"] == pytest.approx(np.mean([roc_auc_score(found.target[female], s[female]) for s in found.scores["a"]]),
                                                               abs=1e-6)


def test_twice_the_same_and_in_the_promised_form() -> None:
    found = compare(simulate(6, {"a": 1.0, "b": 1.2, "c": 0.8}))
    assert found == compare(simulate(6, {"a": 1.0, "b": 1.2, "c": 0.8}))
    assert {tuple(row["arms"]) for row in found["differences"]} == {("b", "a"), ("c", "a"), ("c", "b")}
    one = found["arms"]["b"]["auroc"]
    assert one["value"] == pytest.approx(np.mean(one["seeds"]), abs=1e-6)
    assert one["ci"][0] < one["value"] < one["ci"][1]
    assert len(found["arms"]["b"]["roc"]["seeds"]) == 3
    assert sum(row["n"] for row in found["arms"]["b"]["calibration"]) == 3 * found["test"]["images"]


def test_the_verdict_says_what_it_may_and_what_it_may_not() -> None:
    better = verdict(compare(simulate(8, {"baseline": 0.6, "hybrid": 1.6})))
    assert better["headline"] == "In this run, hybrid told malignant from benign better than baseline."
    assert "3 training runs per arm show only roughly" in " ".join(better["may_not"])
    same = verdict(compare(simulate(9, {"baseline": 1.0, "hybrid": 1.0}, people=60, seeds=1)))
    assert same["headline"] == "There is no clear difference between baseline and hybrid."
    text = " ".join(same["may_not"])
    for needed in ("One training run per arm cannot prove an effect", "Nor is it shown that hybrid and baseline are equal", "AUROC alone was tested",
                   "are malignant: with so few", "do not name sex, age or site"):
        assert needed in text, needed
    unpaired = compare(simulate(8, {"baseline": 0.6, "hybrid": 1.6}))
    unpaired["differences"] = [row | {"paired": False} for row in unpaired["differences"]]
    assert verdict(unpaired)["headline"] == "There is nothing to compare yet."
    assert "Nothing is concluded of hybrid: other test images" in " ".join(verdict(unpaired)["may_not"])
    nothing = verdict(compare(simulate(10, {"only": 1.0})))
    assert nothing["headline"] == "There is nothing to compare yet."


def test_one_class_alone_gives_no_difference_and_no_number() -> None:
    found = simulate(11, {"a": 1.0, "b": 1.0}, people=20)
    found.target[:] = 0
    result = compare(found)
    assert result["arms"]["a"]["auroc"] == {"value": None, "ci": None, "seeds": [None] * 3}
    assert result["arms"]["a"]["roc"] is None
    row = next(row for row in result["differences"] if row["metric"] == "auroc")
    assert (row["value"], row["ci"], row["p"], row["delong"], row["p_holm"]) == (None,) * 5
    assert verdict(result)["headline"] == "There is nothing to compare yet."


if __name__ == "__main__":  # the same with many repeats: how often the interval holds the truth, and how often nothing is called something
    for effect in (0.0, 0.2, 0.5):
        found = [auroc_row(simulate(1000 + n, {"a": 0.85, "b": 0.85 + effect})) for n in range(400)]
        right = truth(0.85 + effect) - truth(0.85)
        print(effect, np.mean([r["ci"][0] <= right <= r["ci"][1] for r in found]), np.mean([claimed(r) for r in found]))
