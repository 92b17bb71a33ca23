"""report: figures against the libraries, an honest verdict, one file that asks for nothing, the same bytes again."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from skinsynth.data.codec import encode_jpeg
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Arm, Config, GeneratedClass
from skinsynth.pages import figures, pictures, screening, several
from skinsynth.quality.metrics import METRICS, binary_metrics
from skinsynth.run import RunDir, Task
from skinsynth.stages import report as stage


def dataset(folder: Path, prefix: str, n: int, **columns: object) -> list[str]:
    """Coloured noise, one colour per sample."""
    keys = [f"{prefix}-{i}" for i in range(n)]
    with ShardWriter(folder, 0) as shard:
        for i, key in enumerate(keys):
            image = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            shard.add(key, {"jpg": encode_jpeg(image, 90), "json": b"{}"}, target=i % 2, **columns)
    write_manifest(folder, 1, kind="synthetic" if prefix == "syn" else "real")
    return keys


def arm(run: RunDir, name: str, score: np.ndarray, target: np.ndarray, samples: dict[str, int]) -> None:
    """A finished arm of one seed, as runs of the first releases have it."""
    folder = run.node(f"classify/{name}")
    one_seed(folder, target, score)
    run.finish(f"classify/{name}", {**binary_metrics(target, score), "chosen_step": 20, "steps": 20, "train_samples": samples},
               [folder / "predictions.csv"])


def one_seed(folder: Path, target: np.ndarray, score: np.ndarray, **columns: list[object]) -> None:
    folder.mkdir(parents=True)
    rows = zip((f"k{i}" for i in range(len(target))), (f"g{i // 2}" for i in range(len(target))), target.tolist(), score.tolist(), *columns.values(),
               strict=True)
    with open(folder / "predictions.csv", "w", newline="") as f:
        csv.writer(f).writerows([["key", "group", "target", "score", *columns], *rows])
    row = binary_metrics(target, score) | {"loss": 0.5}
    (folder / "epochs.jsonl").write_text("".join(json.dumps({"step": s, "epoch": s / 10, "val": row} | ({} if columns else {"test": row})) + "\n"
                                                 for s in (10, 20)))


def seeded(run: RunDir, name: str, scores: list[np.ndarray], target: np.ndarray, done: bool = True) -> None:
    """An arm of several seeds, with what is known of the images."""
    n = len(target)
    columns = {"sex": ["female" if i % 3 else "male" for i in range(n)], "age": [["", 35, 52.0, 85][i % 4] for i in range(n)],
               "site": ["torso" if i < n - 6 else "" for i in range(n)], "diagnosis": ["nevus"] * n}
    for seed, score in enumerate(scores):
        folder = run.node(f"classify/{name}/seed-{seed}")
        one_seed(folder, target, score, **columns)
        write_json(folder / "metrics.json", {**binary_metrics(target, score), "chosen_step": 10 + 10 * (seed % 2), "steps": 20,
                                             "train_samples": {"real": 30}})
    if done:
        run.finish(f"classify/{name}", {"seeds": list(range(len(scores)))}, [])


def scores_of(target: np.ndarray, strength: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=len(target)) * 0.4 + np.random.default_rng(seed + 1).normal(size=len(target)) * 0.3
    return 1 / (1 + np.exp(-(strength * (target - 0.5) + noise)))


def make(folder: Path, gain: float = 1.0, classes: int = 2, arms: tuple[str, ...] = (), strengths: tuple[float, ...] = ()) -> tuple[Config, RunDir]:
    """A finished run without its work: a weak baseline, and a hybrid that is better by ``gain``; or the named arms, each of three seeds."""
    cfg, run = Config(run=str(folder / "run <i>&")), RunDir(folder / "run <i>&")
    cfg.data.shards = str(folder / "shards")
    mixed = {"real": 1.0, "synthetic": 1.0}
    cfg.classify.arms = {a: Arm({"real": 1.0} if a in ("real", "baseline") else mixed) for a in arms or ("baseline", "hybrid")}
    cfg.generate.classes = {"benign": GeneratedClass(0, ["a <b>mole</b>"], 7), "malignant": GeneratedClass(1, ["a melanoma"], 8)}
    run.create(cfg)
    train = dataset(folder / "shards/isic-train", "train", 30)
    synthetic = dataset(run.dataset(cfg, "synthetic"), "syn", 15)
    write_json(run.node("screen") / "accepted.json", {"keys": synthetic[:12]})
    write_json(run.node("screen") / "pairs.json", [{"key": synthetic[14], "train_key": train[3], "similarity": 0.97, "nearness": 0.91,
                                                    "rejected": "copy"}])
    run.finish("screen", {"generated": 15, "accepted": 12, "rejected": {"broken": 0, "blank": 1, "copy": 2, "duplicate": 0}, "kid": 0.31,
                          "kid_std": 0.02, "kid_real": 0.01, "kid_real_std": 0.02, "features": "builtin-vae", "copy_threshold": 0.7,
                          "copy_recall": 0.97, "copy_planted": 30, "copy_false_alarms": 0.01,
                          "kid_per_class": {"benign": {"kid": 0.3, "kid_std": 0.1, "accepted": 11},
                                            "malignant": {"kid": None, "kid_std": None, "accepted": 1}}},
               [])
    write_json(run.weights / "lineage.json", {"base": "builtin", "weights_sha256": "ab" * 32, "train": "isic-train", "group_ids": ["g1", "g2"]})
    split = {"images": 80, "classes": {"0": 40, "1": 40}, "groups": 40, "patients": 0}
    run.finish("prepare", {"train": split, "val": split, "test": split, "set_aside": {"total": 2, "reasons": {"cannot be decoded": 2}}}, [])
    target = np.arange(80) % classes
    rng = np.random.default_rng(0)
    for name, strength in zip(arms, strengths, strict=True):
        seeded(run, name, [scores_of(target, strength, seed) for seed in range(3)], target)
    for name, strength in (("baseline", 0.5), ("hybrid", 0.5 + gain)) if not arms else ():
        score = 1 / (1 + np.exp(-(strength * (target - 0.5) + rng.normal(size=80) * 0.5)))
        arm(run, name, score, target, {"real": 30} if name == "baseline" else {"real": 30, "synthetic": 12})
    return cfg, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDir]:
    cfg, run = make(tmp_path_factory.mktemp("report"))
    stage.report(cfg, run, Task())
    return cfg, run


class Page(HTMLParser):
    """Tags that are opened and not closed, attributes, and the words."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(run: RunDir) -> Page:
    return Page((run.path / "report/index.html").read_text())


