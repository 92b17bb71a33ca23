"""Every knob of a run, in one place: typed dataclasses. ``config`` reads and checks them. No torch here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import gcd, lcm
from typing import Any


def one_of(default: str, *others: str) -> Any:
    """A string field that takes one of the given values."""
    return field(default=default, metadata={"choices": (default, *others)})


def free(knob: Any) -> Any:
    """Marks a knob that changes how the work is done, not what comes out: it may change between launches of one run."""
    return field(default=knob.default, metadata={**knob.metadata, "free": True})


def at_least(default: Any, low: float, high: float = math.inf) -> Any:
    """A numeric field with its range, both ends included."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass
class Data:
    """Where the real images come from and where datasets are kept.

    Either ``metadata`` (CSV in the SIIM-ISIC columns) with ``images`` (the folder of JPEGs), or the DreamBooth
    form: ``instance_data_dir`` (becomes target 1) with ``class_data_dir`` (becomes target 0).
    """

    name: str = "isic"  # datasets are called <shards>/<name>-{train,val,test}
    metadata: str | None = None
    images: str | None = None
    duplicates: str | None = None  # CSV of known near-duplicate pairs: the first two columns that hold ids
    instance_data_dir: str | None = None
    class_data_dir: str | None = None
    synthetic: str | None = None  # a folder of synthetic images from elsewhere: instead of fine-tuning and generating (see data.external)
    shards: str = free(field(default="shards"))  # a place, like ``run``: both may be moved
    remote: str | None = free(field(default=None))  # where <name>-{train,val,test} lie prepared: a URL, "pipe:COMMAND {name}" or a folder
    cache: str | None = free(field(default=None))  # where the remote's tars are kept: <cache>/<name>-train/...; None: beside the index in ``shards``
    cache_gb: float | None = free(at_least(None, 0.001))  # the remote's tars that are kept at most; None: all
    workers: int | None = free(at_least(None, 1, 256))  # loader threads of each rank; None: as many as it has CPU threads, 2 to 8
    memory_gb: float = free(at_least(1.0, 0))  # decoded images that each rank of classify keeps in memory
    on_error: str = free(one_of("stop", "skip"))  # a sample that cannot be read: stop the training, or take the next one and report it
    streams: int = at_least(16, 1)  # canonical streams: shards that an epoch reads from side by side
    shuffle_window: int = at_least(2048, 1)  # samples of a stream that are shuffled among each other


@dataclass
class Split:
    """Shares of the groups' images; they are scaled to sum to one."""

    train: float = at_least(0.7, 0.01)
    val: float = at_least(0.1, 0.01)
    test: float = at_least(0.2, 0.01)


@dataclass
class Prepare:
    size: int = at_least(512, 16, 2048)  # pixels, the side of the square result
    split: Split = field(default_factory=Split)
    crop: str = one_of("lesion", "centre", "none")
    hair_removal: bool = True
    shard_size: int = at_least(1000, 1)  # images per shard
    quality: int = at_least(95, 50, 100)  # JPEG quality
    max_bad: float = free(at_least(0.05, 0, 1))  # share of images that may be set aside before the stage stops


@dataclass
class Model:
    base: str = "builtin"  # "builtin", a diffusers folder, a hub id, or one .safetensors file as other tools share them
    config: str | None = None  # with one file: the diffusers folder or hub id that its tokenizer and configurations come from
    lora: str | None = None  # a .safetensors file that is merged into the base, as a published fine-tune may be one
    lora_scale: float = at_least(1.0, 0)
    attention: str = one_of("auto", "sdpa", "xformers")
    compile: bool = False  # torch.compile of the UNet, in finetune and generate: minutes once, then faster steps


@dataclass
class Encode:
    batch: int = at_least(16, 1)
    flip: bool = True  # also the mirrored image, so that training may draw either
    crops: int = at_least(1, 1)  # views of an image to draw from: the first is the image, each other a random crop of it
    crop_scale: float = at_least(0.8, 0.1, 1)  # the smallest share of the side that a crop keeps


@dataclass
class Images:
    """Which images of the training split: ``where`` compares columns (a value, or a list of values); count None takes all."""

    where: dict[str, Any] = field(default_factory=dict)
    count: int | None = at_least(None, 1)


@dataclass
class Concept:
    """One DreamBooth concept; ``class_`` is spelt ``class`` in YAML."""

    instance_prompt: str = ""
    class_prompt: str = ""
    instance: Images = field(default_factory=Images)
    class_: Images = field(default_factory=Images)


