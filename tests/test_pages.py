"""The report's pages: what is damaged is left out and said, and numbers are told as what they are."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_report import Page, check_page, make

from skinsynth.data.shards import Dataset
from skinsynth.files import read_json
from skinsynth.knobs import Config
from skinsynth.pages import figures, pictures, screening, several
from skinsynth.run import RunDir, Task
from skinsynth.stages import report as stage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDir]:
    cfg, run = make(tmp_path_factory.mktemp("pages"))
    stage.report(cfg, run, Task())
    return cfg, run


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


def test_the_limit_of_copies_is_told_as_measured(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    stage.report(cfg, run, Task())
    assert "by it 1.0 % of the real test images would be called copies" in words_of(run)
    assert "99.5" not in words_of(run).split("How to reproduce")[0]
    run.finish("screen", {k: v for k, v in run.metrics("screen").items() if k != "copy_false_alarms"}, [])
    stage.report(cfg, run, Task())
    assert "would be called copies" not in words_of(run)


def test_a_small_kid_keeps_its_digits_and_its_spread_is_explained(made: tuple[Config, RunDir]) -> None:
    found = {"kid": 0.31, "kid_std": 0.02, "kid_real": 0.00004, "kid_real_std": 0.00031}
    assert [value for _, value in screening.short(found)] == ["0.310 ± 0.020", "0.00004 ± 0.00031"]
    assert screening.tables({"kid": 0.1, "kid_std": 0.0042})[0].rows[0][3] == "0.1000 ± 0.0042"
    sheet = (made[1].dataset(made[0], "synthetic") / "DATASHEET.md").read_text()
    for text in (words_of(made[1]), sheet, (made[1].weights / "MODEL_CARD.md").read_text()):
        assert "the mean over 50 random subsets of up to 100 images a side, and the number after ± the standard deviation over these" in text


def test_what_is_plotted_stands_in_tables_and_no_colour_judges(made: tuple[Config, RunDir]) -> None:
    text = (made[1].path / "report/index.html").read_text()
    found = read_json(made[1].path / "report/report.json")
    epochs, bins = (re.search(rf"<details><summary>{name}.*?</details>", text, re.DOTALL)[0]  # type: ignore[index]
                    for name in ("The values of this plot", "The values of the reliability plot"))
    assert epochs.count("<tr>") == 1 + 2 * 2
    assert bins.count("<tr>") == 1 + sum(len(row["calibration"]) for row in found["arms"].values())
    assert f"<td>{found['arms']['hybrid']['calibration'][0]['share']:.3f}</td>" in bins
    assert not re.search(r"\.verdict \{[^}]*(green|--good)", text)


def test_the_commands_on_the_page_can_be_pasted(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    path = str(made[1].path)
    text = (made[1].path / "report/index.html").read_text()
    line = html.unescape(re.search("<pre[^>]*>(skinsynth launch.*?)</pre>", text)[1])  # type: ignore[index]
    assert shlex.split(line) == ["skinsynth", "launch", f"{path}/config.yaml", f"run={path}-again"]
    commands = [shlex.split(html.unescape(found)) for found in re.findall("<code>(python -m jobs.*?)</code>", text)]
    assert {command[2] for command in commands} == {f"jobs.{stage}" for stage in ("prepare", "finetune", "generate", "screen", "classify", "report")}
    assert {command[3] for command in commands} == {path}
    _, other = make(tmp_path / "second")
    compared = several.reports([path, other.path], tmp_path / "out").read_text()
    line = html.unescape(re.search("<pre[^>]*>(skinsynth report.*?)</pre>", compared)[1])  # type: ignore[index]
    assert shlex.split(line) == ["skinsynth", "report", path, str(other.path)]
