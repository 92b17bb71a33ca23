"""The whole chain by the command line, as a user runs it: finished, disturbed, repeated, and told what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, overrides, skinsynth, until

from skinsynth import config
from skinsynth.chain import chain as chain_of
from skinsynth.files import read_json
from skinsynth.run import RunDir
from skinsynth.train.log import read_lines


def _listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it in the foreground: a shell's background jobs, and so tests that
    run in one, ignore Ctrl-C, and their children inherit that."""
    return subprocess.Popen([sys.executable, "-m", "skinsynth", *arguments], cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=_listen_to_ctrl_c)


def wait_for(process: subprocess.Popen[str], path: Path, pattern: str) -> None:
    """Until a file of that pattern is there."""
    until(f"{path}/{pattern}", lambda: list(path.glob(pattern)), process=process)


def jobs_alive(folder: Path, parent: int | None = None) -> list[int]:
    """``parent``: those alone that it started."""
    seen = [process.info for process in psutil.process_iter(["pid", "ppid", "cmdline", "status"])]
    return [at["pid"] for at in seen if parent in (None, at["ppid"]) and at["status"] != psutil.STATUS_ZOMBIE
            and any(str(folder) in part for part in at["cmdline"] or [])]


def kill_all(arguments: list[str], folder: Path) -> None:
    """A launch that is killed with all it started, as when the power goes."""
    launch = start(*arguments)
    wait_for(launch, folder / "run", "finetune/checkpoints/step-*/complete.json")
    os.killpg(launch.pid, signal.SIGKILL)
    launch.wait()


def kill_alone_and_stop(arguments: list[str], folder: Path) -> None:
    """A launch that is killed alone, and one that is stopped as Ctrl-C does, as soon as it has a job of its own."""
    launch = start(*arguments)  # the launch alone: its jobs live on, and must not meet their successors
    wait_for(launch, folder / "shards/run-synthetic", "*.tar*")
    launch.kill()
    launch.wait()
    assert jobs_alive(folder), "no job was left running: the test killed too late"

    launch = start(*arguments)  # politely
    until("a job of its own", lambda: jobs_alive(folder, launch.pid), process=launch)
    launch.send_signal(signal.SIGINT)
    output = launch.communicate(timeout=60)[0]
    assert launch.returncode == 130, output
    assert "the same command goes on" in output
    assert "stopping what an earlier launch left running" in output
    assert jobs_alive(folder) == []


def test_a_terminal_that_is_closed_stops_the_launch_and_its_jobs(drawn: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()

    def in_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    launch = subprocess.Popen([sys.executable, "-m", "skinsynth", "launch", "configs/demo.yaml", *overrides(drawn, tmp_path)], cwd=ROOT,
                              stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=in_terminal)
    os.close(theirs)
    until("a job of its own", lambda: jobs_alive(tmp_path, launch.pid), 60)
    os.close(ours)
    assert launch.wait(60) == 130
    assert jobs_alive(tmp_path) == []
    assert not (tmp_path / "run/processes.json").exists(), "it stopped them in order"


@pytest.mark.timeout(600)
def test_killed_and_stopped_it_goes_on_where_it_was(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """While it generates; gangs that are killed while they train have a test of their own."""
    arguments = overrides(drawn, tmp_path)
    RunDir(tmp_path / "run").create(config.load("configs/demo.yaml", arguments))
    shutil.copytree(chain / "shards", tmp_path / "shards", copy_function=os.link, ignore=shutil.ignore_patterns("run-synthetic"))
    for node in ("prepare", "encode", "finetune"):
        shutil.copytree(chain / "run" / node, tmp_path / "run" / node, ignore=shutil.ignore_patterns("checkpoints"))
    kill_alone_and_stop(["launch", "configs/demo.yaml", *arguments], tmp_path)
    for tar in (tmp_path / "shards/run-synthetic").glob("*.tar"):
        assert tar.read_bytes() == (chain / "shards" / tar.parent.name / tar.name).read_bytes(), tar


@pytest.mark.soak  # minutes, most of them starts of processes
@pytest.mark.timeout(600)
def test_killed_three_times_it_finishes_with_the_same_report(chain: Path, drawn: Path, tmp_path: Path) -> None:
    arguments, run = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path)], tmp_path / "run"
    kill_all(arguments, tmp_path)
    kill_alone_and_stop(arguments, tmp_path)
    last = skinsynth(*arguments)
    assert last.returncode == 0, last.stdout + last.stderr
    assert [row["loss"] for row in read_lines(run / "finetune/metrics.jsonl")] == [
        row["loss"] for row in read_lines(chain / "run/finetune/metrics.jsonl")]
    assert (run / "report/report.json").read_bytes() == (chain / "run/report/report.json").read_bytes()
    assert read_json(run / "screen/accepted.json")["keys"] == read_json(chain / "run/screen/accepted.json")["keys"]


