"""What is submitted, byte for byte, and what is said when Slurm says no."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, overrides, skinsynth, until

from skinsynth import config, slurm, status
from skinsynth.chain import chain
from skinsynth.files import read_json, write_json
from skinsynth.run import RunDir, Task

GOLDEN = Path(__file__).parent / "golden"
NODES = ("prepare", "encode", "finetune", "generate", "screen", "classify/baseline", "classify/hybrid", "report")


def run_skinsynth(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "skinsynth", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env={**env, "COLUMNS": "160"}, check=False)


@pytest.mark.parametrize("node", NODES)
def test_golden_sbatch_files(node: str, tmp_path: Path) -> None:
    """Delete a golden file and run this again to take the new text; the change is then seen in review."""
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", "run=runs/golden", "cluster.partition=gpu", "cluster.account=derma",
                                            "cluster.extra={reservation: skin}", "cluster.stages.finetune.constraint=a100"])
    run = RunDir(Path(cfg.run))
    needs, tasks = next((n.needs, n.tasks(cfg)) for n in chain(cfg) if n.name == node)
    text = slurm.script(cfg, run, node, tasks, [str(NODES.index(n) + 100) for n in needs])
    text = text.replace(str(ROOT), "ROOT").replace(str(ROOT.resolve()), "ROOT")
    text = re.sub(r"-golden-[0-9a-f]{6}", "-golden-HASH", text)
    text = re.sub(r"\S+/python[0-9.]*", "PYTHON", text)
    path = GOLDEN / f"{node.replace('/', '-')}.sbatch"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was not there; it is now: look at it, and commit it")
    assert text == path.read_text()


def test_dry_run_shows_every_script_and_writes_nothing(tmp_path: Path) -> None:
    done = skinsynth("launch", "configs/demo.yaml", "cluster=slurm", f"run={tmp_path / 'run'}", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 8
    assert "--array=0-31%16" in done.stdout
    assert "afterok:$screen:$classify_baseline:$classify_hybrid" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_misspelt_stage_of_a_cluster_is_told() -> None:
    done = skinsynth("config", "configs/demo.yaml", "cluster.stages.finetun.nodes=2")
    assert done.returncode == 1
    assert "cluster.stages.finetun: there is no such stage" in done.stderr
    assert "did you mean finetune?" in done.stderr


def test_a_stages_own_site_keys_go_before_the_clusters() -> None:
    cluster = config.load("configs/demo.yaml", ["cluster=slurm", "cluster.partition=gpu", "cluster.stages.prepare.partition=cpu",
                                                "cluster.extra={nice: 5}", "cluster.stages.prepare.extra={reservation: r}"]).cluster
    assert cluster.site("prepare")["partition"] == "cpu"
    assert cluster.site("encode")["partition"] == "gpu"
    assert cluster.site("prepare")["extra"] == {"nice": 5, "reservation": "r"}


def test_without_sbatch_launch_says_where_to_go(drawn: Path, tmp_path: Path) -> None:
    done = run_skinsynth({**os.environ, "PATH": str(tmp_path)}, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=slurm")
    assert done.returncode == 1
    assert "squeue is not there: this needs a login node" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slurm
@pytest.mark.parametrize(("wrong", "words"), [
    ("cluster.partition=nowhere", "invalid partition specified: nowhere"),
    ("cluster.account=nobody", "Invalid account"),
    ("cluster.partition=short", "time limit is invalid"),
    ("cluster.stages.prepare.extra={nodelist: node99}", "Invalid node name"),
])
def test_slurms_own_words_are_in_the_message(slurm: dict[str, str], drawn: Path, tmp_path: Path, wrong: str, words: str) -> None:
    done = run_skinsynth(slurm, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", wrong)
    assert done.returncode == 1
    assert "prepare could not be submitted" in done.stderr
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert slurm_active(slurm, RunDir(tmp_path / "run")) == []


@pytest.mark.slurm
def test_when_the_third_is_refused_the_first_two_are_taken_back(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    """finetune asks for more nodes than there are."""
    done = run_skinsynth(slurm, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}",
                         "cluster.stages.finetune.nodes=9")
    assert done.returncode == 1
    assert "finetune could not be submitted" in done.stderr
    assert "Node count specification invalid" in done.stderr or "More processors requested" in done.stderr or "node configuration" in done.stderr
    assert "cancelled what had been submitted" in done.stdout
    assert slurm_active(slurm, RunDir(tmp_path / "run")) == []
    status = run_skinsynth(slurm, "status", str(tmp_path / "run"))
    assert "waiting" in status.stdout
    assert "pending" not in status.stdout


@pytest.mark.slurm
def test_launch_again_keeps_what_waits_and_takes_strays_back(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}"]
    first = run_skinsynth(slurm, *arguments)
    assert first.returncode == 0, first.stderr
    run = RunDir(tmp_path / "run")
    jobs = slurm_jobs(run)
    assert len(slurm_active(slurm, run)) >= 8
    second = run_skinsynth(slurm, *arguments)
    assert second.stdout.count("with Slurm already") == 8, second.stdout
    assert slurm_jobs(run) == jobs
    write_json(run.path / "jobs.json", [job for job in jobs if job["node"] != "encode"])  # as if the launch had died right after sbatch
    third = run_skinsynth(slurm, *arguments)
    stray = next(job["id"] for job in jobs if job["node"] == "encode")
    assert f"cancelling what a launch that died had submitted: {stray}" in third.stdout
    assert "encode               submitted as" in third.stdout
    assert "finetune             submitted as" in third.stdout, "its job waited for one that is no more"
    assert "prepare              with Slurm already" in third.stdout
    local = run_skinsynth(slurm, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=local")
    assert local.returncode == 1
    assert "are with Slurm" in local.stderr
    shown = run_skinsynth(slurm, "status", str(run.path))
    assert "JobHeldUser" in shown.stdout
    gone = run_skinsynth(slurm, "cancel", str(run.path))
    assert gone.returncode == 0
    assert "cancelled" in gone.stdout
    assert not slurm_active(slurm, run)
    after = run_skinsynth(slurm, "status", str(run.path))
    assert "Slurm: CANCELLED" in after.stdout


@pytest.mark.slurm
def test_a_controller_that_is_down_is_told(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    """Another configuration, whose controller listens nowhere: as if it were down."""
    conf = tmp_path / "slurm.conf"
    text = Path(slurm["SLURM_CONF"]).read_text()
    conf.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text) + "\n")
    env = {**slurm, "SLURM_CONF": str(conf)}
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster"]
    done = run_skinsynth(env, *arguments)
    assert done.returncode == 1
    assert "squeue: slurm_load_jobs error: Unable to contact slurm controller" in done.stderr
    run = RunDir(tmp_path / "run")
    write_json(run.path / "jobs.json", [{"node": "prepare", "id": "1", "task": 0, "tasks": 1}])
    shown = run_skinsynth(env, "status", str(run.path))
    assert shown.returncode == 0
    assert "Unable to contact slurm controller" in shown.stdout
    assert "unknown" in shown.stdout


@pytest.mark.slurm
def test_without_accounting_the_controller_is_asked(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("squeue", "scontrol", "sbatch", "srun", "scancel"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    env = {**slurm, "PATH": str(tools)}
    arguments = [*overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}"]
    assert run_skinsynth(slurm, "launch", "configs/demo.yaml", *arguments).returncode == 0
    assert run_skinsynth(env, "cancel", str(tmp_path / "run")).returncode == 0
    shown = run_skinsynth(env, "status", str(tmp_path / "run"))
    assert "Slurm: CANCELLED" in shown.stdout, shown.stdout + shown.stderr


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_run_folder_that_cannot_be_written(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    where = tmp_path / "ro"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(where)], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        done = run_skinsynth(slurm, "launch", "configs/demo.yaml", *overrides(drawn, where), "cluster=devcluster")
    finally:
        subprocess.run(["umount", str(where)], check=True)
    assert done.returncode == 1
    assert f"the run folder {where / 'run'} cannot be written: Read-only file system" in done.stderr


def test_a_task_that_gets_no_further_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skinsynth.errors import UserError
    from skinsynth.run import Progress

    run = RunDir(tmp_path)
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        run.begin_task("generate", 0, 3)
        Progress(run, "generate", 0, 100 - 10 * restart, "images")  # ten more are committed each time
    for restart in range(3, 6):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        run.begin_task("generate", 0, 3)
        Progress(run, "generate", 0, 80, "images")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "6")
    run.begin_task("generate", 0, 3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "7")
    with pytest.raises(UserError, match="4 times in a row without getting any further"):
        run.begin_task("generate", 0, 3)
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # a new job counts anew
    run.begin_task("generate", 0, 3)


def test_tasks_that_did_their_share_are_remembered(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for index in (0, 2):
        run.finish_task("generate", Task(index, 4))
    assert run.unfinished("generate", 4) == [1, 3]
    assert run.unfinished("generate", 3) == [0, 1, 2], "cut in another way"


@pytest.mark.slurm
def test_the_chain_by_hand_is_not_submitted_twice(slurm: dict[str, str], tmp_path: Path) -> None:
    """sbatch asks for less here than the script says, since the development cluster is small."""
    sbatch = shutil.which("sbatch", path=slurm["PATH"])
    small = ('for word; do case $word in --gpus*|--nodes*|--ntasks*) ;; *) kept+=("$word");; esac; done\n'
             f'exec {sbatch} --hold --cpus-per-task=1 "${{kept[@]}}"')
    for name, does in {"sbatch": small, "skinsynth": f'exec {sys.executable} -m skinsynth "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {**slurm, "PATH": f"{tmp_path}:{slurm['PATH']}"}

    def pipeline(run: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["slurm/pipeline.sh", "configs/demo.yaml", str(tmp_path / run)], cwd=ROOT, env=env, capture_output=True, text=True,
                              check=False)

    first = pipeline("a,b")
    assert first.returncode == 0, first.stderr
    jobs = re.findall(r"\d+", first.stdout.splitlines()[-2])
    assert len(jobs) == 8
    again, other = pipeline("a,b"), pipeline("other/a,b")
    assert again.returncode == 1
    assert f"are in the queue already: {' '.join(jobs)}. Wait for them, or take them back" in again.stderr
    assert other.returncode == 0, "another run of that name"
    for told in (again, pipeline("other/a,b")):
        subprocess.run(["scancel", told.stderr.split()[-1]], env=slurm, check=True)
    assert pipeline("a,b").returncode == 0
    subprocess.run(["scancel", again.stderr.split()[-1]], env=slurm, check=True)


def slurm_jobs(run: RunDir) -> list[dict[str, object]]:

    found: list[dict[str, object]] = read_json(run.path / "jobs.json")
    return found


def slurm_active(env: dict[str, str], run: RunDir) -> list[str]:
    names = ",".join(slurm.job_name(run, node) for node in NODES)
    return subprocess.run(["squeue", "-h", f"--name={names}", "--states=PENDING,RUNNING"], env=env, capture_output=True, text=True, timeout=30,
                          check=True).stdout.splitlines()


def test_paths_with_quotes_and_a_missing_site_script(tmp_path: Path) -> None:
    where = tmp_path / "O'Brien's runs"
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", f"run={where}/run"])
    for node, tasks in (("finetune", 1), ("generate", 4), ("classify/hybrid", 3)):
        text = slurm.script(cfg, RunDir(Path(cfg.run)), node, tasks, [])
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    done = skinsynth("launch", "configs/demo.yaml", "cluster=slurm", "cluster.env=nope.sh", f"run={tmp_path / 'run'}", "--dry-run")
    assert done.returncode == 1
    assert "nope.sh is not there: give the path of the script that jobs source" in done.stderr


def test_an_interactive_jobs_own_variables_reach_neither_jobs_nor_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"SLURM_MEM_PER_CPU": "1", "SLURM_JOB_ID": "7", "SQUEUE_FORMAT": "%i", "WORLD_SIZE": "2"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CONF_SERVER": "ctl", "SLURM_JWT": "secret", "MASTER_ADDR": "10.0.0.1",
            "SBATCH_ACCOUNT": "derma", "MY_WORLD_SIZE": "2"}
    for name, value in {**own, **kept}.items():
        monkeypatch.setenv(name, value)
    told = slurm.ask("env")
    assert not [name for name in own if f"\n{name}=" in f"\n{told}"]
    assert all(f"\n{name}=" in f"\n{told}" for name in kept)
    assert os.environ["SLURM_JOB_ID"] == "7"


@pytest.mark.parametrize(("node", "tasks"), [("prepare", 4), ("finetune", 1), ("classify/hybrid", 3)])
@pytest.mark.parametrize("status", [0, 3])
def test_a_checkout_that_was_moved_does_not_change_how_a_job_ends(node: str, tasks: int, status: int, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("devcluster"))
    monkeypatch.setattr(slurm, "SCRIPTS", scripts)
    text = slurm.script(config.load("configs/demo.yaml", ["cluster=slurm"]), RunDir(tmp_path / "run"), node, tasks, [])
    work = next(line for line in text.splitlines() if line.startswith("srun "))
    scripts.rename(tmp_path / "moved")
    done = subprocess.run(["bash", "-c", text.replace(work, f"(exit {status})")], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"},
                          capture_output=True, text=True, check=False)
    assert "requeue.sh: No such file" in done.stderr
    assert done.returncode == status


@pytest.mark.parametrize(("index", "least", "most", "count", "right"), [
    (1, 1, 2, 2, "0-1"), (1, 1, 1, 1, "0-0"), (2, 0, 4, 3, "0-2"), (3, 0, 3, 4, ""), ("", "", "", "", "")])
def test_an_array_by_hand_that_leaves_shares_out_is_refused(index: object, least: object, most: object, count: object, right: str,
                                                            tmp_path: Path) -> None:
    """Share 0 would never be done. What srun would be given is printed here."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    array = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_TASK_MIN": least, "SLURM_ARRAY_TASK_MAX": most, "SLURM_ARRAY_TASK_COUNT": count}
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {name: str(value) for name, value in array.items() if value != ""}
    done = subprocess.run(["bash", ROOT / "slurm/stage.sbatch", "prepare", "runs/x"], env=env, capture_output=True, text=True, check=False)
    if right:
        assert (done.returncode, done.stdout) == (2, "")
        assert f"take --array={right}." in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"-m jobs.prepare runs/x --task {index or 0}/{count or 1}\n")


