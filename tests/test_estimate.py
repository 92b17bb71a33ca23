"""Estimates: numbers that can be worked out by hand, sizes beside those of a real small run, and what each speed is said to come from."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, overrides, skinsynth
from rich.console import Console

from skinsynth import config, counts, slurm, speeds
from skinsynth.errors import UserError
from skinsynth.estimate import Stage, _number, _time, estimate, show
from skinsynth.files import read_json, write_json
from skinsynth.run import Progress, RunDir, Task

SLURM = """
kind: slurm
stages:
  default: {gpus_per_node: 1}
  finetune: {nodes: 2, tasks_per_node: 4, gpus_per_node: 4}
  generate: {array: 4, gpus_per_node: 1, minutes: 120}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(SLURM)
    return f"cluster={tmp_path / 'mine.yaml'}"


def stages(path: str, *items: str, earlier: Path | None = None) -> dict[str, Stage]:
    return {stage.node: stage for stage in estimate(config.load(path, list(items)), RunDir(earlier) if earlier else None)}


def generating(*more: str) -> list[str]:
    """Sixteen thousand images in sixteen shards."""
    return ["generate.classes.benign.count=8000", "generate.classes.malignant.count=8000", "generate.shard_size=1000", *more]


def test_published_speed_by_hand(cluster: str) -> None:
    """Four tasks of four shards at 0.63 images a second."""
    found = stages("configs/isic2020-sd15.yaml", cluster, *generating())["generate"]
    assert (found.amount, found.shards, found.tasks, found.ranks, found.devices) == (16000, 16, 4, 1, 4)
    assert found.seconds == pytest.approx(4000 / 0.63)
    assert found.hours == pytest.approx(16000 / 0.63 / 3600)
    assert found.device == "gpu"
    assert "A100" in found.source
    assert "guess" not in found.source


def test_too_long_for_the_limit(cluster: str) -> None:
    (told,) = stages("configs/isic2020-sd15.yaml", cluster, *generating("generate.steps=200"))["generate"].warnings
    assert told == "a task needs about 7.1 h, its limit is 2 h: Slurm will restart it 3 times; give more tasks (array) or time (minutes)"
    slow = stages("configs/isic2020-sd15.yaml", cluster, *generating("generate.steps=500"))["generate"]
    assert any("one shard alone needs 4.4 h" in told and "smaller generate.shard_size" in told for told in slow.warnings)


def test_idle_tasks_and_a_batch_that_does_not_fit(cluster: str) -> None:
    found = stages("configs/isic2020-sd15.yaml", cluster, *generating("generate.shard_size=8000", "finetune.global_batch=12"))
    assert "4 tasks share 2 shards: 2 have nothing to do" in found["generate"].warnings
    assert any("finetune.global_batch=12 cannot be shared by 8 ranks" in told for told in found["finetune"].warnings)


def test_another_size_is_a_guess_by_pixels_and_steps(cluster: str) -> None:
    found = stages("configs/isic2020-sd15.yaml", cluster, *generating("prepare.size=256", "generate.steps=25"))["generate"]
    assert found.rate == pytest.approx(0.63 * 4 * 2)
    assert "guess: scaled to 256 px, scaled to 25 steps" in found.source
    assert "built-in base model is much smaller" in stages("configs/demo.yaml", cluster)["generate"].source


def test_without_a_gpu_or_a_measurement_nothing_is_claimed() -> None:
    for stage in stages("configs/demo.yaml").values():
        assert (stage.rate, stage.seconds, stage.hours, stage.source) == (None, None, None, "unknown")


def test_a_gres_asks_for_gpus_too() -> None:
    cfg = config.load("configs/demo.yaml")
    for gres, count in (("gpu:4", 4), ("gpu", 1), ("gpu:a100:2", 2), ("gpu:a100", 1), ("nvme:1,gpu:3", 3), ("nvme:1", 0)):
        cfg.cluster.gres = gres
        assert speeds.gpus(cfg, "encode") == count, gres


@pytest.mark.parametrize(("gres", "count"), [("gpu:2080ti:4", 4), ("gpu:tesla-v100:2", 2), ("gpu:nvidia_a100-sxm4-80gb:4", 4), ("gpu:1g.10gb:1", 1),
                                             ("gpu:a100_3g.20gb:2", 2), ("gpu:2080ti", 1), ("nvme:1,gpu:h100-nvl:3", 3), ("gres/gpu:a100:2", 2),
                                             ("gpu:a100:4(S:0-1)", 4), ("gpu:4", 4), ("gpu", 1), ("mygpu:2", 0), ("gpufs:1", 0)])
