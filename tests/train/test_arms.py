"""An arm on two ranks beside one, at several ZeRO stages, going on from each other's checkpoints; and the kinds of models that may be trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import overrides
from test_matrix import on_two_ranks

from skinsynth import config
from skinsynth.data.decoded import Decoded
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Classify
from skinsynth.models import vit
from skinsynth.run import RunDir
from skinsynth.stages.classify import classify
from skinsynth.train.engine import Engine
from skinsynth.train.log import read_lines
from skinsynth.world import World

Maker = Callable[..., RunDir]
ALL = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 3, "global_batch": 8, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "lr": 1e-3,
       "balance": "weights", "layer_decay": 0.7, "ema_decay": 0.9, "log_every": 1, "seeds": "[4]"}


@pytest.fixture
def maker(chain: Path, drawn: Path, tmp_path: Path) -> Maker:
    """``make(name, **classify keys)``: run folders that share the datasets and the screening of the shared chain."""
    shutil.copytree(chain / "shards", tmp_path / "shards")

    def make(name: str, **keys: object) -> RunDir:
        folder = tmp_path / name
        more = {"data.shards": tmp_path / "shards", **{f"classify.{k}": v for k, v in {**ALL, **keys}.items()}}
        run = RunDir(folder / "run")
        run.create(config.load("configs/demo.yaml", overrides(drawn, folder, **more)))
        shutil.copytree(chain / "run/screen", run.node("screen"))
        return run

    return make


def seed(run: RunDir) -> Path:
    return run.node("classify/hybrid") / f"seed-{run.config().arm_seeds[0]}"


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_lines(seed(run) / "metrics.jsonl")]


def test_one_rank_and_two_at_any_zero_stage_give_the_same(maker: Maker, tmp_path: Path) -> None:
    """Within float32, since a batch of 4 is multiplied otherwise than one of 8. The last one goes on from what one rank saved."""
    one = maker("one")
    classify(one.config(), one, World(), "hybrid")
    two = [maker("zero-0", zero=0), maker("zero-2", zero=2, seeds="[4, 5]")]  # one seed after the other in the same gang
    reduced = maker("reduced", zero=2, precision="bf16")
    half = maker("half", zero=3)
    step = seed(one) / "checkpoints/step-00000003"
    shutil.copytree(step, seed(half) / "checkpoints" / step.name)
    for name in ("metrics.jsonl", "epochs.jsonl"):
        (seed(half) / name).write_text("".join((seed(one) / name).read_text().splitlines(True)[:3 if name[0] == "m" else 1]))
    shutil.copytree(seed(one) / "weights", seed(half) / "best-00000003")  # should that one be the best
    on_two_ranks([*two, half, reduced], tmp_path, arm="hybrid")
    assert two[1].metrics("classify/hybrid")["seeds"] == [4, 5]
    assert losses(reduced) == pytest.approx(losses(one), rel=0.05)
    assert losses(reduced) != pytest.approx(losses(one), rel=1e-5)
    facts = read_json(seed(one) / "metrics.json")
    for run in (*two, half):
        assert losses(run) == pytest.approx(losses(one), rel=2e-4), run.path
        found = read_json(seed(run) / "metrics.json")
        assert {k: found[k] for k in ("steps", "train_samples", "seed")} == {k: facts[k] for k in ("steps", "train_samples", "seed")}
        assert [row["val"]["loss"] for row in read_lines(seed(run) / "epochs.jsonl")] == pytest.approx(
            [row["val"]["loss"] for row in read_lines(seed(one) / "epochs.jsonl")], rel=1e-3)
        assert run.done_path("classify/hybrid").is_file()


# ---- any image classifier of transformers ----

def tiny(kind: str) -> Any:
    import transformers as t

    plain = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return {"vit": lambda: t.ViTForImageClassification(t.ViTConfig(**plain, num_labels=5)),
            "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**plain)),
            "swin": lambda: t.SwinForImageClassification(t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                                                                      window_size=4)),
            "convnext": lambda: t.ConvNextForImageClassification(t.ConvNextConfig(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
            "resnet": lambda: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))}[kind]()


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "convnext"])
def test_any_classifier_from_a_folder(maker: Maker, tmp_path: Path, kind: str) -> None:
    """Two steps and one more with another seed; the export is loaded by plain transformers and gives the predictions."""
    from transformers import AutoModelForImageClassification

    tiny(kind).save_pretrained(tmp_path / kind)
    (tmp_path / kind / "preprocessor_config.json").write_text('{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.3, 0.4]}')
    run = maker("run", model=tmp_path / kind, steps=2, evaluate_every=2, seeds="[0]")
    cfg = run.config()
    classify(cfg, run, World(), "hybrid")
    model = AutoModelForImageClassification.from_pretrained(seed(run) / "weights").eval()
    assert (model.config.model_type, model.config.num_labels) == (kind, 2)
    inputs = vit.Inputs.of(cfg.classify, model, 64)
    assert inputs == vit.Inputs(32, (0.485, 0.456, 0.406), (0.2, 0.3, 0.4))
    from skinsynth.data.dataset import Dataset

    test = Dataset.open(run.dataset(cfg, "test"))
    image = torch.from_numpy(Decoded(64, 32, 0).read(test, 0).transpose(2, 0, 1).copy())[None]
    with torch.inference_mode():
        again = float(vit.logits(model, image, inputs.side, inputs.mean, inputs.std).softmax(1)[0, 1])
    written = (seed(run) / "predictions.csv").read_text().splitlines()[1].split(",")
    assert float(written[3]) == pytest.approx(again, abs=1e-4)
    reread = vit.Inputs.of(Classify(model=str(seed(run) / "weights")), model, 64)
    assert reread == inputs, "the export says how its images are normalised"


def test_what_depends_on_the_ranks_is_refused_or_off(tmp_path: Path) -> None:
    tiny("resnet").save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="batch normalization"):
        vit.build(Classify(model=str(tmp_path / "resnet")), 64, 0)
    tiny("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="takes images of 32 pixels"):
        vit.build(Classify(model=str(tmp_path / "vit"), image_size=64), 64, 0)
    tiny("swin").save_pretrained(tmp_path / "swin")
    assert tiny("swin").config.drop_path_rate > 0
    model = vit.build(Classify(model=str(tmp_path / "swin")), 64, 0).train()
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(vit.logits(model, images, 32), vit.logits(model, images, 32))


def test_normalising_is_the_processors_own() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), np.uint8))
    seen: list[torch.Tensor] = []

    class Sees(torch.nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:  # type: ignore[override]
            seen.append(pixel_values)
            return type("Out", (), {"logits": pixel_values})

    for mean, std in (((0.5,) * 3, (0.5,) * 3), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.5,) * 3, (0.5, 0.5, 0.25))):
        vit.logits(Sees(1, 1), images, 4, mean, std)
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        assert torch.allclose(seen.pop(), (images.float() / 255 - shift) / scale, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
def test_lower_layers_get_lower_rates(kind: str) -> None:
    model = tiny(kind)
    scales = vit.rate_scales(model, 0.5)
    names = [name for name, _ in model.named_parameters()]
    assert scales.keys() == set(names)
    assert all(scales[name] == 1 for name in names if name.startswith("classifier"))
    embedding, first, last = (next(scales[n] for n in order if word in n) for order, word in (
        (names, "embeddings"), (names, {"vit": "layers.0", "swin": "layers.0", "convnext": "stages.0"}[kind]),
        (names[::-1], {"vit": "layers.1", "swin": "layers.1", "convnext": "stages.1"}[kind])))
    assert embedding < first < last == 0.5
    engine = Engine(Classify(steps=2, global_batch=2, zero=0, weight_decay=0.0), World(), model, "it", None, scales)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.step(1e-4, 0, [{"images": torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)}],
                lambda m, batch: vit.logits(m, batch["images"], 32)[:, 0].square().sum())
    rates = {id(p): group["lr"] for group in engine.adam.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in engine.trained.items()} == pytest.approx({name: 1e-4 * scale for name, scale in scales.items()})
    for name, p in engine.trained.items():  # AdamW's first step is the rate itself where the gradient is not tiny
        assert float((p.detach() - before[name]).abs().max()) <= 1e-4 * scales[name] * 1.01, name
    assert float((engine.trained["classifier.bias"].detach() - before["classifier.bias"]).abs().max()) == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize(("kind", "knobs", "beside"), [
    ("Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 2], "window_size": 4},
     {"swin.encoder.layers.0.downsample.reduction.weight": 2}),
    ("Swinv2", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 2], "window_size": 4},
     {"swinv2.encoder.layers.0.downsample.reduction.weight": 2,
      "swinv2.encoder.layers.1.blocks.0.attention.self.continuous_position_bias_mlp.2.weight": 3}),
    ("ConvNext", {"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2},
     {"convnext.encoder.stages.1.downsampling_layer.0.weight": 3, "convnext.encoder.stages.1.downsampling_layer.1.bias": 3}),
    ("CLIP", {"vision_config": {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}},
     {"vision_model.post_layernorm.weight": 6}),
    ("Siglip", {"vision_config": {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}},
     {"vision_model.head.probe": 6})])
def test_each_block_has_a_rate_of_its_own_and_nothing_else_has(kind: str, knobs: dict[str, Any], beside: dict[str, int]) -> None:
    """As BEiT's scripts number the blocks of Swin and ConvNeXt: five here, what lies between two stages with one of them (``beside``)."""
    import transformers as t

    model = getattr(t, f"{kind}ForImageClassification")(getattr(t, f"{kind}Config")(**knobs))
    scales = vit.rate_scales(model, 0.5)
    assert sorted(set(scales.values())) == [0.5**depth for depth in range(6, -1, -1)]
    assert {name: 6 + round(np.log2(scales[name])) for name in beside} == beside
    assert {scales[name] for name in scales if "patch_embedding" in name} == {0.5**6}
    assert {scales[name] for name in scales if name.startswith("classifier")} == {1.0}


def test_where_no_block_is_known_layer_decay_is_refused() -> None:
    model = torch.nn.ModuleDict({"embeddings": torch.nn.Linear(1, 1), "classifier": torch.nn.Linear(1, 1)})
    model.config = SimpleNamespace(model_type="odd")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"classify\.layer_decay=0\.5: odd has no layers, blocks or stages by name: leave it out"):
        vit.rate_scales(model, 0.5)