def test_defaults_of_the_environment_stay_where_the_launch_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch itself lets them go before what a script says."""
    settled = ("JOB_NAME", "ARRAY_INX", "WAIT", "PARTITION", "MEM_PER_CPU", "GPUS_PER_TASK", "CPUS_PER_GPU", "RESERVATION")
    left = ("ACCOUNT", "QOS", "EXPORT", "GPU_BIND", "MEM_BIND", "WAIT_ALL_NODES", "WCKEY")
    for name in settled + left:
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", "cluster.partition=gpu", "cluster.extra={reservation: skin}"])
    with slurm.own_environment(slurm.parameters(cfg, RunDir(Path("runs/golden")), "finetune", [])):
        assert {name for name in settled + left if f"SBATCH_{name}" in os.environ} == set(left)
    cfg.cluster.stages["finetune"].gpus_per_node, cfg.cluster.stages["finetune"].gres = 0, "gpu:a100:4"
    with slurm.own_environment(slurm.parameters(cfg, RunDir(Path("runs/golden")), "finetune", [])):
        assert "SBATCH_GPUS_PER_TASK" not in os.environ
    cfg.cluster.stages["finetune"].gres = None
    with slurm.own_environment(slurm.parameters(cfg, RunDir(Path("runs/golden")), "finetune", [])):
        assert "SBATCH_GPUS_PER_TASK" in os.environ
    assert os.environ["SBATCH_PARTITION"] == "1"


@pytest.mark.slurm
def test_defaults_of_the_environment_do_not_go_before_the_cluster_file(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    env = {**slurm, "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "short", "SBATCH_NO_REQUEUE": "1", "SBATCH_OUTPUT": "/dev/null",
           "SBATCH_ARRAY_INX": "0-5", "SBATCH_JOB_NAME": "mine"}
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}", "--until", "encode"]
    first, again = run_skinsynth(env, *arguments), run_skinsynth(env, *arguments)
    assert first.returncode == 0, first.stderr
    assert again.stdout.count("with Slurm already") == 2, "jobs are found by their names"
    run = RunDir(tmp_path / "run")
    jobs = slurm_jobs(run)
    assert [job["node"] for job in jobs] == ["prepare", "prepare", "encode"]
    shown = subprocess.run(["scontrol", "show", "job", str(jobs[0]["id"]), "--oneliner"], env=slurm, capture_output=True, text=True, check=True)
    for pair in ("Partition=main", "TimeLimit=01:00:00", "Requeue=1", f"StdOut={run.node('prepare')}/submit/"):
        assert pair in shown.stdout
    assert run_skinsynth(slurm, "cancel", str(run.path)).returncode == 0


@pytest.mark.parametrize(("failures", "turns"), [(2, 1), (9, 0)])
def test_a_controller_that_does_not_answer_at_once_is_asked_again(tmp_path: Path, failures: int, turns: int) -> None:
    """At the time limit of a thousand tasks. A controller that is overloaded cannot be had at will, so squeue and scontrol are scripts here."""
    for name, does in {"sleep": ":", "squeue": f'echo x >> {tmp_path}/asked; [ "$(wc -l < {tmp_path}/asked)" -gt {failures} ] && echo RUNNING',
                       "scontrol": f'echo "$@" >> {tmp_path}/told; [ "$(wc -l < {tmp_path}/told)" -gt 1 ]'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-c", f"code=75; source {ROOT}/slurm/requeue.sh -"], capture_output=True, text=True, check=False,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    assert done.returncode == 75
    told = (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []
    assert told == ["requeue 7"] * 2 * turns, "the first of them failed"


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_path_that_slurm_would_change_is_refused(tmp_path: Path, more: list[str]) -> None:
    for name, sign in (("50%", "%"), ("a\\b", "\\")):
        done = skinsynth("launch", "configs/demo.yaml", "cluster=slurm", f"run={tmp_path / name / 'run'}", *more)
        assert done.returncode == 1
        assert f"run: there is a '{sign}' in {tmp_path / name}/run" in done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slurm
def test_a_launch_that_is_refused_changes_nothing_that_queued_jobs_read(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path)]
    held = [*arguments, "cluster=devcluster", "cluster.extra={hold: true}"]
    assert run_skinsynth(slurm, *held).returncode == 0
    before = (tmp_path / "run/config.yaml").read_text()
    for other, words in (([*arguments, "cluster=debug"], "are with Slurm: wait for them"),
                         ([*held, "generate.mode=gang"], "were submitted with array: wait for them")):
        done = run_skinsynth(slurm, *other)
        assert done.returncode == 1
        assert words in done.stderr
        assert (tmp_path / "run/config.yaml").read_text() == before
    assert run_skinsynth(slurm, "cancel", str(tmp_path / "run")).returncode == 0


def test_where_slurm_refuses_a_launch_jobs_read_what_they_were_submitted_with(drawn: Path, tmp_path: Path) -> None:
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path)]
    RunDir(tmp_path / "run").create(config.load(arguments[1], [*arguments[2:], "cluster=slurm", "cluster.partition=old"]))
    before = (tmp_path / "run/config.yaml").read_bytes()
    done = run_skinsynth({**os.environ, "PATH": str(tmp_path)}, *arguments, "cluster=slurm", "cluster.partition=new")
    assert "squeue is not there" in done.stderr
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def with_programs(env: dict[str, str], folder: Path, **scripts: str) -> dict[str, str]:
    """The environment in which Slurm's programs are scripts; ``$REAL`` is the real one."""
    (folder / "bin").mkdir()
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\nREAL={shutil.which(name, path=env['PATH'])}\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return {**env, "PATH": f"{folder}/bin:{env['PATH']}"}