def test_a_kind_of_gpu_may_be_called_anything(gres: str, count: int) -> None:
    cfg = config.load("configs/demo.yaml")
    cfg.cluster.gres = gres
    assert speeds.gpus(cfg, "encode") == count


def test_a_gres_without_gpus_per_node_is_all_that_slurm_is_asked_for(tmp_path: Path) -> None:
    cfg = config.load("configs/demo.yaml", ["cluster=configs/cluster/slurm.yaml"])
    stage = cfg.cluster.stages["finetune"]
    stage.gres, stage.gpus_per_node = "gpu:a100:4", 0
    asked = slurm.parameters(cfg, RunDir(tmp_path), "finetune", [])
    assert asked["gres"] == "gpu:a100:4"
    assert "gpus_per_node" not in asked


def test_real_images_that_cannot_be_counted(tmp_path: Path) -> None:
    found = stages("configs/demo.yaml", f"data.metadata={tmp_path / 'none.csv'}")
    assert found["prepare"].amount is found["prepare"].bytes is found["encode"].amount is found["screen"].shards is None
    assert "none.csv does not exist" in found["prepare"].warnings[0]
    assert found["generate"].amount == 400


def test_counts_and_sizes_beside_what_a_run_made(chain: Path, drawn: Path) -> None:
    """Counts to the image, or within the few that whole groups move between splits; sizes within a factor of two."""
    run, shards = RunDir(chain / "run"), chain / "shards"
    found = stages("configs/demo.yaml", *overrides(drawn, chain), earlier=run.path)
    made = {name: json.loads((shards / f"{name}/manifest.json").read_text())
            for name in ("small-train", "small-val", "small-test", "run-latents", "run-synthetic")}
    real = sum(made[name]["count"] for name in ("small-train", "small-val", "small-test"))
    assert found["generate"].amount == made["run-synthetic"]["count"] == 27
    assert found["generate"].shards == len(made["run-synthetic"]["shards"])
    assert real <= found["prepare"].amount <= real + 10  # the unreadable ones are found only when they are read
    planted = 5 * made["small-train"]["count"]
    assert found["screen"].amount == pytest.approx(found["prepare"].amount + 27 + planted, abs=60)
    told = sum(json.loads(path.read_text())["total"] for path in run.node("screen").glob("progress/*.json"))
    assert told == real + 27 + planted, "what it worked through"
    assert found["encode"].amount == pytest.approx(made["run-latents"]["count"], abs=12)
    there = sum(path.stat().st_size for path in (run.node("screen") / "parts").iterdir())
    assert there / 3 < found["screen"].bytes < there * 2
    for node, folders in (("generate", ["run-synthetic"]), ("encode", ["run-latents"]), ("prepare", ["small-train", "small-val", "small-test"])):
        there = sum(path.stat().st_size for name in folders for path in (shards / name).rglob("*") if path.is_file())
        assert there / 2 < found[node].bytes < there * 2, node
    for node in ("finetune", "classify/hybrid"):
        there = sum(path.stat().st_size for path in run.node(node).rglob("*") if path.is_file())
        assert there / 2 < found[node].bytes < there * 3, node  # at most: with a checkpoint more while it is written


def test_measured_speed_is_the_runs_own_and_says_so(chain: Path, drawn: Path) -> None:
    run = RunDir(chain / "run")
    found = stages("configs/demo.yaml", *overrides(drawn, chain), earlier=run.path)
    parts = [json.loads(path.read_text()) for path in run.node("generate").glob("progress/*.json")]
    spent = sum(part["now"] - part["first"]["now"] for part in parts)
    assert [part["first"]["done"] for part in parts] == [4, 4], "of nine or eighteen images each, in batches of four"
    assert found["generate"].rate == pytest.approx((27 - 8) / spent)
    assert found["generate"].hours == pytest.approx(27 / 19 * spent / 3600 * found["generate"].devices / 2)
    assert found["generate"].source.startswith(f"measured in {run.path} (tasks: 2, no GPU")
    assert "guess" not in found["generate"].source
    part = json.loads(run.progress_path("finetune", 0).read_text())
    assert found["finetune"].seconds == pytest.approx(8 / 7 * (part["now"] - part["first"]["now"]))


