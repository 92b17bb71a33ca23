from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Setup, plant, take_as_screened

from skinsynth import config, knobs, stages
from skinsynth.data.augment import augment, blend, partner
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.dataset import Dataset
from skinsynth.data.decoded import Decoded
from skinsynth.data.order import sample_rng
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Arm, Phase
from skinsynth.models import vit
from skinsynth.quality.metrics import METRICS, binary_metrics
from skinsynth.run import Task
from skinsynth.stages.classify import classify
from skinsynth.train.arms import Data
from skinsynth.train.engine import Engine
from skinsynth.train.judge import Judge, loss, predictions
from skinsynth.train.log import read_lines
from skinsynth.world import Stopped, World


def score(folder: Path) -> np.ndarray:
    return np.array([float(row["score"]) for row in csv.DictReader((folder / "predictions.csv").open())])


# ---- what a finished run has ----

def test_weights_load_with_plain_transformers_and_give_the_predictions(chain: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    seed = chain / "run/classify/hybrid/seed-0"
    model = AutoModelForImageClassification.from_pretrained(seed / "weights").eval()
    assert model.config.id2label == {0: "benign", 1: "malignant"}
    test = Dataset.open(chain / "shards/small-test")
    rows = list(csv.DictReader((seed / "predictions.csv").open()))
    assert [r["key"] for r in rows] == test.keys
    images = torch.from_numpy(np.stack([test.image(i).transpose(2, 0, 1) for i in range(4)]))
    with torch.inference_mode():
        scores = vit.logits(model, images, 64).softmax(1)[:, 1]
        processed = AutoImageProcessor.from_pretrained(seed / "weights")([test.image(i) for i in range(4)], return_tensors="pt")
        theirs = model(**processed).logits.softmax(1)[:, 1]
    assert scores.tolist() == pytest.approx([float(r["score"]) for r in rows[:4]], abs=1e-4)
    assert theirs.tolist() == pytest.approx(scores.tolist(), abs=1e-4)
    for name in ("sex", "age", "site", "diagnosis"):
        assert [r[name] for r in rows] == ["" if value is None else str(value) for value in test.columns[name]]
        assert len({r[name] for r in rows}) > 1


def test_the_result_is_that_of_the_checkpoint_chosen_on_validation(chain: Path) -> None:
    for arm in ("baseline", "hybrid"):
        folder = chain / "run/classify" / arm
        epochs, facts = read_lines(folder / "seed-0/epochs.jsonl"), read_json(folder / "seed-0/metrics.json")
        assert [row["step"] for row in epochs] == [4, 8, 12]
        assert all(row.keys() == {"step", "epoch", "val"} for row in epochs), "the test images are read at the end only"
        best = max(epochs, key=lambda row: row["val"]["auroc"])
        assert (facts["chosen_step"], facts["chosen_by"]["value"]) == (best["step"], best["val"]["auroc"])
        rows = list(csv.DictReader((folder / "seed-0/predictions.csv").open()))
        again = binary_metrics(np.array([int(r["target"]) for r in rows]), score(folder / "seed-0"))
        assert {m: facts[m] for m in METRICS} == pytest.approx(again, abs=1e-5)
        done = read_json(folder / "done.json")["metrics"]
        assert (done["seeds"], done["mean"]) == ([0], {m: facts[m] for m in METRICS})
        assert not list(folder.glob("seed-0/best-*"))


# ---- arms ----

def test_arms_differ_in_their_sources_alone(make: Setup) -> None:
    cfg, run = make()
    real, hybrid = (Data(cfg, run, arm, 0) for arm in ("baseline", "hybrid"))
    assert (list(real.sources), list(hybrid.sources)) == (["real"], ["real", "synthetic"])
    assert [hybrid.at(k)[1] is hybrid.sources["synthetic"] for k in range(8)] == [False, True] * 4
    batch = hybrid.batch(range(4))
    assert (batch["images"].shape, batch["images"].dtype) == ((4, 3, 64, 64), torch.uint8)
    assert (batch["target"].shape, batch["target"].dtype) == ((4, 2), torch.float32)
    again, other = Data(cfg, run, "hybrid", 0), Data(cfg, run, "hybrid", 1)
    assert torch.equal(batch["images"], again.batch(range(4))["images"])
    assert other.keys(range(32)) != hybrid.keys(range(32))
    assert other.sha256() == hybrid.sha256()
    assert other.splits["test"].keys == hybrid.splits["test"].keys


def test_what_is_kept_in_memory_changes_no_batch(make: Setup) -> None:
    cfg, run = make(mixup=0.2, cutmix=0.5)
    kept = Data(cfg, run, "hybrid", 0)
    cfg.data.memory_gb = 0
    other, epochs = Data(cfg, run, "hybrid", 0), range(3 * len(kept.sources["real"]))
    assert kept.decoded.room > len(epochs)
    for begin in epochs[::16]:
        a, b = kept.batch(range(begin, begin + 16)), other.batch(range(begin, begin + 16))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_synthetic_first_and_then_real(make: Setup) -> None:
    cfg, run = make(**{"arms.staged.phases": "[{sources: {synthetic: 1}, share: 0.5}, {sources: {real: 3, synthetic: 1}, share: 0.25}, "
                                             "{sources: {real: 1}, share: 0.25}]", "arms.only": "{sources: {synthetic: 1, real: 0}}"})
    data, batch = Data(cfg, run, "staged", 0), cfg.classify.global_batch
    assert [phase.begin for phase in data.phases] == [0, 6 * batch, 9 * batch]
    synthetic = [[data.at(step * batch + k)[1] is data.sources["synthetic"] for k in range(batch)] for step in range(12)]
    assert [sum(row) / batch for row in synthetic] == [1] * 6 + [0.25] * 3 + [0] * 3
    assert list(Data(cfg, run, "only", 0).sources) == ["synthetic"]


def test_sources_of_phases_decide_what_an_arm_needs_and_what_it_is_held_against() -> None:
    from skinsynth.chain import chain as nodes
    from skinsynth.quality.predictions import arms_of

    cfg = config.load("configs/demo.yaml")
    cfg.classify.arms = {"staged": Arm(phases=[Phase({"synthetic": 1}), Phase({"real": 1})]), "twice": Arm(phases=[Phase({"real": 1})] * 2)}
    assert arms_of(cfg) == ["twice", "staged"]
    needs = {node.name: node.needs for node in nodes(cfg)}
    assert (needs["classify/staged"], needs["classify/twice"]) == (("screen",), ("prepare",))


@pytest.mark.parametrize(("items", "words"), [
    (["classify.arms.a={sources: {real: 1}, phases: [{sources: {real: 1}}]}"], "classify.arms.a has both sources and phases"),
    (["classify.arms.a={phases: [{sources: {real: 1}}, {sources: {fake: 1}}]}"], r"classify.arms.a.phases\[1\].sources is \{'fake'"),
    (["classify.arms.a={phases: [{sources: {real: 1}, share: 0}, {sources: {real: 1}}]}"], r"phases\[0\].share=0.0 of .* is no step"),
    (["classify.seeds=[1, 1]"], r"classify.seeds is \[1, 1\]"),
    (["classify.tta=3"], "classify.tta is '3', expected one of 1, 8"),
    (["classify.layer_decay=0"], "classify.layer_decay is 0"),
])
def test_arms_and_seeds_that_cannot_be(items: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.load("configs/demo.yaml", items)


# ---- balance, mixing, smoothing ----

def test_balanced_sampling_draws_the_classes_alike_and_sources_by_weight(make: Setup) -> None:
    cfg, run = make(balance="sampling")
    data = Data(cfg, run, "hybrid", 0)
    drawn = Counter((source.dataset.manifest["kind"], int(source.dataset.columns["target"][source.samples[i]]))
                    for _, source, i in map(data.at, range(400)))
    assert drawn == {(kind, target): 100 for kind in ("real", "synthetic") for target in (0, 1)}
    assert data.batch(range(8))["target"].sum(0).tolist() == [4, 4]


def test_class_weights_make_the_classes_count_the_same(make: Setup) -> None:
    cfg, run = make(balance="weights")
    data = Data(cfg, run, "baseline", 0)
    whole = data.batch(range(len(data.sources["real"])))["target"].sum(0)  # each image once
    assert whole.tolist() == pytest.approx([len(data.sources["real"]) / 2] * 2, rel=1e-5)
    assert data.phases[0].weights[1] > data.phases[0].weights[0]


@pytest.mark.parametrize(("balance", "smoothing"), [("weights", 0.0), ("none", 0.2), ("weights", 0.2)])
def test_the_loss_is_torchs_with_weights_and_smoothing(make: Setup, balance: str, smoothing: float) -> None:
    cfg, run = make(balance=balance, label_smoothing=smoothing)
    data, scores = Data(cfg, run, "baseline", 0), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    class Fixed(torch.nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:  # type: ignore[override]
            return type("Out", (), {"logits": scores})

    batch = data.batch(range(8))
    plain = torch.tensor([int(data.at(k)[1].dataset.columns["target"][data.at(k)[1].samples[data.at(k)[2]]]) for k in range(8)])
    each = F.cross_entropy(scores, plain, label_smoothing=smoothing, reduction="none")  # torch would weigh the class smoothed to, too
    expected = (each * torch.from_numpy(data.phases[0].weights)[plain]).mean()
    assert float(loss(Fixed(1, 1), batch, vit.Inputs(64))) == pytest.approx(float(expected), rel=1e-5)


def test_weights_and_smoothing_make_no_benign_image_malignant(make: Setup) -> None:
    """Of a class that has one image in fifty the weight is 28: what smoothing gives it must not outweigh the image's own class."""
    cfg, run = make(balance="weights", label_smoothing=0.1)
    weights = (0.5 / np.array([0.982, 0.018])).astype(np.float32)
    benign, malignant = Data(cfg, run, "baseline", 0)._labels(weights)
    assert benign / benign.sum() == pytest.approx([0.95, 0.05])
    assert malignant / malignant.sum() == pytest.approx([0.05, 0.95])
    assert benign.sum() * 0.982 == pytest.approx(malignant.sum() * 0.018)


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_a_blend_and_its_label_have_the_same_share(make: Setup, how: str) -> None:
    cfg, run = make(**{how: 1.0})
    data = Data(cfg, run, "hybrid", 0)
    batch, plain = data.batch(range(32, 64)), [data._augmented(k) for k in range(32, 64)]
    partners = [partner(k, 32, 0) - 32 for k in range(32, 64)]
    assert sorted(partners) == list(range(32))
    mixed = 0
    for place, (image, target) in enumerate(plain):
        other, its = plain[partners[place]]
        share = blend(image, other, sample_rng(32452843, 32 + place), cfg.classify.mixup, cfg.classify.cutmix)[1]
        got = batch["images"][place].numpy().transpose(1, 2, 0).astype(float)
        label = batch["target"][place].numpy()
        assert label.sum() == pytest.approx(1)
        assert label[target] == pytest.approx(1 if its == target else share, abs=1e-6)
        if how == "mixup":
            assert np.abs(got - (share * image + (1 - share) * other.astype(float))).max() <= 1
        else:
            from_other = (got != image).any(2)
            assert (got[from_other] == other[from_other]).all()
            assert from_other.mean() <= 1 - share + 1e-9
        mixed += 0.05 < share < 0.95 and its != target
    assert mixed >= 3
    parts = [data.batch(range(32 + rank, 64, 2)) for rank in range(2)]  # as two ranks read it
    assert torch.equal(torch.stack([p["images"] for p in parts], 1).flatten(0, 1), batch["images"])
    assert torch.equal(torch.stack([p["target"] for p in parts], 1).flatten(0, 1), batch["target"])


def test_augmentation_is_the_samples_own() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(augment(image, sample_rng(0, 3)), augment(image, sample_rng(0, 3)))
    assert len({augment(image, sample_rng(0, k)).tobytes() for k in range(20)}) == 20
    rng = sample_rng(0, 5)
    turned = np.rot90(image, int(rng.integers(4)))
    turned = turned[:, ::-1] if rng.random() < 0.5 else turned
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
    assert np.array_equal(augment(image, sample_rng(0, 5)), np.clip(turned * gain + offset, 0, 255).astype(np.uint8))


# ---- what is written down ----

def test_a_score_is_written_as_it_is(tmp_path: Path) -> None:
    """A confident model's differ in the seventh decimal: without it, images that it ranks become alike."""
    scores = np.array([1e-7, 2e-7, 1e-38, 1 - 6e-8, 1 / 3], np.float32)
    with ShardWriter(tmp_path / "set", 0) as shard:
        for number in range(len(scores)):
            shard.add(f"k{number}", {"jpg": b"x"}, group="g", target=number % 2)
    write_manifest(tmp_path / "set", 1, kind="real")
    (tmp_path / "predictions.csv").write_bytes(predictions(Dataset.open(tmp_path / "set"), scores))
    assert np.array_equal(score(tmp_path).astype(np.float32), scores)


def test_the_best_weights_are_on_the_disk_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, fsync, synced = knobs.Classify(model="small", hidden_size=16, layers=1, heads=2, patch=8), os.fsync, set()

    def note(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    judge = object.__new__(Judge)
    judge.folder, judge.model = tmp_path, vit.build(cfg, 32, 0)
    judge.inputs = vit.Inputs.of(cfg, judge.model, 32)
    monkeypatch.setattr(os, "fsync", note)
    judge._keep(7)
    assert {path.name for path in (tmp_path / "best-00000007").iterdir()} >= {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} <= synced


def test_a_large_global_batch_is_not_judged_at_once(tmp_path: Path) -> None:
    """That of many ranks would be too much for the one that judges."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", 0) as shard:
        for number in range(150):
            shard.add(f"k{number}", {"jpg": encode_jpeg(rng.integers(0, 255, (32, 32, 3), np.uint8), 90)}, group="g", target=number % 2)
    write_manifest(tmp_path / "set", 1, kind="real")
    sizes: list[int] = []
    scores = []
    for batch in (8, 64, 65, 4096):
        judge = object.__new__(Judge)
        judge.cfg = knobs.Classify(model="small", hidden_size=16, layers=1, heads=2, patch=8, global_batch=batch)
        judge.model, judge.world = vit.build(judge.cfg, 32, 0).eval(), World()
        judge.inputs = vit.Inputs.of(judge.cfg, judge.model, 32)
        judge.data = SimpleNamespace(workers=1, decoded=Decoded(32, 32, 0.0))  # type: ignore[assignment]
        judge.model.register_forward_hook(lambda model, given, output: sizes.append(len(output.logits)))
        scores.append(judge.scores(Dataset.open(tmp_path / "set")))
    assert sizes == [8] * 19 + [64] * 3 * 3
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert np.array_equal(scores[1], scores[2])
    assert np.array_equal(scores[1], scores[3])


# ---- other pretrained models ----

def pretrained(kind: str, folder: Path) -> str:
    """A small one with random weights, as from the hub: of the whole model, without a head for classes."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    both = {"vision_config": {**vision, "intermediate_size": 64}, "text_config": {**sizes, "intermediate_size": 64}}
    model: Any = {"dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**vision)),
                  "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(**both)),
                  "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(**both))}[kind]()
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_what_of_a_pretrained_model_has_no_part_in_the_answer_is_not_trained(kind: str, tmp_path: Path) -> None:
    """A mask token, a norm or a head that are passed over: with a moving average of weights that never had a gradient nothing could be judged."""
    cfg = knobs.Classify(model=pretrained(kind, tmp_path / kind), global_batch=4, steps=2, zero=0, ema_decay=0.9, precision="fp32")
    model = vit.build(cfg, 64, 0)
    inputs = vit.Inputs.of(cfg, model, 64)
    assert inputs.side == 28
    assert all(p.grad is None for p in model.parameters()), "nothing is added to the first step's gradients"
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"images": images, "target": torch.eye(2)[[0, 1, 1, 0]]}
    loss(model, batch, inputs).backward()
    grads = {name: p.grad is not None for name, p in model.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert sorted(grads.values())[0] is False
    assert sum(grads.values()) > 20
    model.zero_grad(set_to_none=True)
    engine = Engine(cfg, World(), model, "classify")
    before = {name: value.clone() for name, value in engine.trained.items()}
    for _ in range(2):
        engine.step(1e-3, 0.5, [batch], lambda model, batch: loss(model, batch, inputs))
    averages = dict(engine.weights())
    assert averages.keys() == before.keys()
    assert [name for name, value in averages.items() if torch.equal(value, before[name])] == []


def test_the_side_of_the_images_is_found_wherever_a_model_has_it(tmp_path: Path) -> None:
    """Hiera gives height and width; what says nothing takes the shards' own."""
    import transformers

    transformers.HieraForImageClassification(transformers.HieraConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
                                                                      image_size=[64, 64])).save_pretrained(tmp_path / "hiera")
    transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])).save_pretrained(
        tmp_path / "convnext")
    for kind, size, side in (("hiera", 512, 64), ("convnext", 96, 224)):
        cfg = knobs.Classify(model=str(tmp_path / kind))
        model = vit.build(cfg, size, 0)
        assert vit.Inputs.of(cfg, model, size).side == side
        assert vit.logits(model, torch.zeros(1, 3, size, size, dtype=torch.uint8), side).shape == (1, 2)


# ---- what is wrong with the data ----

def test_a_synthetic_set_that_was_made_anew_is_not_trained_on_unscreened(make: Setup) -> None:
    cfg, run = make(steps=2, evaluate_every=2, checkpoint_every=2, warmup_steps=0, seeds="[0]")
    classify(cfg, run, World(), "hybrid")
    classify(cfg, run, World(), "hybrid")  # nothing has changed, nothing is said
    manifest = run.dataset(cfg, "synthetic") / "manifest.json"
    write_json(manifest, read_json(manifest) | {"made": "anew"})
    with pytest.raises(UserError, match=r"run-synthetic was made anew after it was screened, .*accepted.json .* delete .*screen/done.json"):
        Data(cfg, run, "hybrid", 0)
    take_as_screened(run, cfg)
    with pytest.raises(UserError, match=r"seed-0 was trained on other images than there are now: delete .*classify/hybrid and launch again"):
        classify(cfg, run, World(), "hybrid")
    shutil.rmtree(run.node("classify/hybrid"))
    classify(cfg, run, World(), "hybrid")
    assert run.metrics("classify/hybrid")["seeds"] == [0]


def other_bytes(found: dict[str, Any]) -> None:
    """As ``prepare`` would leave it that was run again on other pixels of the same names."""
    part = found["shards"][0] if "shards" in found else found
    part["sha256"] = "0" * 64


@pytest.mark.parametrize("kind", ["train", "val", "synthetic"])
def test_a_checkpoint_of_other_pixels_is_not_gone_on_from(make: Setup, kind: str) -> None:
    cfg, run = make(steps=4, evaluate_every=2, checkpoint_every=2, warmup_steps=0, seeds="[0]")
    world, look = World(), Judge.evaluate

    def stop(self: Judge, *arguments: Any, **more: Any) -> None:
        look(self, *arguments, **more)
        world.stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "evaluate", stop)
        with pytest.raises(Stopped):
            classify(cfg, run, world, "hybrid")
    for manifest in (False, True):
        plant(run, cfg, kind, other_bytes, manifest)
    with pytest.raises(UserError, match=r"(?s)made with another configuration or of other images:\n  images_sha256: .* delete .*checkpoints"):
        classify(cfg, run, World(), "hybrid")
    for path in run.node("classify/hybrid").glob("seed-0/checkpoints/*/complete.json"):  # of an earlier version, which did not say
        found = read_json(path)
        del found["identity"]["images_sha256"]
        write_json(path, found)
    classify(cfg, run, World(), "hybrid")
    assert run.metrics("classify/hybrid")["seeds"] == [0]