@dataclass
class Training:
    """What both trainings (fine-tuning, classification) share."""

    steps: int = at_least(1000, 1)  # optimizer steps
    global_batch: int = at_least(8, 1)
    micro_batch: int = free(at_least(0, 0))  # per rank and pass; 0: global batch / ranks, that is, no accumulation
    lr: float = at_least(2e-6, 0)
    weight_decay: float = at_least(0.01, 0)
    warmup_steps: int = at_least(0, 0)
    schedule: str = one_of("constant", "linear", "cosine")
    max_grad_norm: float = at_least(1.0, 0)
    optimizer: str = one_of("adamw", "adamw8bit")  # adamw8bit: bitsandbytes, on a GPU, zero=0
    ema_decay: float = at_least(0.0, 0, 0.999999)  # an exponential moving average of the weights is exported; 0: none
    zero: int = free(at_least(2, 0, 3))  # DeepSpeed ZeRO stage; 0: plain data parallel
    offload: str = free(one_of("none", "optimizer", "parameters"))  # to the host's memory; parameters: both, with zero=3
    precision: str = one_of("fp32", "bf16", "fp16")
    explode: float = free(at_least(20.0, 1))  # stop where ten steps' loss, on average, is so many times the usual one, and above the first ones
    checkpoint_every: int = free(at_least(200, 1))
    keep: int = free(at_least(2, 1))  # newest checkpoints kept
    keep_every: int = free(at_least(0, 0))  # and those of every so many steps; 0: none
    log_every: int = free(at_least(10, 1))


@dataclass
class Finetune(Training):
    """DreamBooth (Ruiz et al. 2023) with prior preservation, several concepts at once; or text-to-image on captions from the metadata."""

    method: str = one_of("dreambooth", "text-to-image")
    concepts: dict[str, Concept] = field(default_factory=dict)  # dreambooth
    images: Images = field(default_factory=Images)  # text-to-image
    train_text_encoder: bool = False
    lora_rank: int = at_least(0, 0)  # 0: all weights are trained
    lora_alpha: int | None = at_least(None, 1)  # None: the rank, that is, a scale of one
    cache_latents: bool = True  # False: the VAE runs in every step
    prior_weight: float = at_least(1.0, 0)
    prediction: str = one_of("model", "epsilon", "v_prediction")  # what the UNet is trained to predict; model: as the base was
    noise_offset: float = at_least(0.0, 0)  # offset noise (Guttenberg 2023), for very dark or bright images
    snr_gamma: float | None = at_least(None, 0)  # min-SNR weighting (Hang et al. 2023); None: plain MSE
    snr_floor: float = at_least(0.0, 0)  # with snr_gamma: truncated SNR (Salimans and Ho 2022)
    caption_dropout: float = at_least(0.0, 0, 1)  # share of samples trained on the empty prompt
    gradient_checkpointing: bool = free(at_least(False, 0))
    validate_every: int = free(at_least(0, 0))  # steps between previews; 0: at the end only


PROMPT_FIELDS = ("diagnosis", "site", "person", "caption")  # what a prompt of generate.classes may have in braces


@dataclass
class GeneratedClass:
    """One class of the synthetic set; its prompts are used in turn. They may have fields: see ``data.plan``."""

    target: int = at_least(0, 0, 1)  # 1: malignant
    prompts: list[str] = field(default_factory=list)
    count: int = at_least(100, 0)  # with another generate.amount than "counts": its share among the classes of its target
    where: dict[str, Any] = field(default_factory=dict)  # of the training images that fields are filled from and images made from


@dataclass
class Generate:
    method: str = one_of("text-to-image", "image-to-image", "inpaint")  # the others start from training images
    strength: float = at_least(0.6, 0.01, 1)  # of those two: 0 leaves the image as it is, 1 draws it anew
    redraw: str = one_of("lesion", "skin")  # inpaint: the lesion, or all round it (the same lesion on other skin)
    weights: str = one_of("finetuned", "base")  # base: straight from ``model``, with its LoRA if there is one; nothing is fine-tuned then
    classes: dict[str, GeneratedClass] = field(default_factory=dict)
    amount: str = one_of("counts", "real", "balance")  # as the classes say; as many as real ones; what lacks to the largest target
    negative_prompt: str = ""
    steps: int = at_least(50, 1)
    guidance: float = at_least(7.5, 1)
    scheduler: str = one_of("dpmsolver++", "ddim", "euler")
    batch: int = at_least(8, 1)
    shard_size: int = at_least(1000, 1)  # images per unit, that is, per output shard
    quality: int = at_least(95, 50, 100)
    precision: str = one_of("fp32", "bf16", "fp16")
    retries: int = at_least(3, 0, 100)  # next seeds to try where an image comes out faulty (not finite, or of one colour)
    commit_every: int = free(at_least(0, 0))  # batches between commits inside a unit; 0: a unit that is broken off is made again
    mode: str = free(one_of("array", "gang"))  # independent tasks, or one job of nodes x tasks_per_node that take units in turn


