"""One job that looks at the compute nodes: submitted, waited for, its ranks' lines collected, cancelled where it takes too long."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from skinsynth import config as configs
from skinsynth import slurm
from skinsynth.doctor.check import FAIL, Check, failed
from skinsynth.doctor.node import node_checks
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json, write_text
from skinsynth.knobs import Config
from skinsynth.run import RunDir
from skinsynth.signals import undisturbed
from skinsynth.world import place

MINUTES = 10  # the job's time limit
LATE = 20  # seconds that a file may take from the node to here


@dataclass(frozen=True)
class NodeCheck:
    """What submitit pickles and each rank calls: it writes what it finds beside the other ranks' files."""

    folder: str

    def __call__(self) -> str:
        folder, found = Path(self.folder), []
        path = folder / f"rank-{place()[0].rank}.json"
        for check in node_checks(configs.load(folder / "config.yaml")):
            print(check, flush=True)
            found.append(asdict(check))
            write_json(path, {"whole": False, "checks": found})
        write_json(path, {"whole": True, "checks": found})
        return "done"


def look(cfg: Config, wait: float, say: Callable[[str], None]) -> list[Check]:
    """What all ranks of a gang like that of ``finetune`` find. Cancels its job when it takes longer than ``wait`` seconds, or on Ctrl-C.

    Raises:
        UserError: no Slurm cluster.
    """
    if cfg.cluster.kind != "slurm":
        raise UserError(f"--submit looks at the nodes of a Slurm cluster; this is cluster={cfg.cluster.kind} (take cluster=slurm)")
    run, wanted = RunDir(Path(cfg.run)), cfg.cluster.of("finetune")
    folder = run.path / "doctor" / time.strftime("%Y%m%d-%H%M%S")
    Path(cfg.data.shards).mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", configs.dump(cfg))
    job = ""
    try:
        with undisturbed():  # or the job's number would be lost
            job, name = _submit(cfg, run, folder)
        say(f"job {job} is submitted: {wanted.nodes} nodes with {wanted.tasks_per_node} ranks each, for at most {MINUTES} minutes")
        found = _collect(job, name, folder, wanted.nodes * wanted.tasks_per_node, wait, say)
    except slurm.SlurmError as error:
        return [Check(FAIL, "node job", str(error), "change cluster.stages.finetune, or ask your site")]
    finally:
        if job:
            with contextlib.suppress(slurm.SlurmError):
                slurm.cancel([job])  # one that has ended is not touched
    if not failed(found):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # the last one
    return found


def _submit(cfg: Config, run: RunDir, folder: Path) -> tuple[str, str]:
    """The job's id and name."""
    wanted = job_parameters(cfg, run)
    return slurm.sbatch(cfg, folder, wanted, [NodeCheck(str(folder))], "the job")[0], wanted["job_name"]


def job_parameters(cfg: Config, run: RunDir) -> dict[str, Any]:
    """Those of ``finetune``, but for ten minutes and never again."""
    found = slurm.parameters(cfg, run, "finetune", [])
    extra = {key: value for key, value in found["additional_parameters"].items() if key != "requeue"}
    changed = {"job_name": f"{found['job_name']}-doctor", "time": MINUTES, "additional_parameters": {**extra, "no-requeue": True}}
    return {key: value for key, value in {**found, **changed}.items() if key != "teardown"}


def _collect(job: str, name: str, folder: Path, ranks: int, wait: float, say: Callable[[str], None]) -> list[Check]:
    """Waits until every rank has said all, or the job has ended, or the time is up; whoever said less than all has a line too."""
    end, told, gone, pause = time.monotonic() + wait, "", 0.0, 1.0
    while True:
        state, now = slurm.queued([name]).get(job), time.monotonic()
        gone = 0.0 if state else gone or now
        files = {rank: read_json(folder / f"rank-{rank}.json") or {"whole": False, "checks": []} for rank in range(ranks)}
        whole = all(file["whole"] for file in files.values())
        if (whole and not state) or now > end or (gone and now - gone > LATE):
            break
        if state and _words(state) != told:
            told = _words(state)
            say(told)
        time.sleep(pause)
        pause = min(1.3 * pause, 20)  # a queue may take long, and each question is work for the controller that all share
    found = [Check(**check) for file in files.values() for check in file["checks"]]
    silent = [str(rank) for rank, file in files.items() if not file["whole"]]
    if silent:
        why = f"within {wait:.0f} s ({told}): the job is cancelled" if state else f"and job {job} has ended: {_ended(job)}"
        found.append(Check(FAIL, "node job", f"rank {', '.join(silent)} did not finish {why}", f"see the logs in {folder}"))
    return found


def _words(job: slurm.Job) -> str:
    reason = f": {job.reason}" if job.reason not in ("", "None") else ""
    return f"job {job.id} is {job.state.lower()}{reason if job.state == 'PENDING' else f' on {job.nodes}'}"


def _ended(job: str) -> str:
    try:
        state = slurm.ended([job]).get(job)
    except slurm.SlurmError as error:
        return str(error)
    return f"{state.state} {state.reason}".removesuffix(" None").strip() if state else "Slurm does not say how"


def together(checks: list[Check]) -> list[Check]:
    """Lines that several ranks share, once."""
    groups: dict[Check, list[str]] = {}
    for check in checks:
        groups.setdefault(replace(check, where=""), []).append(check.where)
    order = list(dict.fromkeys(check.name for check in groups))
    merged = [replace(check, where=where[0] if len(where) == 1 else f"{len(where)} ranks, first {where[0]}") for check, where in groups.items()]
    return sorted(merged, key=lambda check: order.index(check.name))
