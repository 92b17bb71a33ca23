"""A new run takes over from an earlier one what would come out the same."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from conftest import overrides, skinsynth
from rich.console import Console

from skinsynth import config, reuse, status
from skinsynth.chain import chain as nodes_of
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, sha256_folder, write_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir

STAGES = ["prepare", "encode", "finetune", "generate", "screen", "classify/baseline", "classify/hybrid"]


@pytest.fixture
def old(chain: Path, drawn: Path, tmp_path: Path) -> RunDir:
    """The finished small run, with datasets that are safe to change."""
    for name in ("run", "shards"):
        shutil.copytree(chain / name, tmp_path / name, copy_function=os.link)
    (tmp_path / "run" / "config.yaml").unlink()
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", overrides(drawn, tmp_path)))
    return run


def begin(drawn: Path, folder: Path, **keys: object) -> tuple[Config, RunDir]:
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **{"run": "new"} | keys))
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    return cfg, run


def take_over(cfg: Config, run: RunDir, old: RunDir) -> str:
    words = io.StringIO()
    reuse.take_over(cfg, run, old, Console(file=words, width=500))
    return words.getvalue()


def done(cfg: Config, run: RunDir) -> list[str]:
    return [node.name for node in nodes_of(cfg) if run.is_done(node.name)]


@pytest.mark.parametrize(("key", "value", "taken"), [
    ("finetune.log_every", 3, STAGES),
    ("classify.steps", 13, STAGES[:5]),
    ("classify.arms.hybrid.sources.real", 2, STAGES[:6]),
    ("screen.blur", 0.01, [*STAGES[:4], "classify/baseline"]),
    ("generate.classes.benign.count", 14, [*STAGES[:3], "classify/baseline"]),
    ("generate.negative_prompt", "hair", [*STAGES[:3], "classify/baseline"]),
    ("finetune.lr", 1e-3, ["prepare", "encode", "classify/baseline"]),
    ("finetune.concepts.nevus.instance.count", 9, ["prepare", "classify/baseline"]),
    ("data.streams", 8, []),
    ("prepare.quality", 90, []),
    ("seed", 1, [])])
def test_what_a_changed_key_leaves_the_same(old: RunDir, drawn: Path, tmp_path: Path, key: str, value: object, taken: list[str]) -> None:
    cfg, run = begin(drawn, tmp_path, **{key: value})
    words = take_over(cfg, run, old)
    assert done(cfg, run) == taken
    assert (f"taken over from {old.path}: {', '.join(taken)}\n" in words) == bool(taken)
    assert f"{key}: " in words or taken == STAGES
    assert reuse.origins(cfg, run) == ({str(old.path): taken} if taken else {})


def test_the_cards_are_those_of_the_new_run(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    """They tell of a run's screening and arms, and its report writes them."""
    theirs = [old.dataset(old.config(), "synthetic") / "DATASHEET.md", old.weights / "MODEL_CARD.md"]
    cfg, run = begin(drawn, tmp_path)
    take_over(cfg, run, old)
    assert all(path.is_file() for path in theirs)
    assert not (run.dataset(cfg, "synthetic") / "DATASHEET.md").exists()
    assert not (run.weights / "MODEL_CARD.md").exists()


