"""What a plan will take, before anything is submitted: images, shards, bytes, hours. No torch here.

Counts and sizes follow from the configuration, the metadata and the models' files; the speeds are those of ``speeds``. What nobody
counted or measured is ``unknown``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skinsynth import stages
from skinsynth.chain import Node, chain
from skinsynth.counts import Counts, count, plan
from skinsynth.errors import UserError
from skinsynth.knobs import Config, Training
from skinsynth.models import hub
from skinsynth.run import RunDir
from skinsynth.speeds import Rate, gpus, rank_count, rate
from skinsynth.status import widen

SD15 = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}  # numbers in the networks of Stable Diffusion 1.x
VIT_B16 = 86_000_000
JPEG_256, JPEG_GROWTH = 16_800, 1.34  # bytes of an ISIC 2017 image of 256 px at quality 95; by which power of its side they grow (64 to 256 px)
OVERHEAD = 1800  # bytes a sample: tar headers, padding, its json
INDEX = 300  # bytes a sample: part, manifest; and those of the plan, 500 more, in prepare
REPORT = 3_000_000  # bytes; it holds the pictures
TITLE = "what it will take (about; a whole run, from its beginning)"


@dataclass
class Stage:
    """What one node of the chain takes. ``None`` is unknown. ``seconds``: of its longest task; ``hours``: of all GPUs, or of all CPU cores."""

    node: str
    unit: str = "images"
    amount: int | None = None
    shards: int | None = None
    tasks: int = 1
    ranks: int = 1
    device: str = "core"  # gpu or core
    devices: int = 1  # of all tasks together
    bytes: int | None = None  # at most on disk at one time
    files: int | None = None
    rate: float | None = None  # per second of one task or rank
    source: str = "unknown"
    seconds: float | None = None
    limit: float = 0
    hours: float | None = None
    warnings: list[str] = field(default_factory=list)


# ---- how many bytes ----

@dataclass
class Sizes:
    """Numbers in each network; None where the model is not on this machine. ``down``: pixels of a latent's side; ``features``: of the VAE."""

    networks: dict[str, int] | None = None
    down: int = 8
    channels: int = 4
    features: int = 2 * (128 + 128 + 256 + 512 + 512 + 512)
    classifier: int | None = None


def sizes(cfg: Config) -> Sizes:
    found = Sizes(classifier=_classifier_numbers(cfg))
    try:
        base = hub.find_base(cfg.model)
    except UserError:
        found.networks = SD15 if "stable-diffusion-v1" in cfg.model.base else None
        return found
    vae = json.loads((base.config / "vae" / "config.json").read_text())
    blocks = vae["block_out_channels"]
    found.down, found.channels = 2 ** (len(blocks) - 1), vae["latent_channels"]
    found.features = 2 * (blocks[0] + sum(blocks) + blocks[-1])
    found.networks = base.parameters()
    return found


