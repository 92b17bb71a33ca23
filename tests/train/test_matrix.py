"""Every method at every ZeRO stage on two ranks: it saves, goes on with the same losses to the same weights, and plain diffusers loads the
export. A checkpoint of any of them goes on at any other stage, and on one rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, overrides
from gang import main as run_gang
from PIL import Image
from safetensors.torch import load_file

from skinsynth import config
from skinsynth.data import views
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Encode, Model
from skinsynth.models import diffusion, hub, tiny
from skinsynth.run import RunDir, Task
from skinsynth.train.log import read_lines
from skinsynth.train.previews import Previews
from skinsynth.train.samples import Samples
from skinsynth.world import Stopped, World

METHODS = ("dreambooth", "text-to-image")
PARTS = {"unet": {}, "unet and text": {"train_text_encoder": True}, "lora": {"lora_rank": 4, "lora_alpha": 8, "lr": 1e-3},
         "lora and text": {"lora_rank": 4, "lr": 1e-3, "train_text_encoder": True}}
MATRIX = [(method, part, zero) for method in METHODS for part in PARTS for zero in range(4)]
SOME = [("dreambooth", "unet", 2), ("dreambooth", "lora and text", 3), ("text-to-image", "unet and text", 1), ("text-to-image", "lora", 0)]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with random weights, of Stable Diffusion's kind, as small as may be; VAE, text encoder and tokenizer are the built-in ones."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("base") / "small"
    pipe = StableDiffusionPipeline.from_pretrained(tiny.WEIGHTS)
    torch.manual_seed(0)
    old = pipe.unet.config
    pipe.unet = UNet2DConditionModel(
        in_channels=old.in_channels, out_channels=old.out_channels, cross_attention_dim=old.cross_attention_dim, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=8)
    pipe.save_pretrained(folder)
    return folder


def name_of(method: str, part: str, zero: int) -> str:
    return f"{method}-{part}-{zero}".replace(" ", "-")


@pytest.fixture(scope="module")
def maker(drawn: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """``make(name, method, **finetune keys)`` -> a run folder where everything before fine-tuning is done."""
    from skinsynth.stages.encode import encode
    from skinsynth.stages.prepare import prepare

    folder = tmp_path_factory.mktemp("matrix")
    first = RunDir(folder / "first")
    first.create(config.load("configs/demo.yaml", overrides(drawn, folder, "first")))
    prepare(first.config(), first, Task())

    def make(name: str, method: str, compiled: bool = False, **keys: object) -> RunDir:
        values = {"steps": 4, "checkpoint_every": 2, "log_every": 2, "global_batch": 4, "warmup_steps": 0, "method": method, **keys}
        more = {"model.base": small_base, "model.compile": compiled, "generate.steps": 2, "generate.classes.benign.count": 0,  # previews of one class
                **{f"finetune.{k}": v for k, v in values.items()}}
        cfg = config.load("configs/demo.yaml", [i for i in overrides(drawn, folder, name, **more) if not i.startswith("finetune.") or i.split(
            "=")[0].removeprefix("finetune.") in values])
        run = RunDir(folder / name)
        run.create(cfg)
        kind = f"{method}-{cfg.finetune.cache_latents}"  # without the cache there are no latents: such a run's must not be another one's
        encoded = folder / f"encoded-{kind}"
        if not encoded.exists():
            encode(cfg, run, Task())
            shutil.copytree(run.node("encode"), encoded)
            os.rename(run.dataset(cfg, "latents"), folder / f"latents-{kind}")
        else:
            shutil.copytree(encoded, run.node("encode"))
        run.dataset(cfg, "latents").symlink_to(folder / f"latents-{kind}")
        return run

    return make


def on_two_ranks(runs: list[RunDir], folder: Path, seconds: float = 600, arm: str = "") -> None:
    """Their fine-tuning, or that arm's training."""
    (folder / "list.json").write_text(json.dumps([f"{run.path}#{arm}" if arm else str(run.path) for run in runs]))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    with open(folder / "gang.log", "wb") as log:
        ranks = [subprocess.Popen([sys.executable, str(Path(__file__).with_name("gang.py")), str(folder / "list.json")], cwd=ROOT, stdout=log,
                                  stderr=log, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    try:
        codes = [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (folder / "gang.log").read_text()[-4000:]


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_lines(run.node("finetune") / "metrics.jsonl")]


def picture(run: RunDir, name: str) -> np.ndarray:
    return np.asarray(Image.open(run.node("finetune") / "previews" / name), int)


def from_checkpoint(other: RunDir, step: int, run: RunDir) -> RunDir:
    """``run`` as if it had been stopped at that step of ``other``."""
    node, theirs = run.node("finetune"), other.node("finetune")
    shutil.copytree(theirs / f"checkpoints/step-{step:08d}", node / f"checkpoints/step-{step:08d}", copy_function=os.link)
    lines = (theirs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (node / "metrics.jsonl").write_text("".join(lines[:step]))
    return run


def cases(chosen, maker):  # type: ignore[no-untyped-def]
    """``{(method, part, zero): (a run to go through at once, the same one to be begun at half its way)}``"""
    found = {}
    for method, part, zero in chosen:
        name, keys = name_of(method, part, zero), {**PARTS[part], "zero": zero, "ema_decay": 0.5 if part == "unet" else 0.0, "keep": 9}
        found[method, part, zero] = tuple(maker(f"{name}-{kind}", method, **keys) for kind in ("whole", "resumed"))
    return found


def check(part: str, whole: RunDir, resumed: RunDir) -> None:
    from diffusers import StableDiffusionPipeline

    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)
    theirs, mine = (load_file(run.weights / "unet/diffusion_pytorch_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    pipe = StableDiffusionPipeline.from_pretrained(resumed.weights)
    base = StableDiffusionPipeline.from_pretrained(resumed.config().model.base)
    trained = ["unet", "text_encoder"] if "text" in part else ["unet"]
    for model in ("unet", "text_encoder", "vae"):
        before, after = getattr(base, model).state_dict(), getattr(pipe, model).state_dict()
        assert any(not torch.equal(before[n], after[n]) for n in before) == (model in trained), model
    if "lora" in part:
        apart = base.unet.state_dict()
        base.load_lora_weights(resumed.weights / "lora")
        base.fuse_lora()
        base.unload_lora_weights()
        merged = base.unet.state_dict()
        assert merged.keys() == apart.keys()
        assert all(torch.allclose(merged[n], after, atol=1e-6) for n, after in pipe.unet.state_dict().items())


TURN = {"steps": 23, "checkpoint_every": 3, "keep": 99, "ema_decay": 0.9, "schedule": "cosine"}


@pytest.mark.timeout(600)
def test_methods_save_resume_and_export_and_ranks_may_change(maker, damaged, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Each method with some kinds of weights, every ZeRO stage once; with LoRA and text encoders too one rank goes on where two were. Twenty
    losses of one rank -> two at ZeRO 2 -> one are those of the one. bf16 follows float32. A damaged sample is skipped by all ranks. In two
    starts of two processes, since starting takes the time."""
    alone = maker("turn-alone", "dreambooth", **TURN)
    run_gang([str(alone.path)], World())
    grown = from_checkpoint(alone, 3, maker("turn-1-to-2", "dreambooth", zero=2, **TURN))
    half = maker("half", "dreambooth", zero=2, precision="bf16")
    found = cases(SOME, maker)
    still = maker("still", "dreambooth", zero=1, precision="bf16", lr=0.0, steps=1)
    on_two_ranks([*(whole for whole, _ in found.values()), grown, half, still], tmp_path)
    for (_, _, zero), (whole, _) in found.items():  # under ZeRO each rank has written what it holds
        parts = [load_file(whole.node("finetune") / f"checkpoints/step-00000004/rank-0000{rank}.safetensors") for rank in range(2)]
        assert all((name.count("/") == 2) == (zero > 0) for part in parts for name in part), zero
        sizes = [sum(value.numel() for value in part.values()) for part in parts]
        assert zero == 0 or min(sizes) > 0.95 * max(sizes), sizes
    skip = damaged("skip")
    on_two_ranks([*(from_checkpoint(whole, 2, resumed) for whole, resumed in found.values()), skip], tmp_path)
    shrunk = from_checkpoint(grown, 12, maker("turn-2-to-1", "dreambooth", **TURN))
    moved = {key: from_checkpoint(whole, 2, maker(f"moved-{name_of(*key)}", key[0], **PARTS[key[1]])) for key, (whole, _) in found.items()
             if key[1] != "unet"}
    run_gang([str(run.path) for run in (shrunk, *moved.values())], World())
    for key, run in moved.items():
        assert len(losses(run)) == 4
        assert losses(run)[2:] == pytest.approx(losses(found[key][0])[2:], abs=1e-4), key
    for (_, part, _), pair in found.items():
        check(part, *pair)
    for run, step in ((grown, 3), (shrunk, 12)):
        assert losses(run)[step:] == pytest.approx(losses(alone)[step:], abs=1e-4)
        for preview in ("00000000.png", "00000023.png"):  # two ranks draw half of each
            assert np.abs(picture(run, preview) - picture(alone, preview)).max() <= 1
    assert losses(half) == pytest.approx(losses(found["dreambooth", "unet", 2][0]), rel=0.03)
    assert losses(half) != losses(found["dreambooth", "unet", 2][0])
    before, after = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (Path(still.config().model.base), still.weights))
    assert all(torch.equal(before[name], after[name]) for name in before), "the float32 masters do not begin rounded to bf16"
    listed = (skip.node("finetune") / "bad-samples.csv").read_text().splitlines()[1:]
    assert listed
    assert {row.split(",")[0] for row in listed} <= set(damaged.keys)
    assert read_json(skip.done_path("finetune"))["metrics"]["bad_samples"] == len(listed)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_the_whole_matrix(maker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Every method and kind of weights at every ZeRO stage; the stages have the same losses."""
    found = cases(MATRIX, maker)
    on_two_ranks([whole for whole, _ in found.values()], tmp_path)
    on_two_ranks([from_checkpoint(whole, 2, resumed) for whole, resumed in found.values()], tmp_path)
    for (method, part, _), (whole, resumed) in found.items():
        check(part, whole, resumed)
        assert losses(whole) == pytest.approx(losses(found[method, part, 0][0]), abs=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_offload_has_the_same_losses_and_resumes(maker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """On CPUs, where the host's memory is the device's: the way through DeepSpeed's offloading code, not what it saves."""
    plain = maker("offload-none", "dreambooth", zero=2)
    runs = [[maker(f"offload-{where}-{zero}-{kind}", "dreambooth", zero=zero, offload=where) for kind in ("whole", "resumed")]
            for zero, where in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters"))]
    on_two_ranks([plain, *(whole for whole, _ in runs)], tmp_path)
    on_two_ranks([from_checkpoint(whole, 2, resumed) for whole, resumed in runs], tmp_path)
    for whole, resumed in runs:
        assert losses(whole) == pytest.approx(losses(plain), abs=1e-4)
        assert losses(resumed) == losses(whole)


@pytest.mark.soak  # compiling takes minutes
@pytest.mark.timeout(1500)
def test_compiled_it_has_the_same_losses_and_resumes(maker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kinds = {"unet-0": {"zero": 0}, "unet-2": {"zero": 2}, "lora-3": {"lora_rank": 4, "lr": 1e-3, "zero": 3, "gradient_checkpointing": True}}
    runs = [[maker(f"compiled-{name}-{kind}", "dreambooth", kind != "plain", **keys) for kind in ("plain", "whole", "resumed")]
            for name, keys in kinds.items()]
    on_two_ranks([run for plain, whole, _ in runs for run in (plain, whole)], tmp_path, 1200)
    on_two_ranks([from_checkpoint(whole, 2, resumed) for _, whole, resumed in runs], tmp_path)
    for plain, whole, resumed in runs:
        assert losses(whole) == pytest.approx(losses(plain), abs=1e-4)
        check("lora" if "lora" in whole.path.name else "unet", whole, resumed)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_elastic_between_all_stages(maker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Twenty losses after a change of ranks and stage are those without it: 2 ranks -> 1, 1 -> 2, and from each stage to another."""
    keys = {"steps": 23, "checkpoint_every": 3, "keep": 99, "ema_decay": 0.9, "schedule": "cosine"}
    alone = maker("elastic-alone", "dreambooth", **keys)
    run_gang([str(alone.path)], World())
    whole = {zero: maker(f"elastic-{zero}", "dreambooth", zero=zero, **keys) for zero in range(4)}
    back = from_checkpoint(alone, 3, maker("elastic-1-to-2", "dreambooth", zero=3, **keys))
    on_two_ranks([*whole.values(), back], tmp_path)
    turned = {(a, b): from_checkpoint(whole[a], 3, maker(f"elastic-{a}-to-{b}", "dreambooth", zero=b, **keys))
              for a, b in ((0, 1), (1, 3), (3, 2), (2, 0))}
    on_two_ranks(list(turned.values()), tmp_path)
    shrunk = [from_checkpoint(whole[a], 3, maker(f"elastic-{a}-to-alone", "dreambooth", **keys)) for a in (2, 3)]
    run_gang([str(run.path) for run in shrunk], World())
    expected = losses(alone)
    assert len(expected) == 23
    for run in (*whole.values(), back, *turned.values(), *shrunk):
        assert losses(run)[3:] == pytest.approx(expected[3:], abs=1e-4), run.path.name


def test_without_the_latent_cache_the_losses_are_the_same(maker) -> None:  # type: ignore[no-untyped-def]
    """The VAE in every step, on the same views, draws what is drawn from its cached posterior."""
    cached, uncached = (maker(f"cache-{cache}", "dreambooth", cache_latents=cache) for cache in (True, False))
    run_gang([str(cached.path), str(uncached.path)], World())
    assert losses(uncached) == pytest.approx(losses(cached), rel=1e-4)
    resumed = from_checkpoint(cached, 2, maker("cache-resumed", "dreambooth"))
    run_gang([str(resumed.path)], World())
    assert losses(resumed) == losses(cached), "one rank, whose convolutions lie channels-last"


def test_gradient_checkpointing_changes_no_loss(maker, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    kept, recomputed = (maker(f"recompute-{again}", "dreambooth", train_text_encoder=True, gradient_checkpointing=again) for again in (False, True))
    run_gang([str(kept.path)], World())
    parts, checkpoint = set(), torch.utils.checkpoint.checkpoint

    def seen(part, *inputs, **more):  # type: ignore[no-untyped-def]
        parts.add(type(part.__self__ if hasattr(part, "__self__") else part.args[0]).__name__)
        return checkpoint(part, *inputs, **more)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", seen)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", seen)
    run_gang([str(recomputed.path)], World())
    assert {"ResnetBlock2D", "CLIPEncoderLayer"} <= parts
    assert losses(recomputed) == pytest.approx(losses(kept), rel=1e-5)


@pytest.fixture(scope="module")
def damaged(maker):  # type: ignore[no-untyped-def]
    """``damaged(on_error)`` -> a run on a copy of the training images in whose first shard every image has a changed byte; ``damaged.keys``."""
    def make(how: str) -> RunDir:
        run = maker(f"damaged-{how}", "dreambooth", cache_latents=False, **{"caption_dropout": 0.0})
        cfg = run.config()
        cfg.data.on_error = how
        old, cfg.data.shards = cfg.data.shards, f"{cfg.data.shards}-damaged"
        run.config_path.write_text(config.dump(cfg))
        if not Path(cfg.data.shards).exists():
            shutil.copytree(Path(old) / "small-train", Path(cfg.data.shards) / "small-train")
        train = Path(cfg.data.shards) / "small-train"
        part = json.loads((train / "parts/00000.json").read_text())
        broken = bytearray((Path(old) / "small-train/00000.tar").read_bytes())
        for members in part["members"]:
            broken[members["jpg"][0] + 40] ^= 255
        (train / "00000.tar").write_bytes(broken)
        make.keys = part["keys"]  # type: ignore[attr-defined]
        return run

    return make


def test_a_damaged_sample_stops_all_ranks(damaged, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No hang: the rank that cannot read says so before a step, and both stop with the reason."""
    stop = damaged("stop")
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-m", "jobs.finetune", str(stop.path)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    said = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert all("is damaged: its jpg has another checksum than when it was written" in words for words in said)
    assert "damaged" in stop.failures("finetune")[0]


def test_a_lora_is_a_base_to_start_from_and_must_fit_it(maker, small_base: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Merged into its base it gives the weights that were exported with it; another base says that it has another shape."""
    tuned = maker("lora", "dreambooth", lora_rank=4, lora_alpha=8, lr=1e-2)
    run_gang([str(tuned.path)], World())
    model = Model(base=str(small_base), lora=str(tuned.weights / "lora"))
    merged, exported = diffusion.load_base(model).unet.state_dict(), diffusion.load_pipeline(tuned.weights).unet.state_dict()
    assert all(torch.equal(merged[name], exported[name]) for name in exported)
    halved = diffusion.load_base(Model(base=str(small_base), lora=str(tuned.weights / "lora"), lora_scale=0.5)).unet.state_dict()
    plain = diffusion.load_base(Model(base=str(small_base))).unet.state_dict()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.allclose(halved[name] - plain[name], (merged[name] - plain[name]) / 2, atol=1e-6)
    others = [Model(base=str(small_base)), Model(base=str(small_base), lora=model.lora, lora_scale=0.5)]
    assert len({diffusion.base_sha256(m) for m in (model, *others)}) == 3
    with pytest.raises(UserError, match="does not fit the base model, which has another shape: size mismatch for"):
        diffusion.load_base(Model(lora=model.lora))
    with pytest.raises(UserError, match="does not exist"):  # told by a launch, before anything is submitted
        hub.find_base(Model(lora=str(tmp_path / "none.safetensors")))


def test_noise_offset_and_prediction(maker) -> None:  # type: ignore[no-untyped-def]
    """Offset noise has a mean of its own in each channel; a model that is trained to predict velocity says so in its scheduler."""
    run = maker("velocity", "dreambooth", noise_offset=0.5, prediction="v_prediction", cache_latents=False)
    run_gang([str(run.path)], World())
    assert diffusion.load_pipeline(run.weights).scheduler.config.prediction_type == "v_prediction"
    cfg = run.config()
    pipe = diffusion.load_base(cfg.model)
    offset = Samples(cfg, run, pipe, "").batch(range(64))["noise"].mean(dim=(2, 3)).std().item()
    cfg.finetune.noise_offset = 0.0
    plain = Samples(cfg, run, pipe, "").batch(range(64))["noise"].mean(dim=(2, 3)).std().item()
    assert plain == pytest.approx(1 / 16, rel=0.3)
    assert offset == pytest.approx((0.5**2 + 1 / 256) ** 0.5, rel=0.2)


def test_views_are_crops_of_the_image_and_the_same_wherever_made() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cfg = Encode(flip=True, crops=3)
    made = views.views(image, "ISIC_1", cfg, 7)
    assert len(made) == views.count(cfg) == 6
    assert (made[0] == image).all()
    assert (made[1] == image[:, ::-1]).all()
    assert all((a == b).all() for a, b in zip(made, views.views(image, "ISIC_1", cfg, 7), strict=True))
    assert not (made[2] == views.views(image, "ISIC_2", cfg, 7)[2]).all()
    assert len({view.tobytes() for view in made}) == 6


def test_fewer_images_than_a_global_batch(maker) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"finetune.global_batch=256, but only \d+ training images are chosen"):
        run_gang([str(maker("few", "text-to-image", global_batch=256).path)], World())


def test_previews_over_time(maker) -> None:  # type: ignore[no-untyped-def]
    """A strip in the run folder and pictures in TensorBoard, each ``validate_every`` steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = maker("previews", "dreambooth", validate_every=2, lr=1e-2)
    cfg = run.config()
    cfg.generate.classes["benign"].prompts, cfg.generate.classes["benign"].count = ["a photo of a {diagnosis}"], 1
    run.config_path.write_text(config.dump(cfg))
    run_gang([str(run.path)], World())
    folder = run.node("finetune") / "previews"
    assert sorted(p.name for p in folder.iterdir()) == ["00000000.png", "00000002.png", "00000004.png", "prompts.json", "strip.png"]
    assert read_json(folder / "prompts.json") == ["a photo of a nevus", *cfg.generate.classes["malignant"].prompts], "filled, as generate's"
    assert Image.open(folder / "strip.png").size == (3 * 2 * 64 + 2 * 3, 2 * 64 + 14)
    assert (folder / "00000000.png").read_bytes() != (folder / "00000004.png").read_bytes()
    events = EventAccumulator(str(run.node("finetune") / "tensorboard"))
    events.Reload()
    assert [picture.step for picture in events.Images("previews")] == [2, 4]
    assert {"loss", "samples_per_second", "data_wait", "peak_memory_gb"} <= set(events.Tags()["scalars"])


def test_without_anything_to_generate_there_are_no_previews(maker) -> None:  # type: ignore[no-untyped-def]
    run = maker("previews-none", "dreambooth")
    cfg = run.config()
    for wanted in cfg.generate.classes.values():
        wanted.count, wanted.prompts = 0, []
    run.config_path.write_text(config.dump(cfg))
    run_gang([str(run.path)], World())
    assert run.is_done("finetune")
    assert not (run.node("finetune") / "previews").exists()


def test_previews_keep_no_stop_signal_waiting(maker, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """They are left out then; those of the end are drawn when the same command comes again."""
    run, world, draw = maker("previews-stopped", "dreambooth"), World(), Previews._piece

    def signalled(self: Previews, prompt: str, first: int) -> np.ndarray:
        world.stop = True
        return draw(self, prompt, first)

    with monkeypatch.context() as patched:
        patched.setattr(Previews, "_piece", signalled)
        with pytest.raises(Stopped, match="the same command"):
            run_gang([str(run.path)], world)
    assert not (run.node("finetune") / "previews").exists()
    assert not run.is_done("finetune")
    run_gang([str(run.path)], World())
    assert run.is_done("finetune")
    assert sorted(p.name for p in (run.node("finetune") / "previews").iterdir()) == ["00000000.png", "00000004.png", "prompts.json", "strip.png"]


def test_previews_that_do_not_fit_beside_the_training_are_left_out(maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    run = maker("previews-memory", "dreambooth")

    def too_much(self: Previews, prompt: str, first: int) -> np.ndarray:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(Previews, "_piece", too_much)
    run_gang([str(run.path)], World())
    assert run.is_done("finetune")
    assert "the previews of step 0 are left out, for lack of memory beside the training (rank 0: CUDA out of memory" in caplog.text