def test_report_json_has_the_promised_form_and_nothing_that_changes(made: tuple[Config, RunDir]) -> None:
    _, run = made
    text = (run.path / "report/report.json").read_text()
    found = json.loads(text)
    assert set(found["arms"]) == {"baseline", "hybrid"}
    for metric in METRICS:
        value = found["arms"]["hybrid"][metric]
        assert value["value"] == pytest.approx(run.metrics("classify/hybrid")[metric], abs=1e-6)
        assert value["seeds"] == [value["value"]]
        if metric == "ece":
            assert value["ci"] is None, "a bootstrap moves the calibration error upwards"
        else:
            assert value["ci"][0] <= value["value"] <= value["ci"][1], metric
    assert found["arms"]["hybrid"]["train_samples"] == {"real": 30, "synthetic": 12}
    assert (found["synthetic"]["generated"], found["synthetic"]["accepted"], found["synthetic"]["kid"]) == (15, 12, 0.31)
    assert found["data"]["test"]["classes"] == {"0": 40, "1": 40}
    assert found["unfinished"] == {}
    assert str(run.path.parent) not in text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    assert run.is_done("report")


def test_a_perfect_arm_has_no_interval_and_the_page_says_why(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, gain=2.5)
    stage.report(cfg, run, Task())
    found = read_json(run.path / "report/report.json")["arms"]["hybrid"]
    assert (found["auroc"]["value"], found["auroc"]["ci"]) == (1.0, None)
    assert found["sensitivity"]["ci"] == pytest.approx([0.025 ** (1 / 40), 1], abs=1e-6)  # 40 groups, one malignant image each
    assert "1.000–" in page(run).words
    assert "a dash where no resample differs" in page(run).words


def test_made_again_it_is_the_same_to_the_byte(made: tuple[Config, RunDir]) -> None:
    cfg, run = made
    files = [*(run.path / "report").iterdir(), run.weights / "MODEL_CARD.md", run.dataset(cfg, "synthetic") / "DATASHEET.md"]
    before = {p: p.read_bytes() for p in files}
    stage.report(cfg, run, Task())
    assert {p.name for p in (run.path / "report").iterdir()} == {"index.html", "report.json", "done.json"}
    assert {p: p.read_bytes() for p in files} == before