def told(run: RunDir, node: str, *parts: tuple[int, float, int | None, float, int]) -> None:
    """Progress files: what was there before, when it began, what was done at the end of the first batch and when, and what was after ten
    minutes."""
    for number, (begun, start, first, when, done) in enumerate(parts):
        state = {"begun_at": begun, "start": start, "done": done, "total": done, "unit": "images", "now": 600.0}
        write_json(run.progress_path(node, number), state if first is None else {**state, "first": {"done": first, "now": when}})


def test_what_comes_before_the_first_batch_is_done_is_not_scaled(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """Two tasks load networks for nine minutes and make fifteen of sixteen batches in the tenth; a third has one batch alone, which tells
    nothing."""
    cfg, run = config.load("configs/demo.yaml", overrides(drawn, chain, **{"generate.steps": 20})), RunDir(tmp_path)
    (tmp_path / "config.yaml").write_bytes((chain / "run" / "config.yaml").read_bytes())
    told(run, "generate", (0, 0.0, 4, 540.0, 64), (8, 0.0, 12, 540.0, 72), (0, 0.0, 4, 540.0, 4))
    told(run, "screen", (0, 0.0, 30, 540.0, 630))
    found = {node: speeds.measured(cfg, node, run) for node in ("generate", "screen")}
    assert found["generate"] and found["screen"]  # noqa: PT018
    assert found["generate"].per_second == pytest.approx(1 / 5), "a fifth of the steps"
    assert found["screen"].per_second == pytest.approx(10)
    assert "counted in" not in found["generate"].source + found["screen"].source
    shutil.rmtree(run.node("generate"))
    told(run, "generate", (0, 0.0, None, 0, 60), (0, 300.0, 4, 599.0, 30))
    old = speeds.measured(cfg, "generate", run)
    assert old is not None
    assert old.per_second == pytest.approx(26 / 5), "one that knows of its start, beside one of an earlier version"
    told(run, "generate", (0, 0.0, None, 0, 60), (0, 300.0, 30, 600.0, 30))
    old = speeds.measured(cfg, "generate", run)
    assert old is not None
    assert old.per_second == pytest.approx(90 / 900 / 5)
    assert old.source.endswith("scaled from 4 steps, here 20, its start, which is slower, is counted in")


def test_progress_notes_when_the_first_batch_of_this_turn_was_done(tmp_path: Path) -> None:
    progress = Progress(RunDir(tmp_path), "generate", 0, 100, "images", done=20)
    begun = progress.state["start"]
    time.sleep(0.02)
    progress.ready()
    assert progress.state["start"] > begun
    progress.go_on(0)
    progress.go_on(5)
    assert progress.state["first"] is None, "what was saved earlier is no batch of this turn"
    progress.advance(4)
    first = dict(progress.state["first"])
    assert (first["done"], first["now"]) == (29, progress.state["now"])
    progress.advance(4)
    assert progress.state["first"] == first
    progress.go_on(7)
    assert progress.state["first"] == {**first, "done": 36}, "nor is what is found saved of a later unit work since then"
    progress.set(100)
    assert read_json(progress.path)["first"]["done"] == 36


def test_loading_the_networks_is_no_part_of_a_single_batch(chain: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skinsynth.stages import generate

    class Slow:
        def __init__(self, *_: object) -> None:
            time.sleep(1.5)

        def draw(self, batch: list[object]) -> tuple[torch.Tensor, torch.Tensor]:
            noise = np.random.default_rng(0).integers(0, 255, (len(batch), 64, 64, 3), np.uint8)
            return torch.from_numpy(noise), torch.ones(len(batch), dtype=torch.bool)

    monkeypatch.setattr(generate, "Painter", Slow)
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"generate.batch": 27, "generate.shard_size": 27}))
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    shutil.copytree(chain / "run/finetune/weights", run.weights, copy_function=os.link)
    begun = time.time()
    generate.generate(cfg, run, Task())
    state, rate = read_json(run.progress_path("generate", 0)), speeds.measured(cfg, "generate", run)
    assert state["first"]["done"] == state["done"] == 27
    assert state["start"] >= begun + 1.5
    assert rate is not None
    assert rate.per_second == pytest.approx(27 / (state["now"] - state["start"]))
    assert "its start, which is slower, is counted in" in rate.source


