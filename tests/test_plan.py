"""The plan of generation: which image is what, found by its number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import overrides

from skinsynth import config, knobs
from skinsynth.data.dataset import Dataset
from skinsynth.data.plan import Plan, amounts, examples, share_out
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.errors import UserError


def counted(**classes: tuple[int, list[str], int]) -> knobs.Config:
    cfg = knobs.Config()
    cfg.generate.classes = {name: knobs.GeneratedClass(target, prompts, count) for name, (target, prompts, count) in classes.items()}
    return cfg


@pytest.fixture
def train(tmp_path: Path) -> Dataset:
    """Eight benign and two malignant images with what is known of them."""
    rows = [(0, "nevus", "back", 40, "female")] * 5 + [(0, "nevus", None, 35, "male")] * 2 + [(0, None, "head/neck", None, None)]
    rows += [(1, "melanoma", "lower extremity", 71, "male"), (1, "melanoma", "back", 12, "female")]
    with ShardWriter(tmp_path / "train", 0) as shard:
        for i, (target, diagnosis, site, age, sex) in enumerate(rows):
            shard.add(f"I{i}", {"jpg": b""}, target=target, diagnosis=diagnosis, site=site, age=age, sex=sex, group=f"P{i}", caption=f"caption {i}")
    write_manifest(tmp_path / "train", 1, kind="real")
    return Dataset.open(tmp_path / "train")


def test_classes_are_mixed_and_prompts_used_in_turn() -> None:
    cfg = counted(a=(0, ["p", "q"], 6), b=(1, ["r"], 3), none=(1, [], 0))
    plan = Plan(cfg, None)
    images = [plan.image(n) for n in range(plan.total)]
    assert [i.name for i in images] == ["a", "b", "a"] * 3
    assert [i.prompt for i in images if i.name == "a"] == ["p", "q"] * 3
    assert [plan.image(n) for n in range(plan.total)] == images
    cfg.seed = 1
    assert not {Plan(cfg, None).image(n).seed for n in range(9)} & {i.seed for i in images}
    with pytest.raises(UserError, match="asks for no image"):
        Plan(counted(), None)


@pytest.mark.parametrize("counts", [(1,), (5, 5), (7, 1, 3), (1000, 1), (13, 14), (3, 0, 2), (999, 998, 1)])
def test_every_class_gets_its_count_and_about_its_share_of_every_stretch(counts: tuple[int, ...]) -> None:
    found = [share_out(counts, n) for n in range(sum(counts))]
    for kind, count in enumerate(counts):
        assert [turn for which, turn in found if which == kind] == list(range(count))
    half = Counter(which for which, _ in found[: sum(counts) // 2])
    assert all(abs(half[kind] - count / 2) <= len(counts) for kind, count in enumerate(counts))


def test_a_million_images_have_seeds_of_their_own() -> None:
    plan = Plan(counted(a=(0, ["p"], 900_001), b=(1, ["q"], 99_999)), None)
    assert (plan.total, plan.units, plan.image(plan.total - 1).number) == (1_000_000, 1000, 999_999)
    chosen = range(0, 1_000_000, 50)
    assert len({plan.image(n).seed for n in chosen}) == len(chosen)
    assert max(plan.image(n).seed for n in chosen) < 2**53, "JSON keeps it exactly"
    assert plan.image(5).seed != plan.image(5, attempt=1).seed


def test_as_many_as_real_or_as_many_as_lack(train: Dataset) -> None:
    cfg = counted(nevus=(0, ["p"], 3), other=(0, ["p"], 1), melanoma=(1, ["q"], 1))
    cfg.generate.amount = "real"
    assert amounts(cfg, Counter(train.columns["target"])) == {"nevus": 6, "other": 2, "melanoma": 2}
    cfg.generate.amount = "balance"
    assert amounts(cfg, Counter(train.columns["target"])) == {"melanoma": 6}
    assert Plan(cfg, train).total == 6
    with pytest.raises(UserError, match=r"balance asks for no image: the training split has \{0: 8, 1: 8\}"):
        amounts(cfg, Counter({0: 8, 1: 8}))


def test_prompts_are_filled_as_values_occur_together(train: Dataset) -> None:
    cfg = counted(benign=(0, ["a photo of a {diagnosis} {site} {person}"], 400), malignant=(1, ["{caption}"], 100))
    images = [image for n in range(500) for image in [Plan(cfg, train).image(n)]]
    benign = Counter(i.prompt for i in images if i.target == 0)
    assert set(benign) == {"a photo of a nevus on the back of a woman in her 40s"}, "the others lack a value that the prompt needs"
    malignant = Counter(i.prompt for i in images if i.target == 1)
    assert set(malignant) == {"caption 8", "caption 9"}
    assert 25 < malignant["caption 8"] < 75
    assert {(i.attributes["age"], i.attributes["sex"]) for i in images if i.target == 1} == {(71, "male"), (12, "female")}
    assert all(i.source is None for i in images)
    assert examples(cfg, train) == ["a photo of a nevus on the back of a woman in her 40s", "caption 8"]
    cfg.generate.classes["benign"].where = {"site": "head/neck"}
    for ask in (Plan, examples):
        with pytest.raises(UserError, match="has a known diagnosis and site and age and sex"):
            ask(cfg, train)
    cfg.generate.classes["benign"].count = 0
    assert examples(cfg, train) == ["caption 8"], "what nothing is generated of need not be filled"


def test_images_to_start_from_are_used_equally_often(train: Dataset) -> None:
    cfg = counted(benign=(0, ["p"], 24), malignant=(1, ["q", "r"], 8))
    cfg.generate.method = "image-to-image"
    images = [image for n in range(32) for image in [Plan(cfg, train).image(n)]]
    assert Counter(i.source for i in images if i.target == 0) == dict.fromkeys(range(8), 3)
    assert Counter(i.source for i in images if i.target == 1) == {8: 4, 9: 4}
    assert "train_sha256" in Plan(cfg, train).request()


def test_prompts_share_the_images_to_start_from(train: Dataset) -> None:
    """As many images as there are sources: none is passed over, whatever the number of prompts."""
    cfg = counted(benign=(0, ["p", "q", "{caption}", "s"], 24))
    cfg.generate.method = "inpaint"
    images = [image for n in range(24) for image in [Plan(cfg, train).image(n)]]
    for start in (0, 8, 16):
        assert {i.source for i in images[start:start + 8]} == set(range(8))
    assert len({i.source for i in images if i.prompt == "p"}) > 2
    cfg.generate.classes["benign"].prompts = ["p", "a mole {site}", "q"]  # of two of the eight the site is not known
    images = [image for n in range(24) for image in [Plan(cfg, train).image(n)]]
    assert Counter(i.source for i in images if i.prompt in ("p", "q")) == dict.fromkeys(range(8), 2)
    assert {i.source for i in images if "mole" in i.prompt} == {0, 1, 2, 3, 4, 7}


def test_misspelt_fields_are_told_at_once(drawn: Path, tmp_path: Path) -> None:
    for prompt, message in (("a {diagnose}", "there is no {diagnose}, only {diagnosis}"), ("a {site", "expected '}'")):
        items = overrides(drawn, tmp_path)
        with pytest.raises(UserError, match=message):
            config.load("configs/demo.yaml", [*items, f"generate.classes.benign.prompts=['{prompt}']"])
    with pytest.raises(UserError, match="is no step at all"):
        config.load("configs/demo.yaml", ["generate.method=inpaint", "generate.strength=0.01"])