@dataclass
class Screen:
    """``blur``, ``frame``, ``clipped``, ``saturation``: the share of the real training images that lie beyond the limit; None: not looked at."""

    features: str = "vae"  # the base model's VAE; "classifier": the run's own, of real images; a transformers folder or id; FID's Inception (.pth)
    max_features: int = at_least(10_000, 100)  # images a set of which the features are compared, over all and of each class: the memory's bound
    blank_std: float = at_least(5.0, 0)  # grey levels (0-255): a picture with less spread is blank
    blur: float | None = at_least(0.002, 0, 0.5)
    frame: float | None = at_least(0.002, 0, 0.5)  # a black frame or vignette
    clipped: float | None = at_least(0.002, 0, 0.5)  # pixels at the ends of the scale
    saturation: float | None = at_least(0.002, 0, 0.5)  # garish colours
    copy_quantile: float = at_least(0.995, 0.5, 1)  # of the nearness that held-out real images have to training images: beyond it is a copy,
    copy_least: float = at_least(0.6, 0, 1)  # but not below this,
    copy_most: float = at_least(0.75, 0, 1)  # and above this always
    duplicate: float | None = at_least(0.98, 0.5, 1)  # correlation from which two synthetic images are one; None: not looked for
    held_out: float | None = at_least(0.98, 0.5, 1)  # the same with a validation or test image, of which copies are looked for too; None: neither
    agreement: float | None = at_least(None, 0, 1)  # smallest probability of its class by a classifier of real images; None: only measured
    neighbours: int = at_least(5, 1)  # of precision, recall, density, coverage
    kid_subsets: int = at_least(50, 1)
    kid_subset_size: int = at_least(100, 2)
    batch: int = at_least(64, 1)
    min_accepted: float = at_least(0.2, 0, 1)  # the set fails with a smaller share accepted, of all or of a class (or none of a class),
    max_copies: float | None = at_least(None, 0, 1)  # with a larger share of copies among the generated,
    max_kid_ratio: float | None = at_least(None, 0)  # or with a KID so many times that of real images to real images, or of its spread
    on_fail: str = free(one_of("stop", "warn"))  # a set that fails stops the chain, or is only told