def test_the_interval_holds_the_difference(made: tuple[Config, RunDir]) -> None:
    _, run = made
    report = read_json(run.path / "report/report.json")
    auroc = next(d for d in report["differences"] if d["metric"] == "auroc")
    values = {name: row["auroc"]["value"] for name, row in report["arms"].items()}
    assert auroc["arms"] == ["hybrid", "baseline"]
    assert auroc["value"] == pytest.approx(values["hybrid"] - values["baseline"], abs=2e-6)
    assert auroc["ci"][0] < auroc["value"] < auroc["ci"][1]
    assert auroc["p"] < 0.05
    assert auroc["delong"]["value"] == pytest.approx(auroc["value"], abs=2e-6)
    assert report["test"] == {"images": 80, "groups": 40, "positive": 40}


def check_page(text: str) -> Page:
    """What holds for every page: it stands alone, is well formed, and can be read without eyes or a mouse."""
    found = Page(text)
    assert found.open == []
    assert not {"script", "iframe"} & {tag for tag, _ in found.tags}
    sources = [a.get("src") or a.get("href") or "" for tag, a in found.tags if ("src" in a or "href" in a) and tag != "a"]
    assert all(s.startswith("data:") for s in sources)
    assert "url(http" not in text and "@import" not in text  # noqa: PT018
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")
    assert all(a.get("scope") in ("row", "col") for tag, a in found.tags if tag == "th")
    assert not re.search(r"<th[^>]*>\s*</th>", text)
    names = [tag for tag, _ in found.tags]
    assert names.count("table") == names.count("caption") == names.count("thead")
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a.get("href") or "")[1:] for tag, a in found.tags if tag == "a"} <= set(ids)
    assert text.index('class="verdict"') < text.index("<table")
    return found


def test_the_page_stands_alone_and_is_well_formed(made: tuple[Config, RunDir]) -> None:
    found = check_page((made[1].path / "report/index.html").read_text())
    assert [tag for tag, _ in found.tags].count("img") == 4 + 1 + 3  # grids, a pair, epochs, ROC, reliability


def test_the_page_says_what_a_reader_must_know(made: tuple[Config, RunDir]) -> None:
    words = " ".join(page(made[1]).words.split())
    for needed in ("One training each of baseline and hybrid was compared", "the trained hybrid told malignant from benign better than the trained",
                   "says nothing of the method", "(classify.seeds)", "It is drawn for the eye and chose nothing", "30 real, 12 synthetic",
                   "builtin-vae", "0.310 ± 0.020", "0.010 ± 0.020", "2 × cannot be decoded", "0.91, set aside", "Not a medical device",
                   "One training run per arm cannot prove an effect", "80 test images of 40 groups", "do not name sex, age or site",
                   "run <i>&", "97.0 %", "-m jobs.classify", "All trainings of hybrid had the same synthetic images: another generator, or other",
                   "1.0 % of the real test images look so much like training images that they would be called copies. Where they show the same"):
        assert needed in words, needed
    assert "not complete" not in words


def test_only_accepted_synthetic_images_are_shown(made: tuple[Config, RunDir]) -> None:
    cfg, run = made
    grids = {(name, source) for name, source, *_ in pictures.grids(cfg, run, {})}
    assert grids == {(c, s) for c in ("benign", "malignant") for s in ("real", "synthetic")}
    accepted = read_json(run.node("screen") / "accepted.json")
    write_json(run.node("screen") / "accepted.json", {"keys": [k for k in accepted["keys"] if int(k[4:]) % 2]})
    try:
        assert ("benign", "synthetic") not in {(name, source) for name, source, *_ in pictures.grids(cfg, run, {})}
    finally:
        write_json(run.node("screen") / "accepted.json", accepted)


def test_an_empty_run_gives_a_page_that_says_so(tmp_path: Path) -> None:
    cfg, run = Config(run=str(tmp_path / "run")), RunDir(tmp_path / "run")
    cfg.data.shards = str(tmp_path / "shards")
    run.create(cfg)
    stage.report(cfg, run, Task())
    words = check_page((run.path / "report/index.html").read_text()).words
    for needed in ("There is nothing to compare yet", "No arm has finished", "There are no images to show", "no screened synthetic images",
                   "prepare has not finished", "The configuration names no arm"):
        assert needed in words, needed
    found = read_json(run.path / "report/report.json")
    assert (found["arms"], found["differences"], found["synthetic"], found["data"]) == ({}, [], {}, {})
    assert not run.is_done("report")