def launching(env: dict[str, str], folder: Path, items: list[str]) -> subprocess.Popen[str]:
    """A launch whose first job Slurm has accepted, and of which sbatch has not told yet."""
    slow = with_programs(env, folder, sbatch=f'$REAL "$@"; code=$?; touch {folder}/accepted; sleep 2; exit $code')
    process = subprocess.Popen([sys.executable, "-m", "skinsynth", "launch", "configs/demo.yaml", *items], cwd=ROOT, text=True, env=slow,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # what runs in the background ignores it
    until("sbatch has submitted", (folder / "accepted").exists, 60, process)
    return process


@pytest.mark.slurm
@pytest.mark.parametrize("way", ["Ctrl-C", "cancel"])
def test_what_sbatch_was_submitting_when_the_launch_was_stopped_is_taken_back(slurm: dict[str, str], drawn: Path, tmp_path: Path, way: str) -> None:
    """What an earlier launch submitted is for cancel alone."""
    run, items = RunDir(tmp_path / "run"), [*overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}"]
    assert run_skinsynth(slurm, "launch", "configs/demo.yaml", *items, "--until", "prepare").returncode == 0
    before = slurm_active(slurm, run)
    process = launching(slurm, tmp_path, items)
    assert len(slurm_active(slurm, run)) == len(before) + 1
    if way == "cancel":
        assert run_skinsynth(slurm, "cancel", str(run.path)).returncode == 0
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "cancelled what had been submitted" in said
    assert slurm_active(slurm, run) == ([] if way == "cancel" else before)


TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"


def unconfirmed(folder: Path) -> str:
    """An sbatch that waits in vain for the answer to what it submitted."""
    return f'$REAL "$@" | tee {folder}/accepted; echo "sbatch: error: {TIMED_OUT}" >&2; exit 1'


@pytest.mark.slurm
def test_an_sbatch_that_tells_no_number_is_an_error_and_its_job_taken_back(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    env = with_programs(slurm, tmp_path, sbatch='$REAL "$@" > /dev/null; echo "welcome to the site"')
    done = run_skinsynth(env, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}")
    assert done.returncode == 1
    assert "prepare could not be submitted; sbatch: " in done.stderr
    assert "welcome to the site" in done.stderr
    assert "Traceback" not in done.stderr
    assert slurm_active(slurm, RunDir(tmp_path / "run")) == []


@pytest.mark.slurm
def test_what_slurm_accepted_though_sbatch_says_no_is_taken_back(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    env = with_programs(slurm, tmp_path, sbatch=unconfirmed(tmp_path))
    done = run_skinsynth(env, "launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}")
    assert done.returncode == 1
    assert f"prepare could not be submitted; sbatch: {TIMED_OUT}" in done.stderr
    assert "Submitted batch job" in (tmp_path / "accepted").read_text()
    assert "cancelled what had been submitted" in done.stdout
    assert slurm_active(slurm, RunDir(tmp_path / "run")) == []


@pytest.mark.slurm
def test_what_could_not_be_taken_back_is_cancelled_later(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    """Slurm took a job, sbatch did not hear of it, and then nobody heard anything any more. The run was a local one before."""
    run, items = RunDir(tmp_path / "run"), overrides(drawn, tmp_path)
    run.create(config.load("configs/demo.yaml", items))
    env = with_programs(slurm, tmp_path, sbatch=unconfirmed(tmp_path), squeue=f'[ ! -e {tmp_path}/accepted ] && exec $REAL "$@"; exit 1')
    done = run_skinsynth(env, "launch", "configs/demo.yaml", *items, "cluster=devcluster", "cluster.extra={hold: true}")
    assert f"whether Slurm took the job all the same is not known (squeue: exit status 1); 'skinsynth cancel {run.path}' does it later" in done.stdout
    assert run.config().cluster.kind == "local"
    assert len(slurm_active(slurm, run)) == 1
    assert "cancelled" in run_skinsynth(slurm, "cancel", str(run.path)).stdout
    assert slurm_active(slurm, run) == []


@pytest.mark.slurm
def test_what_a_launch_that_died_had_submitted_is_seen(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    """It was killed before it could write down the job's number."""
    items, run = overrides(drawn, tmp_path), RunDir(tmp_path / "run")
    process = launching(slurm, tmp_path, [*items, "cluster=devcluster", "cluster.extra={hold: true}"])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run.path / "jobs.json").exists()
    assert "JobHeldUser" in run_skinsynth(slurm, "status", str(run.path)).stdout
    local = run_skinsynth(slurm, "launch", "configs/demo.yaml", *items, "cluster=local")
    assert "are with Slurm: wait for them" in local.stderr
    assert "cancelled" in run_skinsynth(slurm, "cancel", str(run.path)).stdout
    assert slurm_active(slurm, run) == []


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("seen", [True, False])
def test_jobs_are_found_by_another_path_of_the_run(slurm: dict[str, str], drawn: Path, tmp_path: Path, seen: bool) -> None:
    """``seen``: whether the path by which it was launched is there, too, or is another host's. A copy has the jobs' numbers alone."""
    first, other = tmp_path / "first", tmp_path / "other"
    for folder in (first, other):
        folder.mkdir()
    if subprocess.run(["mount", "--bind", str(other), str(first)], capture_output=True, check=False).returncode:
        pytest.skip("a folder cannot be mounted here")
    items = [*overrides(drawn, tmp_path), "cluster=devcluster", "cluster.extra={hold: true}"]
    try:
        assert run_skinsynth(slurm, "launch", "configs/demo.yaml", *items, f"run={first}/run").returncode == 0
        jobs = slurm_active(slurm, RunDir(first / "run"))
        if not seen:
            subprocess.run(["umount", str(first)], check=True)
        again = run_skinsynth(slurm, "launch", "configs/demo.yaml", *items, f"run={other}/run")
        assert again.stdout.count("with Slurm already") == 8, again.stdout + again.stderr
        local = run_skinsynth(slurm, "launch", "configs/demo.yaml", *items, f"run={other}/run", "cluster=local")
        assert "are with Slurm: wait for them" in local.stderr
        assert "JobHeldUser" in run_skinsynth(slurm, "status", f"{other}/run").stdout
        if seen:
            shutil.copytree(other, tmp_path / "copy")
            assert "nothing of it is with Slurm" in run_skinsynth(slurm, "cancel", str(tmp_path / "copy/run")).stdout
            assert slurm_active(slurm, RunDir(first / "run")) == jobs
        assert "cancelled" in run_skinsynth(slurm, "cancel", f"{other}/run").stdout
        assert slurm_active(slurm, RunDir(first / "run")) == []
    finally:
        subprocess.run(["umount", str(first)], capture_output=True, check=False)


def test_a_job_that_the_controller_alone_knows_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was requeued after squeue had been asked."""
    (tmp_path / "bin").mkdir()
    for name, does in {"squeue": ":", "sacct": ":", "scontrol": "echo JobId=17 JobState=PENDING Reason=BeginTime"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", [f"run={run.path}", "cluster=slurm"]))
    slurm.note(run, [slurm.Submitted("prepare", "17", 0, 1)])
    row = status.rows(run)[0][0]
    assert (row.state, row.detail) == ("pending", "BeginTime")
