"""The report's pages: whose the synthetic images are, what is out of date or damaged, how arms and numbers are told; nothing said that is not so."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import free_port
from test_report import Page, check_page, dataset, make

from skinsynth.data import cache, external
from skinsynth.data.dataset import Dataset
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Arm, Config, Phase
from skinsynth.pages import figures, pictures, results, screening, several
from skinsynth.quality import predictions
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


def manifest(cfg: Config, run: RunDir, **facts: object) -> None:
    path = run.dataset(cfg, "synthetic") / "manifest.json"
    write_json(path, {**read_json(path), **facts})


def elsewhere(cfg: Config, run: RunDir) -> None:
    """As if the synthetic images were ``data.synthetic``."""
    shutil.rmtree(run.node("finetune"))
    cfg.data.synthetic = "/home/somebody/theirs"
    manifest(cfg, run, lineage=external.LINEAGE, settings={"size": 16, "source": cfg.data.synthetic})


def armless(folder: Path) -> tuple[Config, RunDir]:
    """Without the arms' figures, which take seconds to resample."""
    cfg, run = make(folder)
    shutil.rmtree(run.path / "classify")
    return cfg, run


NO_PATIENT = "starts from no photograph"
UNKNOWN = "nobody can tell whether test images were among what it saw"


@pytest.mark.parametrize(("method", "redraw", "prompt", "said", "columns"), [
    ("text-to-image", None, "a mole", NO_PATIENT, "are not known of any image"),
    ("text-to-image", None, "a {diagnosis} {site}", NO_PATIENT, "from which its prompt was filled"),
    ("image-to-image", None, "a mole", "Of the patient's lesion and skin something may still be seen", "training image that it was drawn over"),
    ("inpaint", "lesion", "a mole", "the skin round it is a patient's", "training image that it was drawn over"),
    ("inpaint", "skin", "a mole", "the lesion itself is a patient's, as it was photographed", "training image that it was drawn over")])
