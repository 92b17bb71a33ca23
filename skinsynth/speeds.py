"""How fast each stage is, and who says so: an earlier run that measured it, or published figures. No torch here."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from math import prod
from typing import Any

from skinsynth import stages
from skinsynth.files import read_hint
from skinsynth.knobs import Config
from skinsynth.run import RunDir


@dataclass(frozen=True)
class Rate:
    """Images (samples, where it trains) per second of one task or rank."""

    per_second: float
    source: str


A100 = "one A100, Stable Diffusion 1.5 or 2 at 512 px"
STATED = {  # stage -> images per second of one GPU at 512 px, and who says so
    # MosaicML's diffusion, SD 2: encoding on the fly costs 1.4 times what training on latents does, so 0.4 / 36 s an image
    "encode": (90.0, f"stated by MosaicML for {A100} (36 images/s with latents made before, 1.4 x slower without)"),
    # MosaicML's diffusion: UNet of SD 2 on latents made before, 512 px, near-linear to 128 GPUs
    "finetune": (36.0, f"stated by MosaicML for {A100}, latents made before"),
    # published for SD 1.5 at 512 px, 50 steps, with SDPA attention and nothing compiled (0.94 compiled and channels-last)
    "generate": (0.63, f"published for {A100}, 50 steps, SDPA"),
}
STATED_SIZE, STATED_STEPS, STATED_PASSES = 512, 50, 2


def gpus(cfg: Config, stage: str) -> int:
    """GPUs of each node of a stage, asked for by ``gpus_per_node`` or by a ``gres`` such as gpu:a100:4."""
    # a kind may have any letters and begin with a digit (2080ti, MIG's 1g.10gb); a number alone is no kind
    gres = re.search(r"(?:^|[,/])gpu(?::(?!\d+(?:[,(]|$))[^:,(]+)?(?::(\d+))?(?:[,(]|$)", str(cfg.cluster.site(stage).get("gres") or ""))
    return cfg.cluster.of(stage).gpus_per_node or (int(gres[1] or 1) if gres else 0)


def rate(cfg: Config, node: str, earlier: RunDir | None) -> Rate | None:
    """Measured by the earlier run where that did the same kind of work, else as stated for a GPU; None where nothing is known."""
    found = measured(cfg, node, earlier) if earlier else None
    stage = node.split("/")[0]
    return stated(cfg, stage) if not found and gpus(cfg, stage) and stage in STATED else found


def stated(cfg: Config, stage: str) -> Rate:
    """The published figure, scaled by pixels, steps and passes; whatever else differs is named."""
    (per_second, source), size = STATED[stage], cfg.prepare.size
    scale = (STATED_SIZE / size) ** 2
    guesses = [f"scaled to {size} px"] if size != STATED_SIZE else []
    if stage == "generate":
        g, steps = cfg.generate, steps_run(cfg)
        scale *= STATED_STEPS / steps * STATED_PASSES / passes(cfg)
        of = f" (of {g.steps}, strength {g.strength:g})" if steps != g.steps else ""
        guesses += [f"scaled to {steps} steps{of}"] if steps != STATED_STEPS else []
        guesses += ["scaled to one pass of the UNet a step, since guidance is 1"] if passes(cfg) != STATED_PASSES else []
        guesses += [f"what {g.method} starts from must be encoded too"] if g.method != "text-to-image" else []
    if stage == "encode" and cfg.encode.flip:
        scale /= 2
        guesses += ["halved for the mirror images"]
    if stage == "finetune":
        batch = cfg.finetune.micro_batch or cfg.finetune.global_batch // rank_count(cfg, stage)
        guesses += [f"batches of {batch} a GPU will be slower"] if batch < 16 else []
        guesses += ["so will gradient checkpointing"] if cfg.finetune.gradient_checkpointing else []
    guesses += ["the built-in base model is much smaller"] if cfg.model.base == "builtin" else []
    return Rate(per_second * scale, f"{source}; here a guess: {', '.join(guesses)}" if guesses else source)


def steps_run(cfg: Config) -> int:
    """The steps that an image of ``generate`` goes through: of what starts from an image, the last ones alone, as many as diffusers takes."""
    g = cfg.generate
    return g.steps if g.method == "text-to-image" else max(1, min(g.steps, int(g.steps * g.strength)))


def passes(cfg: Config) -> int:
    """How often the UNet is asked in each of them: with guidance also without the prompt."""
    return 2 if cfg.generate.guidance > 1 else 1


def measured(cfg: Config, node: str, earlier: RunDir) -> Rate | None:
    """The speed of a node in an earlier run, scaled to this one by pixels, steps and passes."""
    stage, old = node.split("/")[0], earlier.config()
    if bool(gpus(old, stage)) != bool(gpus(cfg, stage)) or _model(old, stage) != _model(cfg, stage):
        return None
    arms = [f"classify/{arm}" for arm in old.classify.arms]
    names = [node] if stage != "classify" or node in arms else arms
    speeds = [speed for name in names if (speed := _speed(earlier, old, name))]
    if not speeds:
        return None
    count, size = (rank_count(old, stage) if stages.is_gang(old, stage) else old.cluster.of(stage).array), gpus(old, stage)
    place = f"GPUs a node: {size}" if size else f"no GPU, CPU threads each: {old.cluster.threads_of(stage)}"
    source = f"measured in {earlier.path} ({'ranks' if stages.is_gang(old, stage) else 'tasks'}: {count}, {place})"
    scale, changes = _scale(old, cfg, stage)
    changes += ["its start, which is slower, is counted in"] if any(cold for _, cold in speeds) else []
    return Rate(statistics.mean(speed for speed, _ in speeds) * scale, f"{source}; here a guess: {', '.join(changes)}" if changes else source)


def _model(cfg: Config, stage: str) -> tuple[Any, ...]:
    """What must be the same for a speed to mean anything."""
    c = cfg.classify
    if stage == "classify":
        return (c.model, c.hidden_size, c.layers, c.heads, c.patch) if c.model == "small" else (c.model,)
    if stage == "prepare":
        return (bool(cfg.data.remote),)  # of what lies prepared elsewhere it makes nothing
    return () if stage == "report" else (cfg.model.base,)


def rank_count(cfg: Config, stage: str) -> int:
    """Processes of one job of the stage."""
    wanted = cfg.cluster.of(stage)
    return wanted.nodes * wanted.tasks_per_node if stages.is_gang(cfg, stage) else 1


def _speed(run: RunDir, cfg: Config, node: str) -> tuple[float, bool] | None:
    """Images a second of one task or rank, and whether its start is counted in: from the progress files, or where those only saw the end from
    ``metrics.jsonl``.

    Of a small run loading and the first batch may be most of the time, and would be scaled as if each image took its share of them. So it counts
    from the end of the first batch on; all of it counts where no task made a second one, or an earlier version did not note when that was.
    """
    parts = [part for path in (run.node(node) / "progress").glob("*.json") if (part := read_hint(path))]
    stage = node.split("/")[0]
    training = {"finetune": cfg.finetune, "classify": cfg.classify}.get(stage)
    warm = [(p["done"] - p["first"]["done"], p["now"] - p["first"]["now"]) for p in parts if p.get("first")]
    whole = [(p["done"] - p["begun_at"], p["now"] - p["start"]) for p in parts]
    for spans in (warm, whole):
        done, spent = (sum(column) for column in zip((0, 0.0), *(span for span in spans if span[0] > 0), strict=True))
        if done > 0 and spent > 0:
            return done / spent * (training.global_batch / rank_count(cfg, stage) if training else 1), spans is whole
    paths = sorted(run.node(node).glob("**/metrics.jsonl")) if training else []  # of each seed
    rows = [row for path in paths for row in path.read_text().splitlines()]
    told = [json.loads(row)["samples_per_second"] for row in rows if row.endswith("}")]
    return (statistics.median(told) / rank_count(cfg, stage), False) if told else None


def _scale(old: Config, new: Config, stage: str) -> tuple[float, list[str]]:
    """By how much the new work is faster, and what makes that a guess. By threads and ranks nothing is scaled: it is only said."""
    by_pixels = stage in ("encode", "finetune", "generate", "screen") or (stage == "classify" and new.classify.model == "small")
    found: list[tuple[str, Any, Any, int]] = [("px", old.prepare.size, new.prepare.size, 2 if by_pixels else 0)]
    if stage == "generate":
        found += [("steps", steps_run(old), steps_run(new), 1), ("passes of the UNet a step", passes(old), passes(new), 1),
                  ("as its method", old.generate.method, new.generate.method, 0), ("images a batch", old.generate.batch, new.generate.batch, 0)]
    if stage == "encode":
        found.append(("pictures an image", 1 + old.encode.flip, 1 + new.encode.flip, 1))
    if not gpus(new, stage):
        found.append(("CPU threads", old.cluster.threads_of(stage), new.cluster.threads_of(stage), 0))
    if stage in stages.GANGS:
        found.append(("ranks", rank_count(old, stage), rank_count(new, stage), 0))
    changed = [item for item in found if item[1] != item[2]]
    words = [f"{'scaled from' if power else 'it had'} {was} {what}, here {now}" for what, was, now, power in changed]
    return prod((was / now) ** power for _, was, now, power in changed if power), words