def proportion(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the weights' proportion, of weights or else of shares to a thousandth: a smaller one is 0, as all of none are."""
    for scale in (Fraction(1), Fraction(sum(map(Fraction, weights))) or Fraction(1)):
        shares = [(Fraction(weight) / scale).limit_denominator(1000) for weight in weights]
        if all(share or not weight for share, weight in zip(shares, weights, strict=True)):
            break
    whole = [int(share * lcm(*(s.denominator for s in shares))) for share in shares]
    return [number // (gcd(*whole) or 1) for number in whole]


@dataclass
class Phase:
    """A part of an arm's training: its mix, and its share of the steps (of any scale)."""

    sources: dict[str, float] = field(default_factory=dict)
    share: float = at_least(1.0, 0)


def phase_starts(parts: Sequence[Phase], steps: int) -> list[int]:
    """The step at which each phase begins, and the end of the last."""
    whole, done, found = sum(part.share for part in parts) or 1, 0.0, [0]
    for part in parts:
        done += part.share
        found.append(round(done / whole * steps))
    return found


@dataclass
class Arm:
    """A training mix: the weights of the sources ``real`` and ``synthetic`` in each batch, the same all the time or in ``phases``."""

    sources: dict[str, float] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)  # one after the other; instead of ``sources``

    @property
    def parts(self) -> list[Phase]:
        return self.phases or [Phase(self.sources)]

    @property
    def used(self) -> list[str]:
        """The sources that are drawn from at any time."""
        return list(dict.fromkeys(name for part in self.parts for name, weight in part.sources.items() if weight > 0))


@dataclass
class Classify(Training):
    """ViT training; the defaults are the study's (AdamW, 2e-5, batch 32, weight decay 0.01, linear). Its ten epochs, the first of them warm-up,
    depend on how many images there are: see configs/isic2020-sd15.yaml."""

    global_batch: int = at_least(32, 1)
    lr: float = at_least(2e-5, 0)
    schedule: str = one_of("linear", "constant", "cosine")
    zero: int = free(at_least(0, 0, 3))
    model: str = "google/vit-base-patch16-224-in21k"  # a folder, a hub id, or "small": a ViT from the keys below
    hidden_size: int = at_least(96, 8)
    layers: int = at_least(4, 1)
    heads: int = at_least(4, 1)
    patch: int = at_least(8, 1)
    image_size: int | None = at_least(None, 16)  # pixels; None: that of the shards (small) or of the pretrained model
    evaluate_every: int = at_least(100, 1)  # steps; one "epoch" of the tables
    patience: int = at_least(0, 0)  # evaluations without a better validation AUROC after which an arm stops; 0: never
    layer_decay: float = at_least(1.0, 0.01, 1)  # each layer's rate is this times that of the layer above it (Clark et al. 2020)
    label_smoothing: float = at_least(0.0, 0, 0.99)  # Szegedy et al. 2016
    mixup: float = at_least(0.0, 0)  # alpha of the Beta distribution that images are blended by (Zhang et al. 2018); 0: not at all
    cutmix: float = at_least(0.0, 0)  # the same of the box that is pasted in (Yun et al. 2019); with both, each sample takes either
    balance: str = one_of("none", "weights", "sampling")  # of the classes: in the loss, or by how often they are drawn
    tta: int = field(default=1, metadata={"choices": (1, 8)})  # views averaged where it is judged: the image, or its eight flips and turns
    seeds: list[int] = field(default_factory=list)  # of the weights, the order and the augmentation, never of the splits; empty: the run's own
    arms: dict[str, Arm] = field(default_factory=dict)


@dataclass
class Site:
    """What sbatch is asked for, in its own words. Given for the whole cluster, or for one stage, which then goes first."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    mem_gb: float | None = at_least(None, 0.1)  # per node
    exclude: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # any other sbatch option, for example {reservation: skin}


@dataclass
class Resources(Site):
    """What one stage gets. Unit stages use ``array`` independent tasks, step stages one gang of nodes x ranks."""

    array: int = at_least(1, 1)
    throttle: int = at_least(256, 1)  # tasks of the array that may run at once
    nodes: int = at_least(1, 1)
    tasks_per_node: int = at_least(1, 1)  # one per GPU
    gpus_per_node: int = at_least(0, 0)
    threads: int = at_least(0, 0)  # CPU threads a task; 0: local: all cores, shared out among the stage's tasks; slurm: one
    minutes: int = at_least(60, 1)  # time limit


@dataclass
class Cluster(Site):
    """Who runs the stages: this machine, this process, or Slurm. These keys change no result, so they may change between launches."""

    kind: str = one_of("local", "debug", "slurm")
    cores: int = at_least(0, 0)  # local: cores in use at once; 0: those of this machine
    python: str | None = None  # slurm: the interpreter on the nodes, for example 'apptainer exec --nv skinsynth.sif python'; None: this one
    env: str | None = None  # slurm: a shell script that every job sources first; None: slurm/env.sh
    signal_seconds: int = at_least(120, 1)  # slurm: how long before the time limit a job is told to save and to ask for another turn
    max_restarts: int = at_least(5, 1)  # slurm: restarts in a row without any progress, after which a job gives up
    stages: dict[str, Resources] = field(default_factory=dict)

    def of(self, stage: str) -> Resources:
        """The resources of a stage; those of ``default`` where it has none of its own."""
        return self.stages.get(stage) or self.stages.get("default") or Resources()

    def site(self, stage: str) -> dict[str, Any]:
        """The site's options that are set for a stage: its own before the cluster's; both their ``extra``."""
        own = self.of(stage)
        found = {f.name: getattr(own, f.name) if getattr(own, f.name) is not None else getattr(self, f.name) for f in fields(Site)}
        return {**{k: v for k, v in found.items() if v is not None}, "extra": {**self.extra, **own.extra}}

    @property
    def all_cores(self) -> int:
        return self.cores or len(os.sched_getaffinity(0))

    def threads_of(self, stage: str) -> int:
        """CPU threads of each of the stage's tasks. More threads than cores would cost more than they give: they wait by spinning."""
        wanted = self.of(stage)
        if self.kind == "slurm":
            return wanted.threads or 1
        return wanted.threads or max(1, self.all_cores // (wanted.array * wanted.tasks_per_node))


@dataclass
class Config:
    run: str = "runs/default"
    seed: int = at_least(0, 0, 2**31 - 1)
    data: Data = field(default_factory=Data)
    prepare: Prepare = field(default_factory=Prepare)
    model: Model = field(default_factory=Model)
    encode: Encode = field(default_factory=Encode)
    finetune: Finetune = field(default_factory=Finetune)
    generate: Generate = field(default_factory=Generate)
    screen: Screen = field(default_factory=Screen)
    classify: Classify = field(default_factory=Classify)
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def arm_seeds(self) -> list[int]:
        """The seeds that each arm is trained with, one task each."""
        return self.classify.seeds or [self.seed]

    @property
    def real_arm(self) -> str | None:
        """The first arm that is trained on real images only."""
        return next((name for name, arm in self.classify.arms.items() if arm.used == ["real"]), None)