def test_the_datasheet_says_what_is_a_patients(tmp_path: Path, method: str, redraw: str | None, prompt: str, said: str, columns: str) -> None:
    cfg, run = armless(tmp_path)
    cfg.generate.classes["benign"].prompts = [prompt]
    made_from = {} if method == "text-to-image" else {"strength": 0.6, **({"redraw": redraw} if redraw else {})}
    over = {"drawn_over": {"images": ["train-1", "train-3"], "groups": ["g1"]}} if made_from else {}
    manifest(cfg, run, settings={"method": method, **made_from}, lineage={"base": "builtin", "group_ids": ["g1", "g2", "g7"], **over})
    stage.report(cfg, run, Task())
    sheet = (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text()
    for text in (" ".join(sheet.split()), words_of(run)):
        assert said in text
        assert (NO_PATIENT in text) == (method == "text-to-image")
        assert ("strength 0.6" in text) == bool(made_from)
        assert ("one of 2 real training images" in text) == bool(made_from)
    assert columns in sheet
    assert f"| method | {method}{f', of the {redraw}' if redraw else ''}{', strength 0.6' if made_from else ''} |" in sheet
    assert "| generator trained on | isic-train: 2 groups" in sheet, "without those that were drawn over"
    lineage = read_json(run.path / "report/report.json")["lineage"]
    assert (lineage["method"], lineage["strength"], lineage["redraw"]) == (method, made_from.get("strength"), redraw)
    assert lineage["drawn_over"] == ({"images": 2, "groups": 1} if made_from else None)


def test_images_from_elsewhere_are_of_unknown_lineage_wherever_they_appear(tmp_path: Path) -> None:
    cfg, run = make(tmp_path)
    elsewhere(cfg, run)
    stage.report(cfg, run, Task())
    text = (run.path / "report/index.html").read_text()
    check_page(text)
    parts = {part.split('"')[0]: words(f'<h2 id="{part}') for part in text.split("</main>")[0].split('<h2 id="')[1:]}
    parts["verdict"] = words(re.search('<section class="verdict".*?</section>', text, re.DOTALL)[0])  # type: ignore[index]
    assert f"{UNKNOWN}. If they were, the figures of hybrid may be too good." in parts['verdict']
    assert "30 real, 12 synthetic of unknown lineage" in parts["comparison"]
    assert UNKNOWN in parts["images"]
    assert parts["images"].count(", synthetic of unknown lineage") == 2
    assert UNKNOWN in parts["screening"]
    assert "Nothing was fine-tuned in this run: its synthetic images were made elsewhere (theirs)" in parts["finetune"]
    assert "There are no previews" not in parts["finetune"]
    assert not re.search(r"jobs\.(finetune|generate|encode)", parts["again"])
    assert "synthetic images, made elsewhere" in parts["again"]
    sheet = " ".join((run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text().split())
    for needed in (UNKNOWN, "whether from photographs of patients, is not known here", "| images made elsewhere | 15 |",
                   "stand in the table that came with it", "here it does not know all"):
        assert needed in sheet, needed
    assert "| generator trained on | unknown |" in sheet
    assert "Prompts" not in sheet
    assert "/home/somebody" not in sheet + (run.path / "report/report.json").read_text()
    found = read_json(run.path / "report/report.json")
    assert (found["lineage"]["known"], found["arms"]["hybrid"]["lineage"], found["arms"]["baseline"]["lineage"]) == (False, "unknown", None)
    assert found["synthetic"]["lineage"] == "unknown"


def test_unknown_lineage_is_said_of_several_runs_too(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    cfg, run = make(tmp_path / "second")
    elsewhere(cfg, run)
    run.config_path.write_text(run.config_path.read_text().replace("synthetic: null", "synthetic: /home/somebody/theirs"))
    text = check_page(several.reports([made[1].path, run.path], tmp_path / "out").read_text()).words
    text = " ".join(text.split())
    assert f"{UNKNOWN}. If they were, the figures of run <i>&-2/hybrid may be too good." in text
    assert text.count("30 real, 12 synthetic of unknown lineage") == 1
    assert ("All trainings of run <i>&-1/hybrid had the same synthetic images, and all of run <i>&-2/hybrid had the same ones among themselves: "
            "another generator") in text, "each run has its own"
    assert text.count("unknown: test images may be among it") == 1
    assert text.count("The number after ± is the standard deviation over these") == 2


def test_the_same_synthetic_images_are_told_by_what_they_are(tmp_path: Path) -> None:
    """Runs that took them over have them too; an arm that was trained before they were made anew had others."""
    runs = {}
    for name, keys, images in (("one", ["syn-0", "syn-1"], "ab-1"), ("reused", ["syn-0", "syn-1"], "ab-2"), ("fewer", ["syn-0"], "ab-1"),
                               ("others", ["syn-0", "syn-1"], "cd-1"), ("stale", ["syn-0", "syn-1"], "ab-1")):
        cfg, run = make(tmp_path / name)
        write_json(run.node("screen") / "accepted.json", {"screened": {"synthetic": images}, "keys": keys})
        runs[name] = (cfg, run)
    stale = runs["stale"][1]
    write_json(stale.done_path("classify/hybrid"), {**read_json(stale.done_path("classify/hybrid")), "needs": {"screen": "another"}})
    arms = {f"{name}/{arm}": results.arm_facts(cfg, run, arm) for name, (cfg, run) in runs.items() for arm in cfg.classify.arms}
    assert arms["one/baseline"]["synthetic_sha256"] is None
    [said] = [line for line in results.with_lineage({"may_not": []}, arms, {})["may_not"] if "same synthetic images" in line]
    assert said.startswith("All trainings of one/hybrid, reused/hybrid had the same synthetic images, and all of fewer/hybrid had the same ones "
                           "among themselves, and all of others/hybrid had the same ones among themselves, and all of stale/hybrid had the same ones")


@pytest.mark.parametrize(("lineage", "told"), [
    ({"train": None, "group_ids": []}, "no images of this or any other run: a general model as it was published"),
    ({"train": None, "group_ids": None}, "unknown"),
    ({"train": None, "group_ids": ["g1"]}, "1 group (patients, lesions or copies)"),
    ({"train": "isic-train", "group_ids": ["g1", "g2"]}, "isic-train: 2 groups (patients, lesions or copies)"),
    ({"train": "isic-train", "group_ids": None, "trained_on": {"groups": ["g1", "g2"]}},
     "isic-train: at least 2 groups (patients, lesions or copies); all of it nobody knows"),
    ({"train": "isic-train", "group_ids": None}, "isic-train, and nobody knows what else")])
def test_what_trained_the_generator_is_told_once_and_without_contradiction(tmp_path: Path, lineage: dict[str, object], told: str) -> None:
    cfg, run = armless(tmp_path)
    shutil.rmtree(run.node("finetune"))
    manifest(cfg, run, lineage={"base": "theirs/model", "weights_sha256": "ab", **lineage, "trained_group_ids": lineage["group_ids"]})
    stage.report(cfg, run, Task())
    text, sheet = words_of(run), (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text()
    assert re.search(f"generator trained on ?{re.escape(told)} ?(method|skinsynth)", text)
    assert f"| generator trained on | {told} |" in sheet
    assert not re.search(r"\b0 groups|groups that trained it", text + sheet)
    assert (UNKNOWN in text) == (lineage["group_ids"] is None)


def test_known_lineage_is_not_called_unknown(made: tuple[Config, RunDir]) -> None:
    sheet = (made[1].dataset(made[0], "synthetic") / "DATASHEET.md").read_text()
    assert UNKNOWN not in words_of(made[1]) + " ".join(sheet.split())
    assert "of unknown lineage" not in words_of(made[1])


def test_arms_that_were_trained_on_other_images_are_told(tmp_path: Path) -> None:
    cfg, run = make(tmp_path)
    stage.report(cfg, run, Task())
    assert run.is_done("report")
    run.finish("screen", {**run.metrics("screen"), "accepted": 3}, [])
    stage.report(cfg, run, Task())
    text, found = words_of(run), read_json(run.path / "report/report.json")
    assert "not complete, or not up to date" in text
    assert "Arm hybrid is out of date: what it was trained on was made anew since" in text
    assert "Arm baseline" not in text
    assert found["outdated"] == ["hybrid"]
    assert not run.is_done("report")
    run.finish("classify/hybrid", run.metrics("classify/hybrid"), [])
    stage.report(cfg, run, Task())
    assert "out of date" not in words_of(run)
    assert run.is_done("report")


def test_a_withdrawal_is_told_and_a_run_without_its_shards_is_not_out_of_date(tmp_path: Path) -> None:
    cfg, run = make(tmp_path)
    folder = run.dataset(cfg, "synthetic")
    for node in ("screen", "classify/hybrid"):
        run.finish(node, run.metrics(node), [], [folder / "manifest.json", folder / "withdrawn.json"] if node == "screen" else None)
    alone = RunDir(tmp_path / "copy/alone")
    shutil.copytree(run.path, alone.path)
    cfg.data.shards = str(tmp_path / "copy/shards")
    stage.report(cfg, alone, Task())
    assert read_json(alone.path / "report/report.json")["outdated"] == []
    cfg.data.shards = str(tmp_path / "shards")
    (folder / "withdrawn.json").write_text("{}")
    stage.report(cfg, run, Task())
    assert read_json(run.path / "report/report.json")["outdated"] == ["hybrid"]
    assert "screen was done before what it reads was made anew, or withdrawn from" in words_of(run)


def trained(folder: Path) -> tuple[Config, RunDir]:
    """Two arms that classify itself called done."""
    from skinsynth.stages.classify import finish

    cfg, run = make(folder, arms=("real", "half"), strengths=(0.6, 1.0))
    dataset(folder / "shards/isic-test", "test", 12)
    cfg.classify.seeds = [0, 1, 2]
    for arm in cfg.classify.arms:
        for seed in cfg.arm_seeds:
            (run.seed(arm, seed) / "weights").mkdir()
            (run.seed(arm, seed) / "weights/config.json").write_text("{}")
        finish(cfg, run, arm)
    return cfg, run


@pytest.mark.parametrize(("kind", "stale"), [("test", ["real", "half"]), ("train", ["real", "half"]), ("val", ["real", "half"]),
                                             ("synthetic", ["half"])])
def test_an_arm_from_whose_images_somebody_withdrew_is_out_of_date(tmp_path: Path, kind: str, stale: list[str]) -> None:
    """It is to be trained anew by the next launch, and the page says so."""
    cfg, run = trained(tmp_path)
    assert results.missing(cfg, run) == []
    run.dataset(cfg, kind).mkdir(exist_ok=True)
    mark(run.dataset(cfg, kind), "g1", [f"{kind}-1"], "images of theirs")
    assert [arm for arm in cfg.classify.arms if not run.is_done(f"classify/{arm}")] == stale
    told = " ".join(results.missing(cfg, run))
    for arm in cfg.classify.arms:
        assert (f"Arm {arm} is out of date: what it was trained on was made anew since, or withdrawn from" in told) == (arm in stale)
    assert "weights" not in told


def test_weights_of_an_arm_that_are_withdrawn_are_told(tmp_path: Path) -> None:
    cfg, run = trained(tmp_path)
    mark(run.seed("half", 1) / "weights", "g1", None, "trained on images that are withdrawn")
    assert results.missing(cfg, run) == ["The weights of arm half are withdrawn: they were trained on images of somebody who withdrew since."]


def test_of_arms_that_were_judged_on_other_images_the_one_that_is_out_of_date_is_named(tmp_path: Path) -> None:
    """Somebody withdrew from the test images, and only the later arm was trained anew since: to delete that one would be in vain."""
    from skinsynth.stages.classify import finish

    cfg, run = trained(tmp_path)
    mark(run.dataset(cfg, "test"), "g1", ["k7"], "images of theirs")
    for seed in cfg.arm_seeds:
        path = run.seed("half", seed) / "predictions.csv"
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("k7,")))
    finish(cfg, run, "half")
    with pytest.raises(UserError, match="arm half, seed 0 was judged on other test images") as caught:
        predictions.read(cfg, run, predictions.arms_of(cfg))
    assert str(caught.value).endswith(f"delete {run.node('classify/real')} and launch again")


def test_a_remote_that_is_down_is_noted_and_the_report_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = armless(tmp_path)
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    cfg.data.remote = f"http://127.0.0.1:{free_port()}"
    (run.dataset(cfg, "train") / "00000.tar").unlink()
    bad: dict[str, str] = {}
    assert {(name, source) for name, source, *_ in pictures.grids(cfg, run, bad)} == {("benign", "synthetic"), ("malignant", "synthetic")}
    assert {key: "refused" in why for key, why in bad.items()} == {"isic-train": True}, "no other one is asked for"
    stage.report(cfg, run, Task())
    text = " ".join(check_page((run.path / "report/index.html").read_text()).words.split())
    assert f"isic-train (data.remote: {cfg.data.remote}/isic-train/00000.tar could not be fetched in 3 tries" in text


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


def test_arms_are_told_apart_by_their_mix_and_each_seeds_steps(tmp_path: Path) -> None:
    cfg, run = make(tmp_path, arms=("real", "half", "threefold", "staged"), strengths=(0.5, 0.6, 0.7, 0.8))
    cfg.classify.arms["threefold"] = Arm({"real": 1, "synthetic": 3})
    cfg.classify.arms["staged"] = Arm(phases=[Phase({"synthetic": 1}, 3), Phase({"real": 1.5, "synthetic": 1}, 1)])
    for seed in range(3):
        path = run.node(f"classify/half/seed-{seed}") / "metrics.json"
        write_json(path, {**read_json(path), "steps": (20, 12, 8)[seed]})
    stage.report(cfg, run, Task())
    table = words_of(run).split("How the arms were trained")[1].split("AUROC of each seed")[0]
    for needed in ("real alone", "1 real : 1 synthetic", "1 real : 3 synthetic", "20, 12, 8",
                   "synthetic alone for 75 % of the steps, then 3 real : 2 synthetic for 25 %"):
        assert needed in table, needed
    arms = read_json(run.path / "report/report.json")["arms"]
    assert arms["half"]["steps"] == [20, 12, 8]
    assert arms["staged"]["mix"] == [{"share": 0.75, "sources": {"synthetic": 1}}, {"share": 0.25, "sources": {"real": 1.5, "synthetic": 1}}]
    first = arms["real"]["epochs"][0]
    rows = figures.lines(run.node("classify/real") / "seed-0/epochs.jsonl")
    assert [(row["step"], row["epoch"]) for row in first] == [(10, 1.0), (20, 2.0)]
    assert first[1]["accuracy"] == pytest.approx(rows[1]["val"]["accuracy"], abs=1e-4)


def test_the_limit_of_copies_is_told_as_measured(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    stage.report(cfg, run, Task())
    assert "by it 1.0 % of the real test images would be called copies" in words_of(run)
    assert "99.5" not in words_of(run).split("How to reproduce")[0]
    run.finish("screen", {k: v for k, v in run.metrics("screen").items() if k != "copy_false_alarms"}, [])
    stage.report(cfg, run, Task())
    assert "would be called copies" not in words_of(run)


def test_how_many_of_each_class_were_accepted_is_told(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    """Of a set of which hardly any malignant image was accepted the total says nothing."""
    cfg, run = armless(tmp_path)
    none = {"generated": 8, "accepted": 1, "rejected": {"blank": 1, "copy": 2}}
    run.finish("screen", {**run.metrics("screen"), "classes": {"benign": {**none, "accepted": 11, "generated": 1107}, "malignant": none}}, [])
    stage.report(cfg, run, Task())
    assert re.search("accepted, benign ?11 of 1,107 ?accepted, malignant ?1 of 8", words_of(run))
    sheet = (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text()
    assert "| accepted, benign | 11 of 1,107 |\n| accepted, malignant | 1 of 8 |" in sheet
    assert re.search("accepted, malignant ?1", words_of(made[1])), "an earlier version did not write of how many"


def stop(run: RunDir) -> list[str]:
    """As if the set had not passed the screening; returns why."""
    why = ["only 1 of 8 malignant images were accepted (5 <copy>, 2 blank), less than screen.min_accepted=0.2 of this class",
           "7 of 15 synthetic images are copies of training images, more than screen.max_copies=0.1"]
    write_json(run.node("screen") / "metrics.json", {**run.metrics("screen"), "gate": {"passed": False, "failures": why}})
    write_json(run.failed_path("screen"), {"node": "screen", "message": "; ".join(why)})
    for name in ("done", "accepted"):
        (run.node("screen") / f"{name}.json").unlink()
    return why


def test_of_a_set_that_did_not_pass_the_evidence_is_shown(tmp_path: Path) -> None:
    cfg, run = armless(tmp_path)
    whole, why = run.metrics("screen"), stop(run)
    stage.report(cfg, run, Task())
    text = (run.path / "report/index.html").read_text()
    check_page(text)
    parts = {part.split('"')[0]: words(f'<h2 id="{part}') for part in text.split("</main>")[0].split('<h2 id="')[1:]}
    assert f"did not pass the screening, and the set is not used: {'; '.join(why)}." in parts["screening"]
    for needed in ("set aside: copy2", "planted copies found", "0.310 ± 0.020", "The pairs that look most alike", "0.91, set aside: copy"):
        assert needed in parts["screening"], needed
    assert "no screened synthetic images" not in words_of(run)
    assert parts["images"].count("synthetic, as generated: the set did not pass the screening") == 2
    assert "screen found that the synthetic images as a set did not pass: no arm is trained on them." in words_of(run)
    found = read_json(run.path / "report/report.json")["synthetic"]
    assert (found["accepted"], found["gate"]) == (12, {"passed": False, "failures": why, "used": False})
    sheet, card = (run.dataset(cfg, "synthetic") / "DATASHEET.md").read_text(), (run.weights / "MODEL_CARD.md").read_text()
    for needed in ("the set is not used: only 1 of 8 malignant", "| rejected: copy | 2 |", "planted copies found"):
        assert needed in sheet, needed
        assert needed in card or needed.startswith("|")
    assert "accepted.json" not in sheet
    assert "not screened" not in sheet + card
    write_json(run.node("screen") / "accepted.json", {"keys": ["syn-0", "syn-1"]})  # with screen.on_fail=warn
    run.finish("screen", {**whole, "gate": {"passed": False, "failures": why}}, [])
    stage.report(cfg, run, Task())
    assert f"was used because the configuration says so: {why[0]}" in words_of(run)
    assert "as generated: the set" not in words_of(run)


def test_a_set_that_did_not_pass_is_told_beside_other_runs_and_not_called_out_of_date(made: tuple[Config, RunDir], tmp_path: Path) -> None:
    """An earlier set of the run had passed, and its ``done.json`` is left."""
    cfg, run = make(tmp_path)
    done = run.done_path("screen").read_text()
    why = stop(run)
    run.done_path("screen").write_text(done.replace('"reads": {}', '"reads": {"none": "0"}'))
    stage.report(cfg, run, Task())
    assert "screen was done before" not in words_of(run)
    assert why[0] in words_of(run)
    assert f"the set is not used: {why[0]}" in words(several.reports([made[1].path, run.path], tmp_path / "out").read_text())


def test_a_small_kid_keeps_its_digits_and_its_spread_is_explained(made: tuple[Config, RunDir]) -> None:
    found = {"kid": 0.31, "kid_std": 0.02, "kid_real": 0.00004, "kid_real_std": 0.00031}
    assert [value for _, value in screening.short(found)] == ["0.310 ± 0.020", "0.00004 ± 0.00031"]
    assert screening.tables({"kid": 0.1, "kid_std": 0.0042})[0].rows[0][3] == "0.1000 ± 0.0042"
    sheet = (made[1].dataset(made[0], "synthetic") / "DATASHEET.md").read_text()
    for text in (words_of(made[1]), sheet, (made[1].weights / "MODEL_CARD.md").read_text()):
        assert "the mean over 50 random subsets of up to 100 images a side, and of half of the smaller set at most" in " ".join(text.split())


def test_what_is_plotted_stands_in_tables_and_no_colour_judges(made: tuple[Config, RunDir]) -> None:
    text = (made[1].path / "report/index.html").read_text()
    found = read_json(made[1].path / "report/report.json")
    epochs, bins = (re.search(rf"<details><summary>{name}.*?</details>", text, re.DOTALL)[0]  # type: ignore[index]
                    for name in ("The values of this plot", "The values of the reliability plot"))
    assert epochs.count("<tr>") == 1 + 2 * 2
    assert bins.count("<tr>") == 1 + sum(len(row["calibration"]) for row in found["arms"].values())
    assert f"<td>{found['arms']['hybrid']['calibration'][0]['share']:.3f}</td>" in bins
    assert not re.search(r"\.verdict \{[^}]*(green|--good)", text)


def test_where_thresholds_come_from_is_told(made: tuple[Config, RunDir]) -> None:
    """A reviewer asks; and 0.5 is what the figures are counted at."""
    text = words_of(made[1])
    assert "call malignant what has a probability of at least 0.5" in text
    assert "takes its threshold from these very test images" in text


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
