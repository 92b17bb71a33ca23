"""report: figures against the libraries, an honest verdict, one file that asks for nothing, the same bytes again."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from skinsynth.data.shards import ShardWriter, encode_jpeg, write_manifest
from skinsynth.knobs import Arm, Config, GeneratedClass
from skinsynth.quality.metrics import binary_metrics
from skinsynth.run import RunDir, Task, read_json, write_json
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
    folder = run.node(f"classify/{name}")
    folder.mkdir(parents=True)
    with open(folder / "predictions.csv", "w", newline="") as f:
        csv.writer(f).writerows([["key", "group", "target", "score"], *([f"k{i}", f"g{i // 2}", t, s] for i, (t, s) in
                                                                        enumerate(zip(target.tolist(), score.tolist(), strict=True)))])
    row = binary_metrics(target, score) | {"loss": 0.5}
    (folder / "epochs.jsonl").write_text("".join(json.dumps({"step": s, "epoch": s / 10, "val": row, "test": row}) + "\n" for s in (10, 20)))
    run.finish(f"classify/{name}", {**binary_metrics(target, score), "chosen_step": 20, "steps": 20, "train_samples": samples},
               [folder / "predictions.csv"])


def make(folder: Path, gain: float = 2.5, classes: int = 2) -> tuple[Config, RunDir]:
    """A finished run without its work: a weak baseline, and a hybrid that is better by ``gain``."""
    cfg, run = Config(run=str(folder / "run <i>&")), RunDir(folder / "run <i>&")
    cfg.data.shards = str(folder / "shards")
    cfg.classify.arms = {"baseline": Arm({"real": 1}), "hybrid": Arm({"real": 1, "synthetic": 1})}
    cfg.generate.classes = {"benign": GeneratedClass(0, ["a <b>mole</b>"], 7), "malignant": GeneratedClass(1, ["a melanoma"], 8)}
    run.create(cfg)
    train = dataset(folder / "shards/isic-train", "train", 30)
    synthetic = dataset(run.dataset(cfg, "synthetic"), "syn", 15)
    target = np.arange(80) % classes
    rng = np.random.default_rng(0)
    for name, strength in (("baseline", 0.5), ("hybrid", 0.5 + gain)):
        score = 1 / (1 + np.exp(-(strength * (target - 0.5) + rng.normal(size=80) * 0.5)))
        arm(run, name, score, target, {"real": 30} if name == "baseline" else {"real": 30, "synthetic": 12})
    write_json(run.node("screen") / "accepted.json", {"keys": synthetic[:12]})
    write_json(run.node("screen") / "pairs.json", [{"key": synthetic[14], "train_key": train[3], "similarity": 0.97, "nearness": 0.91,
                                                    "rejected": "copy"}])
    run.finish("screen", {"generated": 15, "accepted": 12, "rejected": {"broken": 0, "blank": 1, "copy": 2, "duplicate": 0}, "kid": 0.31,
                          "kid_std": 0.02, "kid_real": 0.01, "kid_real_std": 0.02, "features": "builtin-vae", "copy_threshold": 0.7,
                          "copy_recall": 0.97, "copy_planted": 30, "copy_false_alarms": 0.01,
                          "kid_per_class": {"benign": {"kid": 0.3, "kid_std": 0.1, "accepted": 11},
                                            "malignant": {"kid": None, "kid_std": None, "accepted": 1}}},
               [])
    split = {"images": 80, "classes": {"0": 40, "1": 40}, "groups": 40, "patients": 0}
    run.finish("prepare", {"train": split, "val": split, "test": split, "set_aside": {"total": 2, "reasons": {"cannot be decoded": 2}}}, [])
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
    assert found["arms"]["hybrid"]["auroc"] == run.metrics("classify/hybrid")["auroc"]
    assert found["arms"]["hybrid"]["train_samples"] == {"real": 30, "synthetic": 12}
    assert (found["synthetic"]["generated"], found["synthetic"]["accepted"], found["synthetic"]["kid"]) == (15, 12, 0.31)
    assert found["data"]["test"]["classes"] == {"0": 40, "1": 40}
    assert str(run.path.parent) not in text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    assert run.is_done("report")


def test_made_again_it_is_the_same_to_the_byte(made: tuple[Config, RunDir]) -> None:
    cfg, run = made
    before = {p.name: p.read_bytes() for p in (run.path / "report").iterdir()}
    stage.report(cfg, run, Task())
    assert set(before) == {"index.html", "report.json", "done.json"}
    assert {p.name: p.read_bytes() for p in (run.path / "report").iterdir()} == before


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "auroc"])
def test_the_fast_metrics_are_those_of_scikit_learn(name: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        target, score = rng.integers(0, 2, 40), rng.integers(0, 9, 40) / 8  # with ties
        wanted = {"accuracy": np.mean((score >= 0.5) == target), "balanced_accuracy": balanced_accuracy_score(target, score >= 0.5),
                  "auroc": roc_auc_score(target, score)}[name]
        assert stage._metric(name, target, score) == pytest.approx(wanted)


def test_the_interval_holds_the_difference(made: tuple[Config, RunDir]) -> None:
    _, run = made
    found = {d["metric"]: d for d in read_json(run.path / "report/report.json")["differences"]}
    auroc, arms = found["auroc"], read_json(run.path / "report/report.json")["arms"]
    assert auroc["value"] == pytest.approx(arms["hybrid"]["auroc"] - arms["baseline"]["auroc"], abs=1e-6)
    assert auroc["ci"][0] < auroc["value"] < auroc["ci"][1]
    assert (auroc["test_images"], auroc["test_groups"]) == (80, 40)


def test_images_of_one_group_count_as_one() -> None:
    """Twenty images a patient, on all of which the arms agree or differ alike, say no more than one would."""
    target = np.repeat([0, 1, 0, 1], 20)
    first, second = np.full(80, 0.2), np.full(80, 0.8)
    one_each = np.std(stage._bootstrap("accuracy", np.arange(80).astype(str), target, first, second))
    four = np.std(stage._bootstrap("accuracy", np.repeat(["a", "b", "c", "d"], 20), target, first, second))
    assert four > 2 * one_each


@pytest.mark.parametrize(("ci", "words"), [((0.01, 0.2), "better than baseline"), ((-0.2, -0.01), "worse than baseline"),
                                           ((-0.1, 0.2), "no clear difference")])
def test_the_verdict_follows_the_interval_and_keeps_its_caution(ci: tuple[float, float], words: str) -> None:
    summary = {"arms": {"hybrid": {"auroc": 0.8}, "baseline": {"auroc": 0.7}},
               "differences": [{"arms": ["hybrid", "baseline"], "metric": "auroc", "value": 0.1, "ci": list(ci),
                                "test_images": 80, "test_groups": 40}]}
    headline, details = stage.verdict(summary)
    assert words in headline
    assert "One training run per arm and 80 test images cannot prove an effect" in details
    assert f"{ci[0]:+.3f} and {ci[1]:+.3f}" in details


def test_the_page_stands_alone_and_is_well_formed(made: tuple[Config, RunDir]) -> None:
    text = (made[1].path / "report/index.html").read_text()
    found = Page(text)
    assert found.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in found.tags}
    sources = [a["src"] or "" for tag, a in found.tags if "src" in a]
    assert len(sources) == 4 + 1
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert "url(http" not in text and "@import" not in text  # noqa: PT018
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")
    assert all(a.get("scope") in ("row", "col") for tag, a in found.tags if tag == "th")
    assert next(tag for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)) == "h1"
    assert text.index('class="verdict"') < text.index("<table")


def test_the_page_says_what_a_reader_must_know(made: tuple[Config, RunDir]) -> None:
    words = " ".join(page(made[1]).words.split())
    for needed in ("hybrid told malignant from benign better than baseline", "It is drawn for the eye and chose nothing", "30 real, 12 synthetic",
                   "builtin-vae", "0.310 ± 0.020", "0.010 ± 0.020", "2 × cannot be decoded", "0.91, set aside", "Not a medical device",
                   "a <b>mole</b>", "run <i>&"):
        assert needed in words, needed


def test_only_accepted_synthetic_images_are_shown(made: tuple[Config, RunDir]) -> None:
    cfg, run = made
    grids = {(name, source) for name, source, _ in stage._grids(cfg, run)}
    assert grids == {(c, s) for c in ("benign", "malignant") for s in ("real", "synthetic")}
    accepted = read_json(run.node("screen") / "accepted.json")
    write_json(run.node("screen") / "accepted.json", {"keys": [k for k in accepted["keys"] if int(k[4:]) % 2]})
    try:
        assert ("benign", "synthetic") not in {(name, source) for name, source, _ in stage._grids(cfg, run)}
    finally:
        write_json(run.node("screen") / "accepted.json", accepted)


def test_an_empty_run_gives_a_page_that_says_so(tmp_path: Path) -> None:
    cfg, run = Config(run=str(tmp_path / "run")), RunDir(tmp_path / "run")
    cfg.data.shards = str(tmp_path / "shards")
    run.create(cfg)
    stage.report(cfg, run, Task())
    words = page(run).words
    for needed in ("There is nothing to compare yet", "No arm has finished", "There are no images to show", "no screened synthetic images",
                   "prepare has not finished"):
        assert needed in words, needed
    assert read_json(run.path / "report/report.json") == {"arms": {}, "synthetic": {}, "data": {}, "differences": []}


def test_one_class_alone_in_the_test_split_is_no_crash(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, classes=1)
    stage.report(cfg, run, Task())
    assert read_json(run.path / "report/report.json")["differences"] == []
    assert "nothing to compare" in page(run).words
    assert "NaN" not in (run.path / "report/report.json").read_text()


def test_reporting_needs_no_torch() -> None:
    code = "import sys, skinsynth.stages.report; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
