"""encode: the VAE's posterior of the chosen training images, and the embeddings of all prompts, made once.

Fine-tuning then runs neither the VAE nor the text encoder. Mean and standard deviation are kept, not one draw from
them, so that training on the cache is the same mathematics as encoding in each step.
"""

from __future__ import annotations

import numpy as np
from safetensors.torch import save

from skinsynth.config import Config
from skinsynth.data import concepts
from skinsynth.data.shards import Dataset, ShardWriter, claim, missing_parts, to_npy, write_manifest
from skinsynth.models import diffusion
from skinsynth.run import Progress, RunDir, Task, sha256_file, write_bytes, write_json
from skinsynth.world import World


def encode(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``<run>-latents``: one sample per chosen image, ``moments.npy`` float32 (variants, 2, channels, h, w), variants being
    the image and, with ``encode.flip``, its mirror image; and ``encode/prompts.safetensors``, what ``diffusion.encode_prompts`` gives.

    Units are the shards of the training split.

    Raises:
        UserError: base model incomplete or of another image size, a concept without images.
    """
    train = Dataset.open(run.dataset(cfg, "train"))
    pipe = diffusion.load_base(cfg.model).to(World().device)
    diffusion.latent_shape(pipe, cfg.prepare.size)
    wanted = sorted({i for source in concepts.sources(cfg, train) for i in source.samples})
    folder, units = run.dataset(cfg, "latents"), len(train.manifest["shards"])
    base_sha256 = diffusion.base_sha256(cfg.model)
    claim(folder, {"base_sha256": base_sha256, "train_sha256": sha256_file(train.folder / "manifest.json"), "flip": cfg.encode.flip,
                   "batch": cfg.encode.batch, "samples": [train.keys[i] for i in wanted]})
    mine = {unit: sorted(set(train.shard_samples(unit)) & set(wanted)) for unit in task.mine(missing_parts(folder, units))}
    progress = Progress(run, "encode", task.index, sum(len(samples) for samples in mine.values()), "images")
    for unit, samples in mine.items():
        with ShardWriter(folder, unit) as shard:
            for batch, count in diffusion.padded(samples, cfg.encode.batch):
                moments = _moments(pipe.vae, np.stack([train.image(i) for i in batch]), cfg.encode.flip)
                for i, values in zip(batch[:count], moments[:count], strict=True):
                    shard.add(train.keys[i], {"moments.npy": to_npy(values)})
                progress.advance(count)
    if not missing_parts(folder, units):
        _finish(cfg, run, pipe, units, base_sha256)


def _moments(vae: object, images: np.ndarray, flip: bool) -> np.ndarray:
    """float32 (n, variants, 2, channels, h, w)."""
    variants = [images, images[:, :, ::-1].copy()] if flip else [images]
    return np.stack([diffusion.encode_images(vae, v) for v in variants], 1)


def _finish(cfg: Config, run: RunDir, pipe: object, units: int, base_sha256: str) -> None:
    folder, texts = run.dataset(cfg, "latents"), concepts.prompts(cfg)
    embeddings = run.node("encode") / "prompts.safetensors"
    write_bytes(embeddings, save(diffusion.encode_prompts(pipe, texts, cfg.prepare.size)))
    write_json(run.node("encode") / "prompts.json", texts)
    manifest = write_manifest(folder, units, kind="latents", base=cfg.model.base, base_sha256=base_sha256, flip=cfg.encode.flip)
    run.finish("encode", {"images": manifest["count"], "prompts": len(texts)}, [folder / "manifest.json", embeddings])
