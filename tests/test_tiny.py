"""The built-in base model as it is shipped, and the training that made it."""
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from skinsynth.models.tiny import WEIGHTS
from skinsynth.models.tiny import train as training
from skinsynth.models.tiny.networks import save_half
from skinsynth.models.tiny.pictures import augment, drawings, to_tensor
from skinsynth.models.tiny.tokenizer import build_tokenizer

PROMPTS = ["a dermoscopy image of a skin lesion"] * 4 + [
    "a dermoscopy image of a large dark brown skin lesion with irregular border and asymmetric shape on light skin"] * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain little from a second thread, and on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, prompts: list[str], seed: int, guidance: float = 2.5) -> np.ndarray:
    """(n, 64, 64, 3) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompts, num_inference_steps=12, guidance_scale=guidance, generator=generator, output_type="np").images


# --- as shipped

def test_weights_are_small_and_half_precision() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in tensors} == {"unet", "vae", "text_encoder"}
    for path in tensors:
        with safe_open(path, "pt") as content:
            assert {content.get_slice(key).get_dtype() for key in content.keys()} == {"F16"}  # noqa: SIM118
            assert all(torch.isfinite(content.get_tensor(key)).all() for key in content.keys())  # noqa: SIM118
    assert not [path for path in files if path.suffix not in (".safetensors", ".json", ".txt")]  # nothing pickled


def test_shipped_folder_is_a_stable_diffusion(pipe: StableDiffusionPipeline) -> None:
    assert pipe.safety_checker is None
    assert pipe.vae_scale_factor == 4
    assert (pipe.unet.config.sample_size, pipe.unet.config.in_channels) == (16, 4)
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    ddpm = DDPMScheduler.from_config(pipe.scheduler.config)
    assert (ddpm.config.prediction_type, ddpm.config.num_train_timesteps) == ("epsilon", 1000)
    assert (ddpm.config.beta_schedule, ddpm.config.beta_start, ddpm.config.beta_end) == ("scaled_linear", 0.00085, 0.012)


def test_it_draws_lesions(pipe: StableDiffusionPipeline) -> None:
    images = sample(pipe, PROMPTS, seed=1)
    assert images.shape == (8, 64, 64, 3)
    grey = images.mean(3)
    rim = np.concatenate([grey[:, :5].reshape(8, -1), grey[:, -5:].reshape(8, -1)], 1)
    darker = np.median(rim, 1) - np.median(grey[:, 22:42, 22:42].reshape(8, -1), 1)
    assert (darker > 0.08).sum() >= 6
    assert np.median(darker) > 0.12
    assert np.median(images[..., 0] - images[..., 2]) > 0.03  # skin and pigment are redder than blue
    assert grey.std((1, 2)).min() > 0.02  # none is blank
    assert np.abs(grey[0] - grey[1]).mean() > 0.02  # another noise, another picture


def test_the_prompt_matters(pipe: StableDiffusionPipeline) -> None:
    def brightness(words: str) -> float:
        return float(sample(pipe, [f"a dermoscopy image of a {words} skin"] * 6, seed=3, guidance=3.0).mean())
    bright = brightness("small tan skin lesion with regular border on very light")
    assert bright > brightness("large black skin lesion with irregular border on dark") + 0.07


def test_the_autoencoder_keeps_pictures(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    x = to_tensor(drawings(8, 123, tmp_path)[0])
    with torch.no_grad():
        latent = pipe.vae.encode(x).latent_dist.mode()
        y = pipe.vae.decode(latent).sample.clamp(-1, 1)
    psnr = -10 * math.log10(((x - y) / 2).square().mean())
    assert psnr > 26
    assert (latent * pipe.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.3)


def test_tokenizer_round_trip(pipe: StableDiffusionPipeline) -> None:
    tokenizer = pipe.tokenizer
    text = "a dermoscopy image of a sks melanoma on the lower extremity"
    ids = tokenizer(text, padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for word in ("melanoma", "nevus", "benign", "malignant", "sks", "seborrheic", "keratosis"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    strange = tokenizer("zébra 漢字 ~", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in strange
    assert len(strange) > 6


def test_vocab_and_merges_are_the_same_tokenizer(pipe: StableDiffusionPipeline) -> None:
    folder = WEIGHTS / "tokenizer"
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    other = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text(encoding="utf-8")), merges=merges)
    for text in (PROMPTS[-1], "Seborrheic keratosis, a 55 year old male's back!", "unheard-of wörds"):
        assert other(text).input_ids == pipe.tokenizer(text).input_ids


# --- the training

@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., training.Options]:
    """Of a training that takes seconds instead of an hour."""
    monkeypatch.setattr(training, "sample_sheet", lambda *_: None)
    small = {"drawings": 6, "vae_steps": 2, "vae_batch": 2, "unet_steps": 3, "unet_batch": 2, "minutes": 60}
    return lambda name, **more: training.Options(**{"out": tmp_path / name, **small, **more})


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved pipeline."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as content:
            found |= {f"{path.parent.name}.{key}": content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    return found


def test_a_killed_training_goes_on_to_the_same_weights(
        options: Callable[..., training.Options], monkeypatch: pytest.MonkeyPatch) -> None:
    training.train(options("whole"))
    steps, decode = [], training.AutoencoderKL.decode

    def dies(self: nn.Module, *arguments: object, **more: object) -> object:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return decode(self, *arguments, **more)
    monkeypatch.setattr(training.AutoencoderKL, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train(options("cut", minutes=0))
    assert torch.load(options("cut").out / ".cache" / "vae.pt", weights_only=True)["step"] == 1
    assert not (options("cut").out / "model_index.json").exists()
    follow, calls = training._follow, []

    def dies_later(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 3:  # after one step of the autoencoder, and in the second of the UNet
            raise KeyboardInterrupt
        follow(*arguments)
    monkeypatch.setattr(training, "_follow", dies_later)
    with pytest.raises(KeyboardInterrupt):
        training.train(options("cut", minutes=0))
    assert (options("cut").out / "model_index.json").exists()  # an interim model, whole
    monkeypatch.setattr(training, "_follow", follow)
    training.train(options("cut"))
    whole, cut = state(options("whole").out), state(options("cut").out)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    again = training.train(options("cut"))  # done already: loads, and makes no step
    assert torch.equal(again.unet.conv_in.weight.half(), whole["unet.conv_in.weight"])
    config = json.loads((options("whole").out / "vae" / "config.json").read_text())
    assert again.vae.config.scaling_factor == config["scaling_factor"]


def test_fit_learns_and_ends_with_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(4, 1), torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    seen: list[Tensor] = []

    def loss(step: int) -> Tensor:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x @ target.T).square().mean()
    first = loss(0).item()
    training.fit("line", model, loss, 300, 0.1, 0.0, tmp_path / "line.pt", lambda: seen.append(model.weight.detach().clone()))
    assert loss(0).item() < first / 1000
    assert len(seen) == 300
    assert torch.equal(seen[-1], model.weight)
    assert not model.weight.requires_grad


def test_learning_rate_rises_then_falls() -> None:
    rates = [training.learning_rate(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 1e-3


def test_augmentation_varies_but_stays_in_range(tmp_path: Path) -> None:
    x = to_tensor(drawings(4, 0, tmp_path)[0])
    generator = torch.Generator().manual_seed(0)
    views = [augment(x, generator) for _ in range(8)]
    assert all(view.shape == x.shape and view.abs().max() <= 1 for view in views)
    assert len({round(view.mean().item(), 4) for view in views}) == 8
    assert torch.equal(views[0], augment(x, torch.Generator().manual_seed(0)))


def test_drawings_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, captions = drawings(5, 7, tmp_path)
    monkeypatch.setattr("skinsynth.models.tiny.pictures.draw", lambda *_: pytest.fail("drew again"))
    again, words = drawings(5, 7, tmp_path)
    assert np.array_equal(images, again)
    assert captions == words
    assert images.shape == (5, 64, 64, 3)


def test_sample_sheet_and_half_precision_copy(tmp_path: Path, pipe: StableDiffusionPipeline) -> None:
    training.sample_sheet(pipe, PROMPTS[:3], tmp_path / "a" / "sheet.png", 0, columns=2)
    from PIL import Image
    assert Image.open(tmp_path / "a" / "sheet.png").size == (128, 128)
    save_half(pipe, tmp_path / "copy")
    shipped, copied = state(WEIGHTS), state(tmp_path / "copy")
    assert shipped.keys() == copied.keys()
    assert all(torch.equal(shipped[key], copied[key]) for key in shipped)
    assert pipe.unet.dtype == torch.float32
    assert not list((tmp_path / "copy").glob(".part-*"))


def test_tokenizer_learns_its_corpus() -> None:
    tokenizer = build_tokenizer(["quixotic lesions"] * 50, vocabulary=900)
    assert len(tokenizer) <= 900
    assert len(tokenizer("quixotic", add_special_tokens=False).input_ids) == 1
