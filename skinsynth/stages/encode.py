"""encode: the VAE's posterior of the chosen training images, and the embeddings of their prompts, made once.

Fine-tuning then runs neither the VAE nor the text encoder. Mean and standard deviation are kept, not one draw from
them, so that training on the cache is the same mathematics as encoding in each step.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from safetensors.torch import save

from skinsynth import cpu
from skinsynth.data import concepts, views
from skinsynth.data.cache import open_dataset
from skinsynth.data.codec import to_npy
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.shards import ShardWriter, claim, missing_parts, write_manifest
from skinsynth.data.stream import Feed
from skinsynth.files import sha256_file, write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.models import diffusion
from skinsynth.run import Progress, RunDir, Task
from skinsynth.world import World


def encode(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``<run>-latents``: one sample per chosen image, ``moments.npy`` float32 (views, 2, channels, h, w), views being the image and
    crops of it, with ``encode.flip`` each with its mirror image; and ``encode/prompts.safetensors`` what
    ``diffusion.encode_prompts`` gives.

    Units are the shards of the training split. With ``finetune.cache_latents=false`` only the prompts are encoded.

    Raises:
        UserError: base model incomplete or of another image size, a concept without images.
    """
    skip = cfg.data.on_error == "skip"
    train = open_dataset(cfg, run, "train", tolerate=skip)
    pipe = diffusion.load_base(cfg.model)
    for name in {"vae", "text_encoder", "text_encoder_2"} & pipe.components.keys():  # the UNet, most of the bytes, is not needed
        pipe.components[name].to(World().device)
    diffusion.latent_shape(pipe, cfg.prepare.size)
    sources = concepts.sources(cfg, train)
    wanted = sorted({i for source in sources for i in source.samples}) if cfg.finetune.cache_latents else []
    folder, units = run.dataset(cfg, "latents"), len(train.manifest["shards"]) if wanted else 0
    base_sha256 = diffusion.base_sha256(cfg.model)
    claim(folder, {"base_sha256": base_sha256, "train_sha256": sha256_file(train.folder / "manifest.json"), "seed": cfg.seed,
                   **asdict(cfg.encode), "samples": [train.keys[i] for i in wanted]})
    mine = {unit: sorted(set(train.shard_samples(unit)) & set(wanted)) for unit in task.mine(list(range(units)))}
    todo = {unit: mine[unit] for unit in missing_parts(folder, units) if unit in mine}

    def drawn(batch: list[int]) -> np.ndarray:
        """uint8 (views, n, height, width, 3)."""
        return np.stack([views.views(train.image(i), train.keys[i], cfg.encode, cfg.seed) for i in batch], 1)

    total = sum(map(len, mine.values()))
    progress = Progress(run, "encode", task.index, total, "images", total - sum(map(len, todo.values())), len(wanted))
    for unit, samples in todo.items():
        with ShardWriter(folder, unit) as shard:
            samples = _readable(train, samples, shard) if skip else samples
            batches = dict(enumerate(diffusion.padded(samples, cfg.encode.batch)))
            numbered = ((number, [batch]) for number, (batch, _) in batches.items())
            # the next batch is decoded beside this one
            with Feed(drawn, numbered, cpu.loaders(cfg.data.workers), turns=pipe.vae.device.type == "cpu") as feed:
                for number, (images,) in feed:
                    batch, count = batches[number]
                    moments = np.stack([diffusion.encode_images(pipe.vae, view) for view in images], 1)
                    for i, values in zip(batch[:count], moments[:count], strict=True):
                        shard.add(train.keys[i], {"moments.npy": to_npy(values)})
                    progress.advance(count)
    if not missing_parts(folder, units):
        _finish(cfg, run, pipe, units, base_sha256, concepts.prompts(sources))


def _readable(train: Dataset, samples: list[int], shard: ShardWriter) -> list[int]:
    """The samples whose image is good; the others are noted in the manifest and have no latents."""
    good = []
    for i in samples:
        try:
            train.image(i)
            good.append(i)
        except BadSample as error:
            shard.skip(error.key, error.reason)
    return good


def _finish(cfg: Config, run: RunDir, pipe: object, units: int, base_sha256: str, texts: list[str]) -> None:
    folder = run.dataset(cfg, "latents")
    embeddings = run.node("encode") / "prompts.safetensors"
    write_bytes(embeddings, save(diffusion.encode_prompts(pipe, texts, cfg.prepare.size)))
    write_json(run.node("encode") / "prompts.json", texts)
    manifest = write_manifest(folder, units, kind="latents", base=cfg.model.base, base_sha256=base_sha256, views=views.count(cfg.encode))
    run.finish("encode", {"images": manifest["count"], "prompts": len(texts)}, [folder / "manifest.json", embeddings])
