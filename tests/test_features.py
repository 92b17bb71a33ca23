"""features: any transformers vision model by its folder, with its own processing; what may run code or is not whole is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skinsynth.chain import chain
from skinsynth.errors import UserError
from skinsynth.knobs import Arm, Classify, Config, Screen
from skinsynth.models import hub, vit
from skinsynth.quality import features
from skinsynth.run import RunDir

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 7}
PROCESSOR = {"do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True, "crop_size": {"height": 28, "width": 28},
             "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)


def save(model: Any, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor or PROCESSOR))
    return folder


def network(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "clip":
        vision = transformers.CLIPVisionConfig(**SMALL)
        text = transformers.CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100)
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    if kind == "convnext":
        return transformers.ConvNextModel(transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]))
    configs = {"dinov2": "Dinov2", "vit": "ViT"}
    return getattr(transformers, f"{configs[kind]}Model")(getattr(transformers, f"{configs[kind]}Config")(**SMALL))


def extractor(folder: Path, batch: int = 4) -> features.Extractor:
    return features.make(Config(screen=Screen(features=str(folder), batch=batch)), RunDir(folder.parent))


def by_hand(model: Any, kind: str) -> torch.Tensor:
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 2:30, 2:30]
    pixels = (pixels - torch.tensor(PROCESSOR["image_mean"]).view(3, 1, 1)) / torch.tensor(PROCESSOR["image_std"]).view(3, 1, 1)
    with torch.inference_mode():
        found = (model.vision_model if kind == "clip" else model).eval()(pixel_values=pixels)
    return found.pooler_output if kind in ("clip", "convnext") else found.last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip", "convnext"])
def test_any_vision_model_by_its_folder(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    found = extractor(save(model, tmp_path / kind))(IMAGES)
    assert found.shape == (5, 16)
    assert found.dtype == np.float32
    assert np.allclose(found, by_hand(model, kind).flatten(1).numpy(), atol=1e-4)
    assert len(np.unique(found.round(4), axis=0)) == 5
    assert np.array_equal(found[3:], extractor(tmp_path / kind)(IMAGES[3:])), "features hang on their neighbours"


def test_a_hub_id_is_taken_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(screen=Screen(features="owner/no-such-model"))
    with pytest.raises(UserError, match=r"screen.features=owner/no-such-model is neither a folder here nor .* cache"):
        features.make(cfg, RunDir(tmp_path))
    assert features.space_name(cfg) == "no-such-model"


def test_processing_is_read_from_the_models_own_file(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 224, "resample": 2}))
    assert features.Processing.read(path) == features.Processing(224, 224)
    path.write_text(json.dumps({"size": {"height": 96, "width": 96}, "do_normalize": False}))
    assert features.Processing.read(path) == features.Processing(96, 96, (0, 0, 0), (1, 1, 1))
    path.write_text(json.dumps({"do_resize": False}))
    with pytest.raises(UserError, match="gives no size that is known"):
        features.Processing.read(path)


@pytest.mark.parametrize("found", [
    {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 28, "crop_pct": 0.875},  # as the hub's are written
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 30}, "crop_pct": 0.95},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.875},
    {"image_processor_type": "PoolFormerImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.9, "do_center_crop": True,
     "crop_size": {"height": 28, "width": 28}}, PROCESSOR | {"image_processor_type": "CLIPImageProcessor"}], ids=str)
def test_processing_is_that_of_transformers(found: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"resample": 3, "image_mean": PROCESSOR["image_mean"],
                                                                   "image_std": PROCESSOR["image_std"], **found}))
    images = IMAGES // 2 + 64  # bicubic overshoots the scale's ends otherwise, which PIL cuts after each of its two passes
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    mine = features.Processing.read(tmp_path / "preprocessor_config.json")(pixels.float() / 255)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(list(images), return_tensors="pt")["pixel_values"]
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < 0.04, "but for the rounding to whole grey levels, which is done twice"


def test_what_is_not_whole_or_not_of_images_is_refused(tmp_path: Path) -> None:
    folder = save(network("vit"), tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"not complete: missing preprocessor_config.json"):
        extractor(folder)
    from safetensors.torch import load_file, save_file

    folder = save(network("vit"), tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "layernorm_before" not in name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        extractor(folder)
    from transformers import BertConfig, BertModel

    words = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    with pytest.raises(UserError, match="no model of images"):
        extractor(save(BertModel(words), tmp_path / "bert"))
    with pytest.raises(UserError, match="no such folder"):
        extractor(tmp_path / "nowhere")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.where,)

    def __init__(self, where: str):
        self.where = where


def test_pickles_are_never_read(tmp_path: Path) -> None:
    inception = tmp_path / "inception.pt"
    torch.save(Evil(str(tmp_path / "ran")), inception)
    with pytest.raises(UserError, match="pickles and TorchScript may run any code"):
        extractor(inception)
    folder = save(network("vit"), tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    torch.save(Evil(str(tmp_path / "ran")), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"missing \*.safetensors"):
        extractor(folder)
    assert not (tmp_path / "ran").exists()


def test_the_runs_own_classifier_gives_its_class_token_with_its_own_scaling(tmp_path: Path) -> None:
    arms = {"both": Arm({"real": 1, "synthetic": 1}), "baseline": Arm({"real": 1, "synthetic": 0})}
    small = Classify(model="small", hidden_size=16, layers=2, heads=2, patch=8, arms=arms)
    cfg = Config(screen=Screen(features="classifier", batch=4), classify=small)
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"classify/baseline/seed-0/weights is not there yet; train that arm first \(python -m jobs.classify"):
        features.make(cfg, run)
    model = vit.build(cfg.classify, 32, 0)
    model.save_pretrained(run.node("classify/baseline") / "seed-0/weights")
    found = features.make(cfg, run)(IMAGES)
    with torch.inference_mode():
        pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
        logits = vit.logits(model.eval(), pixels, 32)
        assert torch.allclose(model.classifier(torch.from_numpy(found)), logits, atol=1e-4)
    order = [node.name for node in chain(cfg)]
    assert order.index("classify/baseline") < order.index("screen") < order.index("classify/both")
    assert len(set(order)) == len(order)
    assert "classify/baseline" in next(node.needs for node in chain(cfg) if node.name == "screen")
    del cfg.classify.arms["baseline"]
    with pytest.raises(UserError, match="needs an arm of real images only"):
        features.make(cfg, run)


def test_the_runs_own_classifier_is_shown_what_it_was_trained_on(tmp_path: Path) -> None:
    """Its mean and deviation stand beside its weights; and other weights, or another mean, are another network."""
    cfg = Config(screen=Screen(features="classifier", batch=4), classify=Classify(arms={"baseline": Arm({"real": 1})}))
    run = RunDir(tmp_path / "run")
    folder = run.node("classify/baseline") / "seed-0/weights"
    model = vit.build(Classify(model="small", hidden_size=16, layers=1, heads=2, patch=8), 32, 0)
    model.save_pretrained(folder)
    inputs, hashes = vit.Inputs(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), {features.network_sha256(cfg, run)}
    inputs.write(folder)
    found = torch.from_numpy(features.make(cfg, run)(IMAGES))
    with torch.inference_mode():
        logits = vit.logits(model.eval(), torch.from_numpy(IMAGES).permute(0, 3, 1, 2), inputs.side, inputs.mean, inputs.std)
        assert torch.allclose(model.classifier(found), logits, atol=1e-4)
    hashes.add(features.network_sha256(cfg, run))
    vit.build(Classify(model="small", hidden_size=16, layers=1, heads=2, patch=8), 32, 1).save_pretrained(folder)
    assert len({*hashes, features.network_sha256(cfg, run)}) == 3


def test_pull_fetches_it_like_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    folder = save(network("vit"), tmp_path / "vit")
    cfg = Config(screen=Screen(features=str(folder)), classify=Classify(model="small"))
    hub.pull(cfg, said.append)
    assert any(line.startswith(f"screen.features={folder}: here already") for line in said)