def test_what_is_missing_is_named(make: Setup) -> None:
    cfg, run = make()
    plant(run, cfg, "train", lambda part: part["columns"]["target"].__setitem__(0, 2))
    with pytest.raises(UserError, match="is of target 2; classify knows 0"):
        Data(cfg, run, "baseline", 0)
    plant(run, cfg, "train", lambda part: part["columns"]["target"].__setitem__(0, 0))
    os.unlink(run.node("screen") / "accepted.json")
    with pytest.raises(UserError, match="were not screened"):
        Data(cfg, run, "hybrid", 0)
    cfg.model.attention = "xformers"
    with pytest.raises(UserError, match="attention=xformers cannot be used on cpu"):
        classify(cfg, run, World(), "baseline")
    cfg.classify.model = "nobody/nothing"
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        vit.build(cfg.classify, 64, 0)
    cfg.classify.model, cfg.classify.patch = "small", 7
    with pytest.raises(UserError, match="patch=7 does not divide the image side of 64"):
        vit.build(cfg.classify, 64, 0)


def test_validation_images_of_one_class_choose_nothing(make: Setup) -> None:
    cfg, run = make()
    parts = run.dataset(cfg, "val") / "parts"
    for path in parts.iterdir():
        part = read_json(path)
        part["columns"]["target"] = [0] * len(part["columns"]["target"])
        write_json(path, part)
    with pytest.raises(UserError, match=r"small-val: all \d+ images are of target 0, and AUROC, .* needs both classes: .*prepare.split.val"):
        classify(cfg, run, World(), "baseline")


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_bad_training_image_stops_or_is_replaced(make: Setup, on_error: str) -> None:
    cfg, run = make()
    folder = run.dataset(cfg, "train")
    os.truncate(folder / "00000.tar", 5000)
    cfg.data.on_error = on_error
    if on_error == "stop":
        with pytest.raises(UserError, match=r"00000.tar is missing or has not the"):
            Data(cfg, run, "baseline", 0)
        return
    data = Data(cfg, run, "baseline", 0)
    assert data.batch(range(len(data.sources["real"])))["images"].shape[1:] == (3, 64, 64)
    bad = data.sources["real"].bad
    assert {error.shard for error in bad} == {"00000.tar"}
    assert len(bad) > 10
    other = Data(cfg, run, "baseline", 0)
    assert torch.equal(other.batch(range(7, 9))["images"], data.batch(range(7, 9))["images"]), "the same whatever was read before"
    os.truncate(run.dataset(cfg, "test") / "00000.tar", 5000)
    with pytest.raises(UserError, match=r"small-test/00000.tar is missing or has not the"):  # what is judged on must be whole
        Data(cfg, run, "baseline", 0)