def _classifier_numbers(cfg: Config) -> int | None:
    c = cfg.classify
    if c.model == "small":
        side, width = c.image_size or cfg.prepare.size, c.hidden_size
        return 12 * c.layers * width**2 + 13 * c.layers * width + (3 * c.patch**2 + (side // c.patch) ** 2 + 6) * width
    try:
        folder = hub.resolve_classifier(c.model)
    except UserError:
        return VIT_B16 if "vit-base-patch16" in c.model else None
    return hub.parameters(folder) if folder else None


def jpeg_bytes(side: int) -> float:
    return JPEG_256 * (side / 256) ** JPEG_GROWTH + OVERHEAD


def _checkpoints(training: Training, numbers: int) -> int:
    """As kept, and one more while it is written: float32 weights, AdamW's two moments, and the moving average where there is one."""
    count = training.keep + 1 + (training.steps // training.keep_every if training.keep_every else 0)
    return count * numbers * 4 * (4 if training.ema_decay else 3)


def _trained(cfg: Config, networks: dict[str, int]) -> int:
    """Numbers that fine-tuning trains."""
    whole = networks["unet"] + (sum(n for name, n in networks.items() if "text" in name) if cfg.finetune.train_text_encoder else 0)
    return whole if not cfg.finetune.lora_rank else round(2.3e-4 * cfg.finetune.lora_rank * whole)  # as in SD 1.5: 0.2 M a rank


def written(cfg: Config, stage: Stage, images: Counts, model: Sizes) -> int | None:
    """Bytes of a node, at most at one time."""
    name, side, amount = stage.node.split("/")[0], cfg.prepare.size, stage.amount
    if name == "report":
        return REPORT
    if name == "finetune":
        networks = model.networks
        return _checkpoints(cfg.finetune, _trained(cfg, networks)) + 4 * sum(networks.values()) if networks else None
    if name == "classify":  # the best weights so far that a kept checkpoint refers to, and those of the evaluations since
        c = cfg.classify
        best = min(ceil(c.steps / c.evaluate_every), c.keep + 1 + 2 * ceil(c.checkpoint_every / c.evaluate_every))
        return stage.tasks * (_checkpoints(cfg.classify, model.classifier) + 4 * best * model.classifier) if model.classifier else None
    each = {"prepare": jpeg_bytes(side) + INDEX + 500, "generate": jpeg_bytes(side) + INDEX,
            "encode": 8 * cfg.encode.crops * (1 + cfg.encode.flip) * model.channels * (side // model.down) ** 2 + 1024 + INDEX,
            "screen": 4 * model.features + 3 * 32**2 + INDEX}
    if name == "screen" and amount is not None:
        amount -= images.planted or 0  # of which it keeps three numbers each
    return None if amount is None else round(amount * each[name])


def files(cfg: Config, stage: Stage) -> int | None:
    """Inodes, roughly: a shard has a tar and a part (in screen three parts), a task its log, progress and what submitit keeps."""
    own = 5 * stage.tasks * stage.ranks + 10
    if stage.node.split("/")[0] in stages.GANGS:
        training = cfg.finetune if stage.node == "finetune" else cfg.classify
        return own + stage.tasks * (20 + (training.keep + 1) * (stage.ranks + 8))
    return None if stage.shards is None else own + 3 * stage.shards


# ---- together ----

def estimate(cfg: Config, earlier: RunDir | None = None) -> list[Stage]:
    """One ``Stage`` for each node of a whole run, from its beginning.

    Raises:
        UserError: no arm to train, or ``earlier`` is no run folder.
    """
    images, model = count(cfg), sizes(cfg)
    return [_stage(cfg, node, images, model, rate(cfg, node.name, earlier)) for node in chain(cfg)]


def _stage(cfg: Config, node: Node, images: Counts, model: Sizes, speed: Rate | None) -> Stage:
    wanted, gang, each = cfg.cluster.of(node.stage), stages.is_gang(cfg, node.stage), gpus(cfg, node.stage)
    found = Stage(node.name, tasks=node.tasks(cfg), ranks=rank_count(cfg, node.stage), limit=wanted.minutes * 60)
    _amounts(cfg, found, images)
    found.device = "gpu" if each else "core"
    nodes = wanted.nodes if gang else 1
    found.devices = found.tasks * (nodes * each if each else found.ranks * cfg.cluster.threads_of(node.stage))
    found.bytes, found.files = written(cfg, found, images, model), files(cfg, found)
    if images.why and node.stage == "prepare":
        found.warnings.append(f"the real images cannot be counted: {images.why}")
    if speed:
        found.rate, found.source = speed.per_second, speed.source
        _times(cfg, found)
    found.warnings += _fit(cfg, found)
    return found


def _amounts(cfg: Config, found: Stage, images: Counts) -> None:
    """Images (or steps) and output shards of a stage."""
    name, made = found.node.split("/")[0], ceil(images.synthetic / cfg.generate.shard_size)
    if name in stages.GANGS:
        found.unit, found.amount = "steps", cfg.finetune.steps if name == "finetune" else cfg.classify.steps
        return
    from skinsynth.quality.copies import PLANTS

    real = sum(images.shards.values()) if images.real is not None else None
    found.amount, found.shards = {
        "prepare": (images.real, real), "encode": (images.latents, images.shards.get("train")), "generate": (images.synthetic, made),
        "screen": (None if images.real is None else images.real + (images.planted or 0) + images.synthetic,
                   None if real is None else real + len(PLANTS) + made),  # the copies of one disguise are a unit, as a shard is
        "report": (None, 0)}[name]


def _times(cfg: Config, found: Stage) -> None:
    """Seconds of the longest task, hours of all devices."""
    assert found.rate is not None
    if found.unit == "steps":
        training = cfg.finetune if found.node == "finetune" else cfg.classify
        found.seconds = (found.amount or 0) * training.global_batch / (found.rate * found.ranks)
        found.hours = found.seconds * found.devices / 3600
    elif found.amount is not None and found.shards:
        shard, hands = _shard(cfg, found), found.tasks * found.ranks
        found.seconds = min(found.amount, ceil(found.shards / hands) * shard) / found.rate
        found.hours = found.amount / found.rate * found.devices / hands / 3600


def _shard(cfg: Config, found: Stage) -> int:
    """Images of a whole unit."""
    full = cfg.generate.shard_size if found.node == "generate" else cfg.prepare.shard_size
    return full if found.node in ("prepare", "generate") else min(full, ceil((found.amount or 0) / max(1, found.shards or 1)))


def _fit(cfg: Config, found: Stage) -> list[str]:
    """What will not go well, and what to change."""
    told, unit, stage = [], found.unit == "images", found.node.split("/")[0]
    more = "give more tasks (array) or time (minutes)" if unit else "give more nodes or time (minutes)"
    if found.seconds and found.seconds > found.limit:
        times = ceil(found.seconds / found.limit) - 1
        again = f"Slurm will restart it {times} time{'s' * (times > 1)}" if cfg.cluster.kind == "slurm" else "it may be stopped and launched again"
        told.append(f"a task needs about {_time(found.seconds)}, its limit is {_time(found.limit)}: {again}; {more}")
    if unit and found.rate and found.amount and found.shards and _shard(cfg, found) / found.rate > found.limit:
        key = "generate.shard_size" if stage == "generate" else "prepare.shard_size"
        told.append(f"one shard alone needs {_time(_shard(cfg, found) / found.rate)}, more than the limit of {_time(found.limit)}: it would never "
                    f"get done; give more time (minutes) or a smaller {key}")
    if unit and found.shards and found.tasks > found.shards:
        told.append(f"{found.tasks} tasks share {found.shards} shards: {found.tasks - found.shards} have nothing to do")
    if not unit:
        batch = (cfg.finetune if stage == "finetune" else cfg.classify).global_batch
        if batch % found.ranks:
            told.append(f"{stage}.global_batch={batch} cannot be shared by {found.ranks} ranks: it will fail; change one of them")
    return told


# ---- for people and scripts ----

def as_json(cfg: Config, found: list[Stage]) -> dict[str, Any]:
    rows = [asdict(stage) for stage in found]
    return {"run": cfg.run, "plan": plan(cfg), "stages": rows, "bytes": total(found, "bytes"), "files": total(found, "files")}


def total(found: list[Stage], what: str) -> int | None:
    """None where a part is unknown."""
    values = [getattr(stage, what) for stage in found]
    return None if None in values else sum(values)


def tables(found: list[Stage], width: int) -> list[Table]:
    """One table, or as many below each other as it takes for none to be wider: all tell the stages' names, and each column is whole."""
    columns = _columns(found)
    room = {name: max(len(line) for text in [name, *cells] for line in text.splitlines() or [""]) + 3 for name, cells in columns.items()}
    groups: list[list[str]] = [["stage"]]
    for name in list(columns)[1:]:
        if 1 + sum(room[column] for column in [*groups[-1], name]) > width and len(groups[-1]) > 1:
            groups.append(["stage"])
        groups[-1].append(name)
    return [_table({name: columns[name] for name in group}, TITLE if number == 0 else None) for number, group in enumerate(groups)]


def _table(columns: dict[str, list[str]], title: str | None) -> Table:
    view = Table(title=title, title_justify="left")
    for name in columns:
        view.add_column(name, justify="left" if name == "stage" else "right")
    for cells in zip(*columns.values(), strict=True):
        view.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    return view


def _columns(found: list[Stage]) -> dict[str, list[str]]:
    """Heading -> a cell for each stage; what is asked for most comes first."""
    sources = _sources_of(found)
    return {
        "stage": [s.node for s in found],
        "does": ["" if s.node == "report" else "unknown" if s.amount is None else f"{_known(s.amount)} {s.unit}" for s in found],
        "longest\ntask": [_time(s.seconds) for s in found],
        "limit": [_time(s.limit) for s in found],
        "GPU or\ncore hours": ["unknown" if s.hours is None else f"{_number(s.hours)} {'GPU h' if s.device == 'gpu' else 'core h'}" for s in found],
        "writes": [size(s.bytes) for s in found],
        "shards": ["" if s.unit == "steps" or s.shards == 0 else _known(s.shards) for s in found],
        "tasks": [str(s.tasks) for s in found],
        "ranks": [str(s.ranks) for s in found],
        "speed": [f"{_number(s.rate)}/s [{sources[s.source]}]" if s.rate else "unknown" for s in found]}


def _plan_lines(p: dict[str, Any]) -> list[str]:
    if p["why"]:
        return [f"to generate: unknown: {p['why']}"]
    if p["from"] != "generated":
        each = (f"{c['images']:,} {name}" for name, c in p["classes"].items())
        return [f"synthetic images from {p['from']}: {', '.join(each)}"]
    about = "about " if p["approximate"] else ""
    lines = [f"to generate: {about}{p['images']:,} images in {p['shards']:,} shards of {p['shard_size']:,} (amount: {p['amount']}); {p['method']}, "
             f"{p['weights']} weights, {p['scheduler']}, {p['steps']} steps, guidance {p['guidance']:g}, seed {p['seed']}"
             + (f", negative prompt '{p['negative_prompt']}'" if p["negative_prompt"] else "")]
    for name, c in p["classes"].items():
        more = f" (and {len(c['prompts']) - 1} more)" if len(c["prompts"]) > 1 else ""
        lines.append(f"  {name} (target {c['target']}): {about}{c['images']:,}: {c['prompts'][0]}{more}")
    return lines


def _sources_of(found: list[Stage]) -> dict[str, int]:
    return {source: i for i, source in enumerate(dict.fromkeys(s.source for s in found if s.rate), 1)}


def show(console: Console, cfg: Config, found: list[Stage]) -> None:
    """The table, where its speeds come from, what will not fit, and the plan of generation."""
    widen(console)
    for part in tables(found, console.width):
        console.print(part)
    for line in _plan_lines(plan(cfg)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for source, number in _sources_of(found).items():
        console.print(f"[{number}] images a second of one task or rank, {source}", markup=False, highlight=False, soft_wrap=True)
    if any(s.rate is None for s in found if s.node != "report"):
        console.print("unknown: nobody measured it; make a small run (few steps and images) there and give it with --from RUN", highlight=False,
                      soft_wrap=True)
    for stage in found:
        for warning in stage.warnings:
            console.print(f"{stage.node}: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _known(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _number(value: float) -> str:
    if 0 < value < 0.001:
        return "< 0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{_number(seconds / 3600)} h" if seconds >= 3600 else f"{_number(seconds / 60)} min" if seconds >= 60 else f"{_number(seconds)} s"


def size(count: int | None) -> str:
    if count is None:
        return "unknown"
    power = min(4, max(0, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
