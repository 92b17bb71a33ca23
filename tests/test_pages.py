"""The report's pages: what is damaged is left out and said."""

from __future__ import annotations

import shutil
from pathlib import Path

from test_report import Page, check_page, make

from skinsynth.data.shards import Dataset
from skinsynth.knobs import Config
from skinsynth.pages import figures, pictures
from skinsynth.run import RunDir, Task
from skinsynth.stages import report as stage


def words(text: str) -> str:
    return " ".join(Page(text).words.split())


def words_of(run: RunDir) -> str:
    return words((run.path / "report/index.html").read_text())


def armless(folder: Path) -> tuple[Config, RunDir]:
    """Without the arms' figures, which take seconds to resample."""
    cfg, run = make(folder)
    shutil.rmtree(run.path / "classify")
    return cfg, run


def damage(folder: Path, number: int) -> None:
    """One image's bytes in its tar."""
    offset, size, *_ = Dataset.open(folder).places[number][1]["jpg"]
    with open(folder / "00000.tar", "r+b") as tar:
        tar.seek(offset)
        tar.write(bytes(size))


def test_a_damaged_image_is_left_out_and_named(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    damage(run.dataset(cfg, "train"), 3)
    damage(run.dataset(cfg, "synthetic"), 1)
    stage.report(cfg, run, Task())
    text = " ".join(check_page((run.path / "report/index.html").read_text()).words.split())
    assert "2 images that would be shown cannot be read and are left out: train-3 (isic-train/00000.tar: is damaged" in text
    assert "syn-1 (run <i>&-synthetic/00000.tar: is damaged" in text
    bad: dict[str, str] = {}
    counts = {(name, source): n for name, source, n, _ in pictures.grids(cfg, run, bad)}
    assert counts == {("benign", "real"): 12, ("benign", "synthetic"): 6, ("malignant", "real"): 12, ("malignant", "synthetic"): 5}
    assert pictures.pairs(cfg, run, bad) == []  # its training image is train-3


def test_a_torn_log_is_no_crash(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    (run.node("finetune") / "metrics.jsonl").write_text('{"step": 1, "loss": 0.3}\n{"step": 2, "loss": 0.2}\n{"step": 3, "lo')
    assert [row["step"] for row in figures.lines(run.node("finetune") / "metrics.jsonl")] == [1, 2]
    stage.report(cfg, run, Task())
    assert "loss of fine-tuning" in words_of(run)


def test_an_agreement_without_auroc_is_no_crash(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    shares = {"benign": {"synthetic": 0.5, "real_val": 0.6}, "malignant": {"synthetic": 0.5, "real_val": None}}
    run.finish("screen", {**run.metrics("screen"), "agreement": {"auroc_val": None, "per_class": shares}}, [])
    stage.report(cfg, run, Task())
    assert "The AUROC of that classifier of real images is not known" in words_of(run)
