"""compare: in simulated predictions an effect is found with an interval that holds it, none is claimed where there is none, whether patients or
seeds make most of the chance; and the tests against known formulas."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t, ttest_ind
from sklearn.metrics import roc_auc_score

from skinsynth.quality.compare import (
    Estimate,
    age_band,
    compare,
    correct,
    difference,
    differences,
    estimates,
    holm,
    main,
    patients,
    size,
    spread,
    subgroups,
)
from skinsynth.quality.delong import delong, placements
from skinsynth.quality.metrics import Scored, binary_metrics
from skinsynth.quality.predictions import Predictions
from skinsynth.quality.verdict import claimed, verdict

TAU, WIDE = 0.06, 0.15  # spread of the seeds' separation; that of their AUROC is about 0.016 and 0.03


def simulate(number: int, separations: dict[str, float], people: int = 250, seeds: int = 3, malignant: float = 0.35,
             tau: float = TAU) -> Predictions:
    """Predictions without images or training: binormal scores of some patients with one to four images each. Part of an image's score is the
    patient's, part the image's, the same for all arms; part is the training run's own. Each has a standard deviation of 1 in all, so that AUROC is
    known."""
    rng = np.random.default_rng([2024, number])
    group = np.repeat(np.arange(people), rng.integers(1, 5, people))
    n = len(group)
    target = (rng.random(n) < malignant).astype(int)
    shared = sqrt(0.2) * rng.normal(size=people)[group] + sqrt(0.45) * rng.normal(size=n)
    scores = {arm: np.stack([norm.cdf((d + tau * rng.normal()) * target + shared + sqrt(0.35) * rng.normal(size=n)) for _ in range(seeds)])
              for arm, d in separations.items()}
    return Predictions(np.arange(n).astype(str), group.astype(str), target, scores, {arm: list(range(seeds)) for arm in scores})


def truth(separation: float, tau: float = TAU) -> float:
    """The mean AUROC of such training runs: the normal distribution at d / sqrt(2), averaged over the seeds' spread."""
    return float(norm.cdf(separation / sqrt(2 + tau**2)))


def auroc_row(found: Predictions, resamples: int = 1000) -> dict:
    of = estimates(found, resamples, ("auroc",))
    first, second = of
    row = {"arms": [second, first], "metric": "auroc", **difference(of[first]["auroc"], of[second]["auroc"])}
    holm([row])
    return row


def test_a_simulated_effect_is_found_and_its_size_lies_in_the_interval() -> None:
    wanted = truth(1.35) - truth(0.85)
    rows = [auroc_row(simulate(number, {"baseline": 0.85, "hybrid": 1.35})) for number in range(20)]
    assert sum(row["ci"][0] <= wanted <= row["ci"][1] for row in rows) >= 18
    assert sum(claimed(row) and row["value"] > 0 for row in rows) >= 18


def test_where_there_is_no_effect_none_is_claimed() -> None:
    rows = [auroc_row(simulate(100 + number, {"baseline": 1.0, "hybrid": 1.0})) for number in range(20)]
    assert sum(claimed(row) for row in rows) <= 2


def test_where_trainings_differ_much_and_are_few_no_effect_is_claimed_either() -> None:
    rows = [auroc_row(simulate(300 + number, {"a": 1.0, "b": 1.0}, 200, seeds=3, tau=2 * WIDE), 200) for number in range(40)]
    assert sum(claimed(row) for row in rows) <= 4