# ---- training ----

class StopsAt(World):
    """Hears a signal after the ranks have talked so many times."""

    def __init__(self, times: int):
        super().__init__()
        self.left = times

    def max(self, value: int) -> int:
        self.left -= 1
        self.stop = self.left <= 0
        return value


ALL = {"steps": 8, "evaluate_every": 2, "checkpoint_every": 4, "global_batch": 8, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1,
       "balance": "sampling", "layer_decay": 0.7, "ema_decay": 0.9, "patience": 3, "log_every": 1, "lr": 1e-3, "seeds": "[4, 7]",
       "arms.staged.phases": "[{sources: {synthetic: 1}}, {sources: {real: 1}}]"}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl")]


def test_with_everything_on_two_seeds_train_alone_and_a_stop_changes_nothing(make: Setup) -> None:
    cfg, run = make(**ALL)
    arm = run.node("classify/staged")
    classify(cfg, run, World(), "staged", Task(1, 2))
    assert run.unfinished("classify/staged", 2) == [0]
    assert not run.is_done("classify/staged"), "one seed is missing"
    with pytest.raises(Stopped, match=r"at step [567] of 8"):
        classify(cfg, run, StopsAt(7), "staged", Task(0, 2))
    classify(cfg, run, World(), "staged", Task(0, 2))
    assert run.is_done("classify/staged")
    assert run.unfinished("classify/staged", 2) == []
    assert run.metrics("classify/staged")["seeds"] == [4, 7]
    facts = [read_json(arm / f"seed-{seed}/metrics.json") for seed in (4, 7)]
    assert run.metrics("classify/staged")["mean"]["auroc"] == pytest.approx(np.mean([f["auroc"] for f in facts]))
    assert losses(arm / "seed-4") != losses(arm / "seed-7")
    stopped = arm / "stopped"
    os.rename(arm / "seed-4", stopped)
    classify(cfg, run, World(), "staged")  # as by hand: all that is left
    assert losses(arm / "seed-4") == losses(stopped)
    assert (arm / "seed-4/predictions.csv").read_bytes() == (stopped / "predictions.csv").read_bytes()
    assert (arm / "seed-4/epochs.jsonl").read_bytes() == (stopped / "epochs.jsonl").read_bytes()
    before = (arm / "seed-7/metrics.json").stat().st_mtime_ns
    shutil.rmtree(arm / "seed-4")
    assert stages.run_node("classify/staged", str(run.path), Task(0, 2)) == stages.OK
    assert (arm / "seed-7/metrics.json").stat().st_mtime_ns == before


