"""Shared fixtures: drawn images, the real ones where they are, and one small chain that many tests look at."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from skinsynth.knobs import Config
    from skinsynth.run import RunDir

# Before torch comes: other work on the cores must not make the tests crawl. Where workers share the cores, a thread each is fastest; and pixels are
# compared with those of jobs, which have one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests/gpu may use; the others run on CPUs everywhere, or none could compare bytes. xdist's workers find it as their parent left it.
GPUS = os.environ.setdefault("SKINSYNTH_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
Setup = Callable[..., "tuple[Config, RunDir]"]
ROOT = Path(__file__).resolve().parent.parent
DEVCLUSTER = ROOT / "slurm" / "devcluster"
REAL = ROOT.parent / "shared" / "isic"

SMALL = {  # the demo, cut to seconds
    "finetune.steps": 8, "finetune.checkpoint_every": 4, "finetune.global_batch": 8, "finetune.warmup_steps": 2,
    "generate.classes.benign.count": 13, "generate.classes.malignant.count": 14, "generate.shard_size": 9, "generate.steps": 4, "generate.batch": 4,
    "screen.min_accepted": 0.0, "screen.on_fail": "warn",  # so few images of so short a training may all be too soft, on some kind of CPU
    "classify.steps": 12, "classify.evaluate_every": 4, "classify.checkpoint_every": 4, "classify.warmup_steps": 2,
    "prepare.shard_size": 30, "prepare.max_bad": 0.2,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """There is one Slurm at a time, so its tests go to one of the workers that share the suite (make test). xdist's own groups cannot do it:
    they write the group's name into the node id, which pytest 9.2 does not show any more."""
    from xdist.scheduler import LoadScopeScheduling

    class OneSlurm(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else nodeid

    return OneSlurm(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The Slurm's tests are one worker's, from the beginning on. The other long ones (those that have a timeout of their own) come before the
    short ones, so that no worker is left alone with one at the end; and first those that need not wait for the chain to be made."""
    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        if item.nodeid.startswith("tests/slurm/"):
            return False, False, False
        return True, item.get_closest_marker("timeout") is None, bool({"chain", "make"} & set(getattr(item, "fixturenames", ())))

    items.sort(key=place)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the workers makes and all use."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                folder.rename(root / f"{name}-failed")
                raise
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 drawn images with metadata.csv and duplicates.csv."""
    from skinsynth.data.phantom import write_dataset

    return made_once(tmp_path_factory, "drawn", lambda folder: write_dataset(folder, images=120, malignant=0.35, seed=3))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real images; skips where there is none."""
    if not (REAL / "isic2017" / "metadata.csv").is_file():
        pytest.skip(f"no real images at {REAL}: they are not part of the repository (see shards/README.md)")
    return REAL


@pytest.fixture(scope="session")
def gpu() -> dict[str, str]:
    """The environment of a process that may use the GPU; skips where there is none."""
    if not shutil.which("nvidia-smi") or GPUS == "" or subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode:
        pytest.skip("needs a GPU")
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    return env if GPUS == "all" else {**env, "CUDA_VISIBLE_DEVICES": GPUS}


def free_port() -> int:
    """For the ranks of a gang: other tests run beside this one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def overrides(images: Path, folder: Path, run: str = "run", **more: object) -> list[str]:
    """``key=value`` items for a small run of the demo that keeps all it makes in ``folder``."""
    values = {"run": folder / run, "data.shards": folder / "shards", "data.name": "small", "data.metadata": images / "metadata.csv",
              "data.images": images / "images", "data.duplicates": images / "duplicates.csv", **SMALL, **more}
    return [f"{key}={value}" for key, value in values.items()]


def skinsynth(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run([sys.executable, "-m", "skinsynth", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=400,
                          env={**os.environ, "COLUMNS": "160"}, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def chain(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished small run (``run``) and its datasets (``shards``), made as a user makes it: by the command line, through
    submitit's local executor, two ranks and two tasks where the demo has them."""
    def make(folder: Path) -> None:
        done = skinsynth("launch", "configs/demo.yaml", *overrides(drawn, folder))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return made_once(tmp_path_factory, "chain", make)


@pytest.fixture
def make(chain: Path, drawn: Path, tmp_path: Path) -> Setup:
    """``make(**classify keys)``: a run folder with the datasets and the screening of the shared chain; safe to change."""

    from skinsynth import config
    from skinsynth.run import RunDir

    def made(**keys: object) -> tuple[Config, RunDir]:
        cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{f"classify.{k}": v for k, v in keys.items()}))
        run = RunDir(tmp_path / "run")
        run.create(cfg)
        shutil.copytree(chain / "shards", tmp_path / "shards")
        for node in ("prepare", "encode", "finetune", "generate", "screen"):  # it is done where those before it are
            shutil.copytree(chain / "run" / node, run.node(node), ignore=shutil.ignore_patterns("checkpoints"))
        return cfg, run

    return made


def until(what: str, true: Callable[[], object], seconds: float = 300, process: subprocess.Popen[str] | None = None) -> None:
    """Waits, patiently: where three workers share two slow cores, a start of a stage may take a minute. ``process``: does it, and must be alive."""
    begun = asked = time.time()
    while not true():
        now = time.time()
        ended = process is not None and process.poll() is not None
        if ended or now > begun + seconds:
            if process is not None and process.stdout:
                process.kill()
                what += ": " + process.communicate()[0][-3000:]
            raise AssertionError(f"{what}: {'the process has ended' if ended else f'not within {seconds} s'}")
        time.sleep(max(0.02, now - asked))  # what takes long to ask is asked seldom
        asked = time.time()


def plant(run: RunDir, cfg: Config, kind: str, change: Callable[[dict[str, Any]], None], manifest: bool = False) -> None:
    path = run.dataset(cfg, kind) / ("manifest.json" if manifest else "parts/00000.json")
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    if kind == "synthetic":
        take_as_screened(run, cfg)


def take_as_screened(run: RunDir, cfg: Config) -> None:
    """The synthetic set as it is now passes for the one that was screened."""
    path, manifest = run.node("screen") / "accepted.json", run.dataset(cfg, "synthetic") / "manifest.json"
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"manifest_sha256": sha256}))


# ---- a Slurm: our devcluster where we may start one, else a site's own ----

def devcluster(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DEVCLUSTER), *arguments], env=env, capture_output=True, text=True, timeout=150, check=False)