def test_one_class_alone_in_the_test_split_is_no_crash(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, classes=1)
    stage.report(cfg, run, Task())
    found = read_json(run.path / "report/report.json")
    assert all(d["value"] is None for d in found["differences"] if d["metric"] == "auroc")
    assert "nothing to compare" in page(run).words
    assert "NaN" not in (run.path / "report/report.json").read_text()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDir]:
    """Three arms of three seeds with columns for subgroups, contact sheets and a spectrum."""
    cfg, run = make(tmp_path_factory.mktemp("many"), arms=("real", "half", "more"), strengths=(0.6, 1.0, 1.6))
    tile = np.zeros((8, 8, 3), np.uint8)
    (run.node("generate") / "sheets").mkdir(parents=True)
    (run.node("generate") / "sheets/benign-0.jpg").write_bytes(encode_jpeg(tile, 90))
    (run.node("screen") / "spectrum.png").write_bytes(cv2.imencode(".png", tile)[1].tobytes())
    stage.report(cfg, run, Task())
    return cfg, run


def test_several_seeds_and_arms(many: tuple[Config, RunDir]) -> None:
    found = read_json(many[1].path / "report/report.json")
    assert found["arms"]["half"]["chosen_step"] == [10, 20, 10]
    assert found["arms"]["half"]["seeds"] == [0, 1, 2]
    assert len(found["arms"]["more"]["auroc"]["seeds"]) == 3
    assert {tuple(d["arms"]) for d in found["differences"]} == {("half", "real"), ("more", "real"), ("more", "half")}
    assert {(row["by"], row["name"]) for row in found["subgroups"]} == {
        ("sex", "female"), ("sex", "male"), ("age", "0 to 39"), ("age", "40 to 59"), ("age", "80 and over"), ("age", "unknown"),
        ("site", "torso"), ("site", "unknown")}
    text = check_page((many[1].path / "report/index.html").read_text()).words
    words = " ".join(text.split())
    for needed in ("In this run, half and more told malignant from benign better than real.", "3 training runs per arm",
                   "Accuracy on the validation images", "site: unknown *", "p corrected for 2 comparisons with real", "Contact sheets (1 of 1)",
                   "spectrum"):
        assert needed in words, needed


def test_failed_seeds_and_missing_arms_are_said(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, arms=("real", "half", "more"), strengths=(0.6, 1.0, 1.6))
    run.done_path("classify/more").unlink()
    (run.node("classify/more") / "seed-1/metrics.json").unlink()
    write_json(run.failed_path("classify/more"), {"node": "classify/more", "message": "the loss is <not> a number at step 7"})
    shutil.rmtree(run.node("classify/half"))
    shutil.rmtree(run.node("screen"))
    stage.report(cfg, run, Task())
    words = " ".join(check_page((run.path / "report/index.html").read_text()).words.split())
    for needed in ("This run is not complete", "Arm half has not finished: it is not in the comparison", "only its seeds 0, 2 are counted",
                   "classify/more failed: the loss is <not> a number at step 7", "There are no screened synthetic images"):
        assert needed in words, needed
    found = read_json(run.path / "report/report.json")
    assert set(found["arms"]) == {"real", "more"}
    assert found["unfinished"] == {"half": [], "more": [0, 2]}
    assert len(found["arms"]["more"]["auroc"]["seeds"]) == 2
    assert not run.is_done("report")


def test_other_test_images_are_refused_by_name(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, arms=("real", "half"), strengths=(0.6, 1.0))
    path = run.node("classify/half") / "seed-2/predictions.csv"
    path.write_text(path.read_text().replace("k7,", "other,"))
    with pytest.raises(UserError, match="arm half, seed 2 was judged on other test images"):
        stage.report(cfg, run, Task())
    path.write_text("key,group,target\nk0,g0,1\n")
    with pytest.raises(UserError, match="seed 2\\) has no column score"):
        stage.report(cfg, run, Task())