def arms_of(rng: np.random.Generator, seeds: tuple[int, int], of_seeds: tuple[float, float], of_patients: float, effect: float) -> list[Estimate]:
    """Two arms' AUROC, whose seeds vary as told, and whose difference varies by the patients, each with a standard deviation of one hundredth."""
    arms = [0.8 + of_seeds[i] / 100 * rng.normal(size=seeds[i]) for i in (0, 1)]
    arms[1] += effect / 100 + of_patients / 100 * rng.normal()
    moved = of_patients / 100 * rng.normal(size=200)
    return [Estimate("auroc", arms[0], np.full(200, arms[0].mean()), 0.0, 200), Estimate("auroc", arms[1], arms[1].mean() + moved, 0.0, 200)]


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (10, 10), (3, 10)])
@pytest.mark.parametrize(("of_seeds", "of_patients"), [((1.0, 1.0), 0.0), ((1.0, 1.0), 0.5), ((1.0, 1.0), 3.0), ((0.5, 1.5), 0.3)])
def test_of_arms_that_are_alike_one_in_twenty_is_called_different(seeds: tuple[int, int], of_seeds: tuple[float, float], of_patients: float) -> None:
    """Whoever dominates, seeds or patients. Welch's test of two seeds is too careful where patients do nothing, and a little bold beside them."""
    rng = np.random.default_rng(0)
    rows = [difference(*arms_of(rng, seeds, of_seeds, of_patients, 0.0)) for _ in range(1000)]
    assert 0.01 < np.mean([row["p"] < 0.05 for row in rows]) < (0.1 if min(seeds) == 2 else 0.075)
    assert np.mean([difference(*arms_of(rng, (10, 10), of_seeds, of_patients, 5.0 + 3 * of_patients))["p"] < 0.05 for _ in range(100)]) > 0.9


def test_without_patients_part_it_is_welchs_test() -> None:
    first, second = arms_of(np.random.default_rng(3), (3, 5), (1.0, 2.0), 0.0, 4.0)
    found, wanted = difference(first, second), ttest_ind(second.seeds, first.seeds, equal_var=False)
    assert found["p"] == pytest.approx(wanted.pvalue, rel=1e-2)
    assert found["ci"] == pytest.approx(list(wanted.confidence_interval()), abs=2e-6)


def test_p_is_below_a_twentieth_where_the_interval_leaves_zero_out() -> None:
    rng = np.random.default_rng(1)
    rows = [difference(*arms_of(rng, (2, 4), (1.0, 1.0), 1.0, effect)) for effect in (0.0, 2.0, 5.0) for _ in range(200)]
    assert all((row["p"] < 0.05) == (row["ci"][0] > 0 or row["ci"][1] < 0) for row in rows)
    assert 0.2 < np.mean([row["p"] < 0.05 for row in rows]) < 0.9


def test_what_is_neither_the_seeds_nor_the_patients_alone_is_counted_once() -> None:
    """Each network errs on images of its own, and no training is better than another: the seeds differ by just that."""
    found = simulate(12, {"a": 1.0, "b": 1.0}, people=400, seeds=10, tau=0.0)
    first, second = (of["auroc"] for of in estimates(found, 500, ("auroc",)).values())
    error, _ = spread(second.draws - first.draws, first, second)
    assert error < 1.2 * (second.draws - first.draws).std()
    assert first.noise == pytest.approx(first.seeds.var(ddof=1), rel=0.6)


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
    assert found["p"] == pytest.approx(2 * t.sf(abs(found["value"] / found["se"]), min(target.sum(), 60 - target.sum()) - 1))


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


@pytest.mark.parametrize("seeds", [2, 3])
def test_where_arms_err_alike_no_interval_leaves_all_reason(seeds: int) -> None:
    """One is the other but for a little noise: between seeds both vary far more than their difference does."""
    for number in range(3):
        found = simulate(number, {"a": 1.0}, people=120, seeds=seeds)
        noise = 0.001 * np.random.default_rng(number).normal(size=found.scores["a"].shape)
        found.scores["b"], found.seeds["b"] = np.clip(found.scores["a"] + noise, 0, 1), found.seeds["a"]
        of = estimates(found, 200)
        for name, first in of["a"].items():
            second = of["b"][name]
            told, row = spread(second.draws - first.draws, first, second), difference(first, second)
            assert told is None or told[1] >= seeds - 1 - 1e-9, name
            assert row["ci"] is None or -2 < row["ci"][0] <= row["value"] <= row["ci"][1] < 2, name


def test_of_equal_arms_the_difference_is_nothing() -> None:
    found = simulate(4, {"a": 1.0, "b": 1.0}, seeds=1)
    found.scores["b"] = found.scores["a"].copy()
    for row in differences(found, estimates(found, 300)):
        assert (row["value"], row["ci"], row["p"]) == (0.0, None, None), row["metric"]  # of other patients that says nothing