def test_the_earlier_run_is_only_read_and_may_go(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    before = sha256_folder(old.path), sha256_folder(tmp_path / "shards")
    cfg, run = begin(drawn, tmp_path)
    take_over(cfg, run, old)
    with open(run.node("finetune") / "metrics.jsonl", "a") as file:  # as a training that is begun again would
        file.write("more\n")
    for kind in reuse.DATASETS:
        run.dataset(cfg, kind).rename(tmp_path / kind)
    assert (sha256_folder(old.path), sha256_folder(tmp_path / "shards")) == before
    for kind in reuse.DATASETS:
        (tmp_path / kind).rename(run.dataset(cfg, kind))
    tar = run.dataset(cfg, "synthetic") / "00000.tar"
    assert tar.samefile(old.dataset(old.config(), "synthetic") / "00000.tar"), "no second copy of the images"
    shutil.rmtree(old.path)
    for kind in reuse.DATASETS:
        shutil.rmtree(tmp_path / f"shards/run-{kind}")
    assert done(cfg, run) == STAGES
    assert sha256_file(tar)
    assert not list(tmp_path.rglob("*.reuse.tmp"))


def test_of_an_arm_the_seeds_that_are_the_same(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(drawn, tmp_path, **{"classify.seeds": [4, 0, 5]})
    assert "classify/baseline/seed-0, classify/hybrid/seed-0" in take_over(cfg, run, old)
    assert done(cfg, run) == STAGES[:5]
    for arm in ("baseline", "hybrid"):
        assert run.unfinished(f"classify/{arm}", 3) == [0, 2]
        progress = status.progress_of(run, f"classify/{arm}")
        assert progress
        assert (progress["done"], progress["total"], progress["unit"]) == (12, 36, "steps")
        mine, theirs = (read_json(each.node(f"classify/{arm}") / "seed-0/metrics.json") for each in (run, old))
        assert mine == {**theirs, "taken_from": str(old.path)}
    assert reuse.origins(cfg, run)[str(old.path)][-2:] == ["classify/baseline/seed-0", "classify/hybrid/seed-0"]


def test_no_seed_of_an_arm_that_has_to_be_trained_again(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    """It would be refused, as trained on other images; and one whose files are not whole is none."""
    (old.seed("baseline", 0) / "predictions.csv").unlink()
    path = old.done_path("classify/hybrid")
    facts = read_json(path)
    path.unlink()
    write_json(path, {**facts, "needs": {"screen": "as it was before"}})
    cfg, run = begin(drawn, tmp_path, **{"classify.seeds": [4, 0]})
    assert take_over(cfg, run, old).count(f"since it is not done in {old.path}") == 2
    assert not run.node("classify").exists()


def test_a_file_that_cannot_be_copied_is_told(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(drawn, tmp_path)
    (old.node("encode") / "large.json").write_bytes(b"0" * 5_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
        with pytest.raises(UserError, match=r"encode/large.json cannot be taken over: .*File too large"):
            take_over(cfg, run, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done(cfg, run) == ["prepare"]
    take_over(cfg, run, old)
    assert done(cfg, run) == STAGES


def test_killed_half_way_the_same_again_ends_it(old: RunDir, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = begin(drawn, tmp_path)
    with monkeypatch.context() as patched:
        left = iter([reuse.put_in_place] * 5)  # the latents and three stages are there, of generate only the images
        patched.setattr(reuse, "put_in_place", lambda *paths: next(left)(*paths))
        with pytest.raises(StopIteration):
            take_over(cfg, run, old)
    assert done(cfg, run) == STAGES[:3]
    assert (run.dataset(cfg, "synthetic") / "manifest.json").exists()
    take_over(cfg, run, old)
    assert done(cfg, run) == STAGES
    assert not list(tmp_path.rglob("*.reuse.tmp"))
    assert reuse.origins(cfg, run) == {str(old.path): STAGES}


def test_without_hard_links_it_is_copied(old: RunDir, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    cfg, run = begin(drawn, tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    take_over(cfg, run, old)
    assert done(cfg, run) == STAGES
    mine, theirs = (each / "00000.tar" for each in (run.dataset(cfg, "synthetic"), old.dataset(old.config(), "synthetic")))
    assert not mine.samefile(theirs)
    assert mine.read_bytes() == theirs.read_bytes()


def test_what_cannot_be_is_told(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(drawn, tmp_path, run="elsewhere/run")
    with pytest.raises(UserError, match=r"would have the same datasets .*give the new run another name"):
        take_over(cfg, run, old)
    cfg, run = begin(drawn, tmp_path)
    run.dataset(cfg, "synthetic").mkdir()
    (run.dataset(cfg, "synthetic") / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="new-synthetic is there already, of another run of this name"):
        take_over(cfg, run, old)
    assert (run.dataset(cfg, "synthetic") / "manifest.json").read_text() == "{}"
    for arguments, words in ((["--reuse", str(drawn)], "is no run folder"), (["--reuse", str(old.path), "--dry-run"], "give one of them")):
        told = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path, run="new"), *arguments)
        assert told.returncode == 1
        assert words in told.stderr
        assert "Traceback" not in told.stderr


def test_one_more_arm_makes_no_image_again(old: RunDir, drawn: Path, tmp_path: Path) -> None:
    """As a user does it; the report tells where the rest comes from, and gives the figures that were there."""
    more = {"classify.arms.more": "{sources: {real: 1, synthetic: 3}}", "run": "new"}
    done = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path, **more), "--reuse", str(old.path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"not taken over: classify/more, since {old.path} has none" in done.stdout
    assert "finetune             running" not in done.stdout
    mine, theirs = (json.loads((tmp_path / name / "report/report.json").read_text()) for name in ("new", "run"))
    assert set(mine["arms"]) == {"baseline", "hybrid", "more"}
    assert {arm: mine["arms"][arm] for arm in theirs["arms"]} == theirs["arms"]
    assert mine["synthetic"] == theirs["synthetic"]
    assert f"taken over from {old.path}" in (tmp_path / "new/report/index.html").read_text()
    again = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path, **more))
    assert "are done already" in again.stdout