def test_measured_speed_of_other_work(chain: Path, drawn: Path, cluster: str) -> None:
    """Scaled by pixels and steps and called a guess; a CPU's says nothing of a GPU, one model's nothing of another."""
    before = stages("configs/demo.yaml", *overrides(drawn, chain), earlier=chain / "run")["generate"]
    larger = stages("configs/demo.yaml", *overrides(drawn, chain), "prepare.size=128", "generate.steps=8", earlier=chain / "run")["generate"]
    assert before.rate is not None
    assert larger.rate == pytest.approx(before.rate / 4 / 2)
    assert "here a guess: scaled from 64 px, here 128, scaled from 4 steps, here 8" in larger.source
    gpu = stages("configs/demo.yaml", *overrides(drawn, chain), cluster, earlier=chain / "run")
    assert "published" in gpu["generate"].source
    assert gpu["screen"].source == "unknown"
    other = stages("configs/demo.yaml", *overrides(drawn, chain), "classify.layers=5", earlier=chain / "run")
    assert other["classify/hybrid"].source == "unknown"


def test_steps_and_passes_are_those_that_are_really_run(chain: Path, drawn: Path, cluster: str) -> None:
    """From an image a share of the steps alone is run, and without guidance the UNet is asked once a step."""
    start, plain = ["generate.method=image-to-image", "generate.strength=0.2"], "generate.guidance=1"
    published = {name: stages("configs/isic2020-sd15.yaml", cluster, *generating(*items))["generate"]
                 for name, items in (("as it is", []), ("image", start), ("plain", [plain]), ("both", [*start, plain]),
                                     ("anew", [start[0], "generate.strength=1"]))}
    rates = {name: found.rate for name, found in published.items()}
    assert rates == pytest.approx({"as it is": 0.63, "image": 0.63 * 5, "plain": 0.63 * 2, "both": 0.63 * 10, "anew": 0.63})
    assert "here a guess: scaled to 10 steps (of 50, strength 0.2), what image-to-image starts from must be encoded too" in published["image"].source
    assert "here a guess: scaled to one pass of the UNet a step, since guidance is 1" in published["plain"].source
    assert "here a guess: what image-to-image starts from must be encoded too" in published["anew"].source
    measured = [stages("configs/demo.yaml", *overrides(drawn, chain), *items, earlier=chain / "run")["generate"]
                for items in ([], ["generate.steps=40", *start], [plain], ["generate.method=inpaint", "generate.strength=1"])]
    assert measured[0].rate is not None
    assert [found.rate for found in measured] == pytest.approx([measured[0].rate * factor for factor in (1, 4 / 8, 2, 1)])
    assert "here a guess: scaled from 4 steps, here 8, it had text-to-image as its method, here image-to-image" in measured[1].source
    assert "here a guess: scaled from 2 passes of the UNet a step, here 1" in measured[2].source
    batch = stages("configs/demo.yaml", *overrides(drawn, chain), "generate.batch=32", earlier=chain / "run")["generate"]
    assert batch.source.endswith("here a guess: it had 4 images a batch, here 32")
    assert "here a guess: it had text-to-image as its method, here inpaint" in measured[3].source


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.2), (50, 0.57), (20, 0.99), (4, 1.0), (7, 0.15), (30, 0.6)])
@pytest.mark.parametrize("method", ["image-to-image", "inpaint"])
def test_steps_are_counted_as_diffusers_does(method: str, steps: int, strength: float) -> None:
    import diffusers

    kind = diffusers.StableDiffusionInpaintPipeline if method == "inpaint" else diffusers.StableDiffusionImg2ImgPipeline
    for scheduler in (diffusers.DPMSolverMultistepScheduler(), diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler()):
        scheduler.set_timesteps(steps)
        cfg = config.load("configs/demo.yaml", [f"generate.method={method}", f"generate.steps={steps}", f"generate.strength={strength}"])
        taken, _ = kind.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
        assert speeds.steps_run(cfg) == len(taken)


def test_as_many_copies_are_planted_as_screen_plants() -> None:
    assert [counts.Counts(train=train).planted for train in (None, 0, 66, 5000)] == [None, 0, 330, 1000]


def elsewhere(drawn: Path, chain: Path, folder: Path, *items: str) -> list[str]:
    """The small run's data, but that they are said to lie prepared at another place."""
    return [*overrides(drawn, folder), "data.metadata=null", "data.images=null", "data.duplicates=null",
            f"data.remote={chain / 'shards'}", *items]


