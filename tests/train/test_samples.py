"""What a sample of fine-tuning counts, and how often its prompt is left out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import Setup, plant
from diffusers import DDPMScheduler

from skinsynth.knobs import Concept, Config, Images
from skinsynth.models import diffusion
from skinsynth.train.samples import Samples


def samples(cfg: Config, run: object) -> Samples:
    return Samples(cfg, run, diffusion.load_base(cfg.model), diffusion.base_sha256(cfg.model))  # type: ignore[arg-type]


def test_the_prior_loss_is_a_mean_of_its_own_times_its_weight(make: Setup) -> None:
    """Ruiz et al. 2023: the mean over instance images plus ``prior_weight`` times that over class images."""
    cfg, run = make()
    cfg.finetune.prior_weight = 0.3
    found = samples(cfg, run)
    batch = found.batch(range(16))
    prior = np.array([found.sources[found.mixture.at(position)[0]].prior for position in range(16)])
    assert prior.sum() == 8
    noise = batch["noise"].numpy()
    error = (noise**2).mean(axis=(1, 2, 3))  # of a model that predicts nothing
    loss = diffusion.diffusion_loss(lambda noisy, timestep, batch: torch.zeros_like(noisy), DDPMScheduler(), batch)
    assert float(loss) == pytest.approx(error[~prior].mean() + 0.3 * error[prior].mean(), rel=1e-5)


def test_a_concept_without_class_images_is_drawn_as_often_as_one_with_them(make: Setup) -> None:
    cfg, run = make()
    with_prior, without = list(cfg.finetune.concepts)
    cfg.finetune.concepts[without] = Concept(cfg.finetune.concepts[without].instance_prompt, "", cfg.finetune.concepts[without].instance, Images())
    found = samples(cfg, run)
    places = [found.sources[found.mixture.at(position)[0]] for position in range(400)]
    assert Counter((source.name, source.prior) for source in places) == {(with_prior, False): 100, (with_prior, True): 100, (without, False): 200}
    weights = {(source.name, source.prior): float(weight) for source, weight in zip(places, found.batch(range(400))["weight"], strict=True)}
    assert weights == {(with_prior, False): 2.0, (with_prior, True): 2.0, (without, False): 1.0}
    assert sum(source.share for source in found.sources) == len(cfg.finetune.concepts)


def test_prompts_are_left_out_as_often_as_asked_for(make: Setup) -> None:
    cfg, run = make()
    cfg.finetune.caption_dropout = 0.25
    found = samples(cfg, run)
    empty = torch.from_numpy(found.prompts.values["text"][found.prompts.rows[""]])
    left_out = [bool(torch.equal(text, empty)) for text in found.batch(range(800))["text"]]
    assert 0.2 < np.mean(left_out) < 0.3
    cfg.finetune.caption_dropout = 0.0
    assert not any(torch.equal(text, empty) for text in samples(cfg, run).batch(range(100))["text"])


def test_the_same_names_with_other_pixels_or_views_are_other_images(make: Setup) -> None:
    cfg, run = make()
    found = samples(cfg, run)
    names, images = found.sha256(), found.images_sha256()
    for manifest in (False, True):
        plant(run, cfg, "train", lambda found: (found["shards"][0] if "shards" in found else found).update(sha256="0" * 64), manifest)
    after = samples(cfg, run)
    assert after.sha256() == names
    others = after.images_sha256()
    cfg.encode.crops += 1
    assert len({images, others, after.images_sha256()}) == 3


def test_without_a_cache_a_batch_of_large_images_goes_through_the_vae_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in encode: one activation of 16 images of 512 px is 2 GB. What is drawn is the same."""
    vae = diffusion.load_vae(Config().model)
    seen: list[int] = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8))
    draw = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 4, 16, 16), np.float32))
    whole = diffusion.draw_latents(vae, pixels, draw)
    monkeypatch.setattr(diffusion, "at_once", lambda height, width: 4)
    parts = diffusion.draw_latents(vae, pixels, draw)
    assert seen == [6, 4, 2]
    assert torch.allclose(whole, parts, atol=1e-5)