def test_the_cards_are_filled_and_name_no_place(made: tuple[Config, RunDir]) -> None:
    cfg, run = made
    sheet, card = (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text(), (run.weights / "MODEL_CARD.md").read_text()
    for needed in ("Not a medical device", "| images generated | 15 |", "| accepted, benign | 11 |", "| rejected: copy | 2 |", "a <b>mole</b>",
                   "Apache-2.0", "hybrid told malignant"):
        assert needed in sheet, needed
    for needed in ("Not a medical device", "ab" * 32, "80 images (40 benign, 40 malignant) of 40 groups", "an unknown number of patients",
                   "planted copies found"):
        assert needed in card, needed
    assert str(run.path.parent) not in sheet + card
    assert "None" not in sheet + card


def test_the_datasheet_of_a_set_from_which_somebody_withdrew_says_so(tmp_path: Path) -> None:
    cfg, run = make(tmp_path)
    mark(run.dataset(cfg, "synthetic"), "P1", ["syn-00000003"], "drawn over images of theirs")
    stage.report(cfg, run, Task())
    said = (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text()
    assert said.startswith("> **Somebody withdrew (20")
    assert "** 1 of these samples must not be used any more: drawn over images of theirs" in said


def test_the_card_does_not_change_the_weights_hash(tmp_path: Path) -> None:
    from skinsynth.models.diffusion import weights_sha256

    cfg, run = make(tmp_path)
    (run.weights / "unet").mkdir()
    (run.weights / "unet/config.json").write_text("{}")
    before = weights_sha256(run.weights)
    stage.report(cfg, run, Task())
    assert (run.weights / "MODEL_CARD.md").is_file()
    assert weights_sha256(run.weights) == before


def test_a_name_with_dollars_is_no_formula() -> None:
    drawn = figures.intervals([("runs/$x^$/baseline", 0.5, [0.4, 0.6])], "AUROC of $x^$")
    assert drawn is not None
    assert drawn.startswith("data:image/svg+xml")


def test_a_spread_that_is_unknown_is_not_shown() -> None:
    row = {"kid": 0.3, "kid_std": 0.02, "kid_subset": 40, "fid": 9.0, "images": 80, "real_images": 90}
    (table,) = screening.tables({"distances": {"all": row, "real": row | {"kid_std": None}}})
    assert [cells[3] for cells in table.rows] == ["0.300 ± 0.020", "0.300"]


def test_several_runs_on_one_page(made: tuple[Config, RunDir], many: tuple[Config, RunDir], tmp_path: Path) -> None:
    """Both have the same 80 test images, so their arms are paired."""
    page_path = several.reports([made[1].path, many[1].path], tmp_path / "out")
    found = read_json(tmp_path / "out/report.json")
    assert found["same_test_images"]
    assert set(found["arms"]) == {*(f"run <i>&-1/{a}" for a in ("baseline", "hybrid")), *(f"run <i>&-2/{a}" for a in ("real", "half", "more"))}
    assert len(found["differences"]) == 10 * len(METRICS)
    assert all(d["paired"] for d in found["differences"])
    assert "differences are paired" in check_page(page_path.read_text()).words


def test_runs_with_other_test_images_are_not_paired_and_that_is_said(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    _, other = make(tmp_path / "second")
    for path in other.path.glob("classify/*/predictions.csv"):
        path.write_text(path.read_text().replace("k1,", "k1b,"))
    words = Page(several.reports([made[1].path, other.path], tmp_path / "out").read_text()).words
    found = read_json(tmp_path / "out/report.json")
    assert not found["same_test_images"]
    assert {d["paired"] for d in found["differences"]} == {True, False}
    assert "not all judged on the same test images" in words
    assert "subgroups" not in words
    assert "Nothing is concluded of run <i>&-2/baseline and run <i>&-2/hybrid: other test images" in " ".join(words.split())
    assert "hybrid told malignant from benign better than the trained run <i>&-1/baseline" in " ".join(words.split())
    assert not re.search("-2/[a-z]+ told malignant", words)
    again = read_json(several.reports([made[1].path, other.path], tmp_path / "again").with_name("report.json"))
    assert again == found


def test_one_run_alone_is_nothing_to_compare(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more different runs"):
        several.reports([made[1].path], tmp_path)
    with pytest.raises(UserError, match="is no run folder"):
        several.reports([made[1].path, tmp_path / "none"], tmp_path)


def test_reporting_needs_no_torch() -> None:
    code = "import sys, skinsynth.stages.report; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_where_its_images_are_not_to_be_found_it_is_said_and_not_done(tmp_path: Path) -> None:
    """As when it is asked for in another folder than the launch was, and data.shards is relative."""
    cfg, run = make(tmp_path)
    stage.report(cfg, run, Task())
    assert run.is_done("report")
    home, cfg.data.shards = cfg.data.shards, "elsewhere"
    stage.report(cfg, run, Task())
    assert not run.is_done("report")
    words = " ".join(page(run).words.split())
    for name, kind in (("isic-train", "train"), (f"{run.name}-synthetic", "synthetic")):
        assert f"The {kind} images are not to be found, so none is shown: {name} does not lie in data.shards" in words
    cfg.data.shards = home
    (Path(home) / "isic-train/00000.tar").unlink()
    stage.report(cfg, run, Task())
    words = " ".join(page(run).words.split())
    assert "isic-train (" in words
    assert "00000.tar is missing" in words