def test_a_finished_run_says_so_at_once(chain: Path, drawn: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in chain.rglob("*") if p.is_file() and p.name != "config.yaml"}
    again = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, chain))
    assert again.returncode == 0
    assert "all 8 stages" in again.stdout
    assert str(chain / "run/report/index.html") in again.stdout
    assert {p: p.stat().st_mtime_ns for p in chain.rglob("*") if p.is_file() and p.name != "config.yaml"} == before


def test_what_a_run_makes_is_for_the_whole_group(chain: Path, tmp_path: Path) -> None:
    """Weights and checkpoints too, which safetensors writes for their owner alone."""
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    made = [path for path in chain.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in made)
    assert [str(path) for path in made if path.stat().st_mode & mode != mode] == []


def test_the_report_has_the_promised_form(chain: Path) -> None:
    report = read_json(chain / "run/report/report.json")
    for arm in ("baseline", "hybrid"):
        for metric in ("accuracy", "auroc"):
            found = report["arms"][arm][metric]
            assert 0 <= found["ci"][0] <= found["value"] <= found["ci"][1] <= 1
            assert sum(found["seeds"]) / len(found["seeds"]) == pytest.approx(found["value"], abs=1e-5)
    assert [d["arms"] for d in report["differences"] if d["metric"] == "auroc"] == [["hybrid", "baseline"]]
    assert report["unfinished"] == {}
    assert report["synthetic"]["generated"] == 27
    assert 0 <= report["synthetic"]["accepted"] <= 27
    assert isinstance(report["synthetic"]["kid"], float)
    page = (chain / "run/report/index.html").read_text()
    assert "data:image/" in page
    assert 'src="http' not in page
    assert "Not a medical device" in (chain / "run/finetune/weights/MODEL_CARD.md").read_text()
    assert "Not a medical device" in (chain / "shards/run-synthetic/DATASHEET.md").read_text()


def test_report_by_the_command_line(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "run", tmp_path / "run")
    (tmp_path / "run/report/index.html").unlink()
    sheet = chain / "shards/run-synthetic/DATASHEET.md"
    written = sheet.stat().st_mtime_ns
    told = skinsynth("report", str(tmp_path / "run"))
    assert told.stdout.strip() == str(tmp_path / "run/report/index.html"), told.stderr
    assert (tmp_path / "run/report/report.json").read_bytes() == (chain / "run/report/report.json").read_bytes()
    assert sheet.stat().st_mtime_ns == written, "the set's datasheet says the same, so its file is left"
    several = skinsynth("report", str(tmp_path / "run"), str(chain / "run"), "--to", str(tmp_path / "both"))
    assert several.stdout.strip() == str(tmp_path / "both/index.html"), several.stderr
    assert "both" not in (tmp_path / "both/report.json").read_text()
    twice = skinsynth("report", str(chain / "run"), str(chain / "run"))
    assert "give each run folder once" in twice.stderr


@pytest.mark.parametrize(("until", "nodes"), [
    ("prepare", ["prepare"]), ("generate", ["prepare", "encode", "finetune", "generate"]), ("classify/baseline", ["prepare", "classify/baseline"]),
    ("classify", ["prepare", "encode", "finetune", "generate", "screen", "classify/baseline", "classify/hybrid"])])
def test_a_part_of_the_chain_is_what_its_end_needs(until: str, nodes: list[str]) -> None:
    assert [node.name for node in chain_of(config.load("configs/demo.yaml"), until)] == nodes


def test_a_launch_may_end_sooner(drawn: Path, tmp_path: Path) -> None:
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "--until"]
    typo = skinsynth(*arguments, "encoding")
    assert typo.returncode == 1
    assert "this chain has no stage 'encoding'; it has prepare, encode, finetune" in typo.stderr
    assert not (tmp_path / "run").exists()
    done = skinsynth(*arguments, "prepare")
    assert done.returncode == 0, done.stderr
    assert "prepare and what it needs; the same command without --until goes on" in done.stdout
    assert sorted(path.parent.name for path in (tmp_path / "run").glob("*/done.json")) == ["prepare"]
    assert "prepare of" in skinsynth(*arguments, "prepare").stdout