def shares(malignant: int, groups: int, score: float, seeds: int = 1) -> dict:
    """The figures' intervals of networks that give all ``malignant`` images the same score, and all others 0.2 or 0.3."""
    target = np.arange(malignant + 200) < malignant
    score = np.where(target, score, 0.2 + 0.1 * (np.arange(len(target)) % 2))
    group = np.where(target, np.arange(len(target)) % groups, np.arange(len(target)))
    found = Predictions(target.astype(str), group.astype(str), target.astype(int), {"a": np.stack([score] * seeds)}, {"a": list(range(seeds))})
    return {name: one.summary()["ci"] for name, one in estimates(found, 300)["a"].items()}


def test_where_no_resample_differs_the_interval_is_exact_or_unknown() -> None:
    """0 of 30 may be 11.6 % (Clopper and Pearson's table), and images of one patient are one trial."""
    assert shares(30, 30, 0.1)["sensitivity"] == pytest.approx([0, 0.116], abs=5e-4)
    assert shares(30, 10, 0.1, seeds=3)["sensitivity"] == pytest.approx([0, 0.308], abs=5e-4)
    right = shares(30, 30, 0.9)
    assert right["sensitivity"] == pytest.approx([0.884, 1], abs=5e-4)
    assert right["specificity"] == pytest.approx([1 - 0.0183, 1], abs=5e-4)
    assert right["auroc"] is right["balanced_accuracy"] is right["sensitivity_at_90"] is None
    assert right["brier"][0] < right["brier"][1]


def test_each_error_more_moves_a_shares_interval_down() -> None:
    """About as Clopper and Pearson have it, also beside 0 and 1."""
    target = np.repeat([1, 0], [50, 200])
    ends = []
    for missed in range(4):
        score = np.where(np.arange(250) < missed, 0.2, np.where(target == 1, 0.8, 0.1))
        found = Predictions(np.arange(250).astype(str), np.arange(250).astype(str), target, {"a": score[None]}, {"a": [0]})
        ends.append(estimates(found, 1000, ("sensitivity",))["a"]["sensitivity"].summary()["ci"])
        assert ends[-1] == pytest.approx(list(binomtest(50 - missed, 50).proportion_ci(0.95)), abs=6e-3)
    assert ends == sorted(ends, reverse=True)
    assert ends[3][1] < ends[1][1] < 1


def test_a_tails_figure_hangs_on_few_groups() -> None:
    """Of ten malignant images the two that are hardest to find make the partial AUROC: as of ten its interval held the truth in 7 of 10 repeats."""
    def draw(rng: np.random.Generator, malignant: int, benign: int) -> tuple[np.ndarray, np.ndarray]:
        target = np.repeat([1, 0], [malignant, benign])
        return target, norm.cdf(1.6 * target + rng.normal(size=len(target)) - 1)

    wanted, held = binary_metrics(*draw(np.random.default_rng(0), 100_000, 100_000))["partial_auroc"], 0
    for number in range(40):
        target, score = draw(np.random.default_rng([1, number]), 10, 500)
        names = np.arange(len(target)).astype(str)
        of = estimates(Predictions(names, names, target, {"a": score[None]}, {"a": [0]}), 300, ("partial_auroc",))["a"]["partial_auroc"]
        low, high = of.summary()["ci"]
        held += low <= wanted <= high
    assert held >= 36
    holders = Scored(target, score).holders
    assert [holders(name) for name in ("auroc", "partial_auroc", "sensitivity_at_80", "sensitivity_at_95")] == [10, 2, 10, 10]
    assert Scored(1 - target, 1 - score).holders("sensitivity_at_80") == 2


def test_the_calibration_error_has_no_interval() -> None:
    """Of scores that are right its draws lie above the value, and this above the truth, which is 0."""
    rng = np.random.default_rng(0)
    score = rng.random(400)
    found = simulate(3, {"a": 1.0, "b": 1.0})
    of = estimates(found, 200, ("ece", "brier"))
    assert (of["a"]["ece"].summary()["ci"], difference(of["a"]["ece"], of["b"]["ece"])["p"]) == (None, None)
    assert None not in (of["a"]["brier"].summary()["ci"], difference(of["a"]["brier"], of["b"]["brier"])["p"])
    target = (rng.random(400) < score).astype(int)
    names = np.arange(400).astype(str)
    right = estimates(Predictions(names, names, target, {"a": score[None]}, {"a": [0]}), 300, ("ece",))["a"]["ece"]
    assert 0 < right.seeds[0] < right.draws.mean()