def test_what_lies_elsewhere_is_counted_once_its_manifests_are_here(chain: Path, drawn: Path, tmp_path: Path) -> None:
    items = elsewhere(drawn, chain, tmp_path)
    before = stages("configs/demo.yaml", *items)
    assert before["prepare"].amount is before["screen"].amount is before["encode"].amount is None
    assert before["prepare"].warnings[0] == (
        "the real images cannot be counted: how many lie at data.remote is known once prepare has brought their manifests into "
        f"{tmp_path / 'shards'}, as 'launch --until prepare' does")
    shown = skinsynth("estimate", "configs/demo.yaml", *items, "generate.amount=real").stdout
    assert "to generate: unknown: how many lie at data.remote is known once prepare" in shown
    assert "data.metadata" not in shown
    made = {}
    for split in ("train", "val", "test"):  # the index alone, as prepare brings it
        shutil.copytree(chain / f"shards/small-{split}", tmp_path / f"shards/small-{split}", ignore=shutil.ignore_patterns("*.tar"))
        made[split] = read_json(chain / f"shards/small-{split}/manifest.json")
    found = stages("configs/demo.yaml", *items)
    real = sum(manifest["count"] for manifest in made.values())
    assert (found["prepare"].amount, found["prepare"].shards) == (real, sum(len(manifest["shards"]) for manifest in made.values()))
    assert found["encode"].amount == read_json(chain / "shards/run-latents/manifest.json")["count"]
    assert found["screen"].amount == real + 27 + 5 * made["train"]["count"]
    assert found["prepare"].warnings == []
    assert stages("configs/demo.yaml", *items, "generate.amount=balance")["generate"].amount == abs(
        made["train"]["classes"]["0"] - made["train"]["classes"]["1"])
    assert stages("configs/demo.yaml", *items, earlier=chain / "run")["prepare"].rate is None, "of these images it makes nothing"
    (tmp_path / "shards/small-test/manifest.json").unlink()
    assert stages("configs/demo.yaml", *items)["prepare"].amount is None


def test_metadata_that_are_here_tell_about_how_many_lie_elsewhere(chain: Path, drawn: Path, tmp_path: Path) -> None:
    items = elsewhere(drawn, chain, tmp_path, f"data.metadata={drawn / 'metadata.csv'}")
    assert stages("configs/demo.yaml", *items)["prepare"].amount == 120
    gone = stages("configs/demo.yaml", *items, f"data.metadata={tmp_path / 'none.csv'}")["prepare"]
    assert "data.remote" in gone.warnings[0]


def test_a_resumed_stage_is_measured_by_its_losses(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """A launch that found all done leaves a progress file that saw nothing."""
    run = RunDir(tmp_path)
    (tmp_path / "config.yaml").write_bytes((chain / "run" / "config.yaml").read_bytes())
    (tmp_path / "finetune" / "progress").mkdir(parents=True)
    (tmp_path / "finetune" / "progress" / "0.json").write_text(
        '{"done": 8, "total": 8, "unit": "steps", "begun_at": 8, "start": 1.0, "now": 1.0}')
    (tmp_path / "finetune" / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "samples_per_second": {s}}}\n' for i, s in enumerate((1, 6, 8))))
    found = speeds.measured(config.load("configs/demo.yaml", overrides(drawn, chain)), "finetune", run)
    assert found is not None
    assert found.per_second == 3  # of each of two ranks


def test_no_number_has_an_exponent() -> None:
    assert [_time(3600.0 * hours) for hours in (1, 7.13, 99.4, 123.4, 1234)] == ["1 h", "7.1 h", "99.4 h", "123 h", "1,234 h"]
    assert [_time(seconds) for seconds in (None, 0.25, 59, 600, 3594)] == ["unknown", "0.25 s", "59.0 s", "10.0 min", "59.9 min"]
    assert [_number(value) for value in (0.042, 3.14159, 42.42, 700, 12345.6)] == ["0.042", "3.1", "42.4", "700", "12,346"]