def test_another_configuration_in_the_same_folder_is_refused(chain: Path, drawn: Path) -> None:
    done = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, chain), "finetune.lr=1")
    assert done.returncode == 1
    assert "finetune.lr: 0.0003 -> 1.0" in done.stderr
    assert "take another folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_stage_names_its_message_and_log_and_is_gone_on_from(drawn: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(drawn, images)
    (images / "metadata.csv").rename(images / "away.csv")
    (images / "metadata.csv").write_text("image_name\nISIC_1\n")
    arguments = ["launch", "configs/demo.yaml", *overrides(images, tmp_path)]
    done = skinsynth(*arguments)
    assert done.returncode == 1
    assert "prepare failed" in done.stderr
    assert "metadata.csv" in done.stderr
    assert "log: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    log = Path(done.stderr.split("log: ")[1].splitlines()[0])
    assert "metadata.csv" in log.read_text()
    assert "Traceback" not in log.read_text()
    (images / "away.csv").rename(images / "metadata.csv")
    launch = start(*arguments)
    wait_for(launch, tmp_path / "run", "prepare/done.json")
    launch.terminate()
    assert launch.wait(60) == 130


def test_debug_runs_in_one_process_and_tells_what_a_concept_lacks(drawn: Path, tmp_path: Path) -> None:
    done = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=debug",
                     "finetune.concepts.nevus.instance.where={diagnosis: melonoma}")
    assert done.returncode == 1
    assert (tmp_path / "run/prepare/done.json").exists()
    assert not (tmp_path / "run/prepare/submit").exists()
    assert "finetune.concepts.nevus.instance: no training image matches {'diagnosis': 'melonoma'}" in done.stderr
    assert "nevus" in done.stderr.split("hold")[1]


def test_a_missing_base_model_is_told_before_anything_starts(drawn: Path, tmp_path: Path) -> None:
    done = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path, **{"model.base": "models/none"}))
    assert done.returncode == 1
    assert "models/none" in done.stderr
    assert not (tmp_path / "run/prepare").exists()


def test_arms_wait_for_what_they_need() -> None:
    from skinsynth import config

    needs = {n.name: n.needs for n in chain_of(config.load("configs/demo.yaml"))}
    assert needs["classify/baseline"] == ("prepare",)
    assert needs["classify/hybrid"] == ("screen",)
    assert set(needs["report"]) == {"screen", "classify/baseline", "classify/hybrid"}


def test_a_second_launch_is_refused(chain: Path, drawn: Path, tmp_path: Path) -> None:
    launch = start("launch", "configs/demo.yaml", *overrides(drawn, tmp_path))
    try:
        wait_for(launch, tmp_path / "run", "launch.lock")
        second = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, tmp_path))
        assert second.returncode == 1
        assert f"by process {launch.pid} on" in second.stderr
    finally:
        launch.terminate()
        launch.wait(60)


def test_help_and_config_are_for_people() -> None:
    assert "finetune.steps=20" in skinsynth("launch", "--help").stdout
    shown = skinsynth("config", "configs/demo.yaml", "seed=5").stdout
    assert "seed: 5" in shown
    assert "class_:" not in shown
    assert "class:" in shown
    wrong = skinsynth("launch", "configs/dmo.yaml")
    assert (wrong.returncode, "configs/dmo.yaml does not exist" in wrong.stderr) == (1, True)


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_slice_of_real_images_goes_all_the_way(real: Path, tmp_path: Path) -> None:
    """60 images of ISIC 2017, a few steps of everything."""
    rows = (real / "isic2017/metadata.csv").read_text().splitlines()
    benign = [r for r in rows[1:] if r.split(",")[8] == "0"][:36]
    malignant = [r for r in rows[1:] if r.split(",")[8] == "1"][:24]
    (tmp_path / "metadata.csv").write_text("\n".join([rows[0], *benign, *malignant]) + "\n")
    values = {k: v for k, v in (item.split("=", 1) for item in overrides(tmp_path, tmp_path)) if k != "data.duplicates"}
    values |= {"data.images": str(real / "isic2017/images"), "finetune.steps": "4", "classify.steps": "4", "classify.seeds": "[0]"}
    done = skinsynth("launch", "configs/isic2017.yaml", *(f"{k}={v}" for k, v in values.items()), "cluster=debug")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    assert report["synthetic"]["generated"] == 27
    assert set(report["arms"]) == {"baseline", "hybrid"}