def test_of_two_trainings_no_difference_is_claimed() -> None:
    found = simulate(8, {"baseline": 0.6, "hybrid": 1.9, "third": 1.9})
    found.scores["hybrid"], found.seeds["hybrid"] = found.scores["hybrid"][:2], [0, 1]
    told = verdict(compare(found))
    assert told["headline"].startswith("In this run, third told malignant from benign better than baseline. Of baseline and hybrid there are too few "
                                       "trainings to claim the difference that they show: two of an arm may be alike by chance; train each")
    assert "p < 0.001" in told["may"][0]


def test_of_few_groups_the_interval_is_wider() -> None:
    few, many = (Estimate("auroc", np.array([0.5]), np.linspace(0.4, 0.6, 1001), 0.0, groups).summary()["ci"] for groups in (5, 10_000))
    assert many == pytest.approx([0.405, 0.595], abs=1e-3)
    assert few[1] - few[0] == pytest.approx(0.19 * t.ppf(0.975, 4) / 1.96, rel=1e-3)


def test_the_verdict_finds_large_effects_among_many_arms() -> None:
    """Twelve arms make 66 pairs, of which the verdict speaks of 11."""
    found = simulate(13, {"real": 0.3, **{f"arm{i}": 2.5 for i in range(10)}, "same": 0.3}, people=150)
    of = estimates(found, 500, ("auroc",))
    rows = [{"arms": [other, "real"], "metric": "auroc", **difference(of["real"]["auroc"], of[other]["auroc"]), "paired": True}
            for other in list(of)[1:]]
    told = verdict({"arms": {arm: {"auroc": one["auroc"].summary()} for arm, one in of.items()}, "differences": correct(rows, "real"),
                    "test": size(found)})
    assert told["headline"].startswith("In this run, arm0, arm1, arm2, arm3, arm4, arm5, arm6, arm7, arm8 and arm9 told malignant from benign better")
    assert "between real and same." in told["headline"]
    assert "p corrected for 11 comparisons with real (Holm)" in " ".join(told["may_not"])
    assert "with all 11 comparisons in mind" in told["may"][0]


def test_the_correction_that_is_told_is_the_one_that_was_made() -> None:
    """An arm that a run took over from another is compared with itself: it has no p, and none is multiplied for it."""
    found = simulate(9, {"a/real": 1.0, "a/half": 1.05, "b/real": 1.0, "b/half": 1.1}, people=80)
    found.scores["b/real"] = found.scores["a/real"].copy()
    result = compare(found)
    rows = {row["arms"][0]: row for row in main(result["differences"], "a/real")}
    assert {name: row["same"] for name, row in rows.items()} == {"a/half": False, "b/real": True, "b/half": False}
    least = min((rows["a/half"], rows["b/half"]), key=lambda row: row["p"])
    assert least["p_holm"] == pytest.approx(2 * least["p"], rel=0.01)
    told = verdict(result, "these runs")
    assert len(told["may"]) == 3
    assert "with all 2 comparisons in mind" in " ".join(told["may"])
    assert "p corrected for 2 comparisons with a/real (Holm)" in " ".join(told["may_not"])
    assert "3 comparisons" not in " ".join([*told["may"], *told["may_not"]])


def test_the_same_trained_network_is_called_the_same() -> None:
    found = simulate(9, {"a/real": 1.0, "a/half": 1.05, "b/real": 1.0}, people=80, seeds=1)
    found.scores["b/real"] = found.scores["a/real"].copy()
    told = verdict(compare(found), "these runs")
    assert told["headline"].startswith("One training each of a/real and a/half was compared. There is no clear difference between the trained ")
    assert told["headline"].endswith("b/real and a/real have the very same predictions of every image: they are the same trained networks, and there "
                                     "is nothing to compare.")
    assert "cannot be told" not in told["headline"]
    assert told["may"][1].endswith(" (b/real and a/real, which are the same trained networks).")
    assert "shown that b/real" not in " ".join(told["may_not"])
    assert "shown that a/half and a/real are equal" in " ".join(told["may_not"])
    alone = verdict(compare(Predictions(found.keys, found.groups, found.target, {n: found.scores[n] for n in ("a/real", "b/real")},
                                        {n: [0] for n in ("a/real", "b/real")})))
    assert alone["headline"].startswith("b/real and a/real have the very same predictions")
    assert "AUROC alone was tested" not in " ".join(alone["may_not"])