def site_slurm_answers() -> bool:
    try:
        return shutil.which("sbatch") is not None and subprocess.run(["sinfo"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch, sacct ... work. Has SKINSYNTH_DEVCLUSTER where the Slurm is ours."""
    if os.getuid() != 0 and site_slurm_answers():
        yield dict(os.environ)
        return
    if os.getuid() != 0 or not Path("/etc/debian_version").exists():
        reason = "no Slurm here: neither root on Debian or Ubuntu, to start slurm/devcluster, nor an sbatch with a controller that answers"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    if "PYTEST_XDIST_WORKER" in os.environ:
        try:
            (tmp_path_factory.getbasetemp().parent / "slurm-of-a-worker").mkdir()
        except FileExistsError:
            pytest.fail("another worker runs a Slurm already: see pytest_xdist_make_scheduler")
    env = os.environ | {"SKINSYNTH_DEVCLUSTER": str(tmp_path_factory.mktemp("slurm"))}
    started = devcluster("up", env=env)
    if started.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"slurm/devcluster up failed: {started.stdout}{started.stderr}")
    try:
        printed = devcluster("env", env=env).stdout
        lines = subprocess.run(["sh", "-c", f"{printed}\nenv -0"], env=env, capture_output=True, text=True, check=True).stdout.split("\0")
        yield dict(line.split("=", 1) for line in lines if "=" in line)
    finally:
        devcluster("down", "--wipe", env=env)


def jpeg(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> Path:
    from PIL import Image

    Image.new(mode, size, 90 if mode == "L" else None).save(path, **options)  # type: ignore[arg-type]
    return path