def test_in_a_pipe_the_table_is_not_cut(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's 80 columns are nobody's there, unless COLUMNS says so."""
    monkeypatch.delenv("COLUMNS", raising=False)
    cfg = config.load("configs/isic2020-sd15.yaml", [cluster, *generating("generate.classes.benign.count=40000000")])
    console = Console(file=io.StringIO(), width=80)
    show(console, cfg, estimate(cfg, None))
    table = console.file.getvalue().split("to generate")[0]  # type: ignore[attr-defined]
    (line,) = (line for line in table.splitlines() if " generate " in line)
    for cell in ("40,008,000 images", "40,008", "17,640 GPU h", "4,410 h", "2 h", "0.63/s [3]"):
        assert f" {cell} " in line, line
    assert "…" not in table
    monkeypatch.setenv("COLUMNS", "80")
    narrow = Console(file=io.StringIO(), width=80)
    show(narrow, cfg, estimate(cfg, None))
    assert max(map(len, narrow.file.getvalue().split("to generate")[0].splitlines())) <= 80  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "lines"), [(60, 3), (80, 2), (100, 2), (160, 1)])
def test_on_a_narrow_terminal_nothing_is_cut(width: int, lines: int, cluster: str) -> None:
    """What does not fit beside stands below, each time with the stage's name."""
    cfg = config.load("configs/isic2020-sd15.yaml", [cluster, *generating("generate.classes.benign.count=40000000")])
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(console, cfg, estimate(cfg, None))
    text = console.file.getvalue().split("to generate")[0]  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert {line[-1] for line in text.splitlines() if line[0] in "┏┃┡│└"} == set("┓┃┩│┘"), "cut off at the right"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│ generate " in line]
    assert len(rows) == lines
    assert {row[0] for row in rows} == {"generate"}
    assert [cell for row in rows for cell in row[1:]] == ["40,008,000 images", "4,410 h", "2 h", "17,640 GPU h", "1.79 TB", "40,008", "4", "1",
                                                          "0.63/s [3]"]
    words = text.replace("┃", " ").split()
    for heading in ("does", "longest", "task", "limit", "GPU", "or", "core", "hours", "writes", "shards", "tasks", "ranks", "speed"):
        assert heading in words


def test_from_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        stages("configs/demo.yaml", earlier=tmp_path)


def test_the_command(chain: Path, drawn: Path) -> None:
    arguments = ("estimate", "configs/demo.yaml", *overrides(drawn, chain), "generate.classes.benign.count=40000")
    shown = skinsynth(*arguments, "--from", str(chain / "run"))
    assert shown.returncode == 0, shown.stderr
    assert "40,014 images" in shown.stdout
    assert f"[1] images a second of one task or rank, measured in {chain / 'run'}" in shown.stdout
    told = json.loads(skinsynth(*arguments, "--json").stdout)
    assert [stage["node"] for stage in told["stages"]][:4] == ["prepare", "encode", "finetune", "generate"]
    assert told["bytes"] == sum(stage["bytes"] for stage in told["stages"])


def test_no_torch_is_imported(drawn: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from skinsynth import config, estimate
estimate.estimate(config.load("configs/demo.yaml", {overrides(drawn, tmp_path)!r}))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_the_plan_is_printed_and_follows_the_training_split(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """As many as lack to the larger class: about, from the metadata; and exactly, once prepare has split them."""
    items = [*overrides(drawn, tmp_path), "generate.amount=balance", "generate.negative_prompt=ruler"]
    before = json.loads(skinsynth("estimate", "configs/demo.yaml", *items, "--json").stdout)["plan"]
    assert before["approximate"]
    shutil.copytree(chain / "shards/small-train", tmp_path / "shards/small-train", copy_function=os.link)
    classes = read_json(tmp_path / "shards/small-train/manifest.json")["classes"]
    plan = json.loads(skinsynth("estimate", "configs/demo.yaml", *items, "--json").stdout)["plan"]
    assert plan["classes"]["malignant"]["images"] == classes["0"] - classes["1"] == plan["images"]
    assert abs(before["images"] - plan["images"]) <= 3
    assert "benign" not in plan["classes"]
    shown = skinsynth("estimate", "configs/demo.yaml", *items).stdout
    assert f"to generate: {plan['images']} images in {plan['shards']} shards of 9 (amount: balance); text-to-image, finetuned weights" in shown
    assert "negative prompt 'ruler'" in shown
    assert f"malignant (target 1): {plan['images']}: a dermoscopy image of a large dark brown" in shown
    assert stages("configs/demo.yaml", *items)["generate"].amount == plan["images"]


def test_a_gang_that_generates(cluster: str) -> None:
    """Two nodes of two ranks each draw as fast as four tasks do."""
    gang = [cluster, "generate.mode=gang", "cluster.stages.generate.nodes=2", "cluster.stages.generate.tasks_per_node=2",
            "cluster.stages.generate.gpus_per_node=2"]
    found, alone = (stages("configs/isic2020-sd15.yaml", *generating(*items))["generate"] for items in (gang, [cluster]))
    assert (found.tasks, found.ranks, found.devices) == (1, 4, 4)
    assert (found.seconds, found.hours) == (alone.seconds, alone.hours)