def test_only_comparisons_with_the_first_arm_are_corrected_for() -> None:
    rows = [{"arms": pair, "metric": metric, "paired": pair != ["d", "a"], "p": 0.02}
            for pair in (["b", "a"], ["c", "a"], ["c", "b"], ["d", "a"]) for metric in ("auroc", "f1")]
    correct(rows, "a")
    assert [row.get("p_holm", "none") for row in rows] == [0.04, "none", 0.04, "none", None, "none", None, "none"]


def test_holm_corrects_for_the_number_of_rows() -> None:
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
    assert same["headline"].startswith("One training each of baseline and hybrid was compared. There is no clear difference between the trained")
    text = " ".join(same["may_not"])
    for needed in ("One training run per arm cannot prove an effect", "Nor is it shown that hybrid and baseline are equal", "AUROC alone was tested",
                   "are malignant: with so few", "do not name sex, age or site"):
        assert needed in text, needed
    once = verdict(compare(simulate(8, {"baseline": 0.6, "hybrid": 1.6}, seeds=1)))["headline"]
    assert once.startswith("One training each of baseline and hybrid was compared. In this run, the trained hybrid told malignant from benign "
                           "better than the trained baseline. That holds for these trained networks and says nothing of the method")
    assert once.endswith("train each arm with several seeds (classify.seeds).")
    unpaired = compare(simulate(8, {"baseline": 0.6, "hybrid": 1.6}))
    unpaired["differences"] = [row | {"paired": False} for row in unpaired["differences"]]
    assert verdict(unpaired)["headline"] == "There is nothing to compare yet."
    assert "Nothing is concluded of hybrid: other test images" in " ".join(verdict(unpaired)["may_not"])
    nothing = verdict(compare(simulate(10, {"only": 1.0})))
    assert nothing["headline"] == "There is nothing to compare yet."


def test_what_a_single_training_of_one_arm_leaves_open_is_said_of_that_one() -> None:
    found = simulate(8, {"baseline": 0.6, "hybrid": 1.6, "third": 1.6})
    found.scores["third"], found.seeds["third"] = found.scores["third"][:1], [0]
    told = verdict(compare(found))["headline"]
    assert told.startswith("In this run, hybrid told malignant from benign better than baseline. Of third one training alone was compared. "
                           "In this run, the trained third told")


def test_arms_that_rank_alike_are_neither_different_nor_shown_to_be_equal() -> None:
    found = simulate(4, {"a": 1.0, "b": 1.0})
    found.scores["a"] = np.tile(found.scores["a"][:1], (3, 1))
    found.scores["b"] = found.scores["a"] / 2
    told = verdict(compare(found))
    assert told["headline"] == "How b and a differ cannot be told: there is no interval."
    assert "a difference of +0.000, interval unknown." in told["may"][0]
    assert "Nor is it shown that b and a are equal: there is no interval" in " ".join(told["may_not"])


def test_one_class_alone_gives_no_difference_and_no_number() -> None:
    found = simulate(11, {"a": 1.0, "b": 1.0}, people=20)
    found.target[:] = 0
    result = compare(found)
    assert result["arms"]["a"]["auroc"] == {"value": None, "ci": None, "seeds": [None] * 3}
    assert result["arms"]["a"]["roc"] is None
    row = next(row for row in result["differences"] if row["metric"] == "auroc")
    assert (row["value"], row["ci"], row["p"], row["delong"], row["p_holm"]) == (None,) * 5
    assert verdict(result)["headline"] == "There is nothing to compare yet."


if __name__ == "__main__":  # the same with many repeats: how often the interval holds the truth, and how often arms are called different
    print("seeds, their spread, effect: the interval holds the truth, arms are called different")
    for seeds, tau, effect in [(3, TAU, 0.2), (3, TAU, 0.5), *((seeds, tau, 0.0) for tau in (0.0, TAU, WIDE) for seeds in (3, 5, 10))]:
        found = [auroc_row(simulate(1000 + n, {"a": 0.85, "b": 0.85 + effect}, seeds=seeds, tau=tau), 500) for n in range(400)]
        right = truth(0.85 + effect, tau) - truth(0.85, tau)
        print(seeds, tau, effect, np.mean([r["ci"][0] <= right <= r["ci"][1] for r in found]), np.mean([claimed(r) for r in found]), flush=True)