def test_it_stops_early_where_validation_gets_no_better(make: Setup, tmp_path: Path) -> None:
    """With a rate of zero nothing ever gets better: the first evaluation is the best, and two more are waited for."""
    cfg, run = make(steps=12, evaluate_every=2, patience=2, lr=0)
    classify(cfg, run, World(), "baseline")
    facts = read_json(run.node("classify/baseline") / "seed-0/metrics.json")
    assert (facts["chosen_step"], facts["steps"]) == (2, 6)
    assert len(losses(run.node("classify/baseline") / "seed-0")) == 6
    progress = read_json(run.progress_path("classify/baseline", 0))
    assert (progress["done"], progress["total"], progress["finished_of"]) == (6, 6, 1)
    shutil.copytree(run.node("classify/baseline") / "seed-0", tmp_path / "before")
    os.unlink(run.node("classify/baseline") / "seed-0/metrics.json")  # as if it had died before the last write
    classify(cfg, run, World(), "baseline")
    assert read_json(run.node("classify/baseline") / "seed-0/metrics.json") == facts
    for name in ("predictions.csv", "epochs.jsonl", "weights/model.safetensors"):
        assert (run.node("classify/baseline") / "seed-0" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


@pytest.mark.parametrize(("patience", "steps"), [(0, 12), (2, 10)])
def test_only_the_last_phase_is_judged_by(make: Setup, monkeypatch: pytest.MonkeyPatch, patience: int, steps: int) -> None:
    """The best of all, after the first phase's last step, has seen no real image: it is no weights of this arm, and nothing waits from there."""
    cfg, run = make(steps=12, evaluate_every=1, checkpoint_every=1, patience=patience)
    cfg.classify.arms = {"staged": Arm(phases=[Phase({"synthetic": 1}, 6), Phase({"real": 1}, 6)])}
    assert Data(cfg, run, "staged", 0).phases[-1].begin == 6 * cfg.classify.global_batch
    figures, step = Judge._metrics, iter(range(1, 99))

    def planted(self: Judge, name: str, scores: np.ndarray) -> dict[str, Any]:
        return figures(self, name, scores) | ({"auroc": {6: 1.0, 8: 0.9}.get(next(step), 0.5)} if name == "val" else {})

    monkeypatch.setattr(Judge, "_metrics", planted)
    classify(cfg, run, World(), "staged")
    facts = read_json(run.node("classify/staged") / "seed-0/metrics.json")
    assert (facts["chosen_step"], facts["chosen_by"]["value"], facts["steps"]) == (8, 0.9, steps)


def test_the_best_weights_do_not_pile_up(make: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that gets better each time keeps what the checkpoints need, from which a restart finds its own best."""
    cfg, run = make(steps=24, evaluate_every=1, checkpoint_every=2, keep=1, keep_every=8)
    folder, figures, world, at, seen = run.node("classify/baseline") / "seed-0", Judge._metrics, World(), [0], []

    def planted(self: Judge, name: str, scores: np.ndarray) -> dict[str, Any]:
        if name == "val":
            at[0] += 1
            world.stop = at[0] == 21
            seen.append({int(path.name[5:]) for path in folder.glob("best-*")})
        return figures(self, name, scores) | ({"auroc": at[0] / 100} if name == "val" else {})

    monkeypatch.setattr(Judge, "_metrics", planted)
    with pytest.raises(Stopped, match="at step 21 "):
        classify(cfg, run, world, "baseline")
    assert max(map(len, seen)) <= 7, "of two that are kept for good, the newest and the one on its way, and what came between"
    assert {8, 16} <= seen[-1]
    newest = max((folder / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.copytree(folder, run.path / "before")
    at[0] = 16
    classify(cfg, run, World(), "baseline")
    assert read_json(folder / "metrics.json")["chosen_step"] == 24
    shutil.rmtree(folder)
    os.rename(run.path / "before", folder)
    at[0] = -9
    classify(cfg, run, World(), "baseline")
    assert read_json(folder / "metrics.json")["chosen_step"] == 16, "that of the checkpoint which was gone on from"


def test_the_seeds_of_an_arm_are_tasks_and_by_hand_a_seed_is_named(make: Setup) -> None:
    import argparse

    from skinsynth.chain import chain as nodes

    cfg, run = make(seeds="[3, 5, 8]")
    assert {n.name: n.tasks(cfg) for n in nodes(cfg)}["classify/hybrid"] == 3
    parser = argparse.ArgumentParser()
    for seed, task in ((5, Task(1, 3)), (None, Task(2, 3))):
        assert stages._arms_task(parser, argparse.Namespace(run=str(run.path), arm="hybrid", seed=seed), Task(2, 3)) == task


def test_views_are_averaged(make: Setup) -> None:
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    found = vit.views(images, 8)
    assert len({view[0].numpy().tobytes() for view in found}) == 8
    assert all(view.sum() == images.sum() for view in found)
    cfg, run = make(steps=2, tta=8)
    classify(cfg, run, World(), "baseline")
    folder = run.node("classify/baseline") / "seed-0"
    from transformers import AutoModelForImageClassification

    model, test = AutoModelForImageClassification.from_pretrained(folder / "weights").eval(), Dataset.open(run.dataset(cfg, "test"))
    one = torch.from_numpy(test.image(0).transpose(2, 0, 1).copy())[None]
    with torch.inference_mode():
        expected = np.mean([float(vit.logits(model, view, 64).softmax(1)[0, 1]) for view in vit.views(one, 8)])
    assert score(folder)[0] == pytest.approx(expected, abs=2e-6)
