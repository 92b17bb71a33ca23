"""Launching: a run's chain is handed to Slurm, to this machine, or done in this very process. No torch here."""

from __future__ import annotations

import os
import platform
import signal
import time
from pathlib import Path

from rich.console import Console

from skinsynth import slurm, stages
from skinsynth.chain import Node, chain
from skinsynth.data import given
from skinsynth.errors import UserError
from skinsynth.files import write_bytes
from skinsynth.knobs import Config
from skinsynth.local import Local, stop_processes
from skinsynth.models import hub
from skinsynth.reuse import check_names, take_over
from skinsynth.run import RunDir


def launch(cfg: Config, console: Console, earlier: RunDir | None = None, until: str | None = None) -> None:
    """Runs what is not done yet, or submits it; the same command again goes on. Of the ``earlier`` run it takes over what would come out the same.
    ``until``: a stage, or an arm of classify, after which it ends.

    Raises:
        UserError: another configuration or another launch in this folder, other data than were prepared, a job was refused, or a stage failed (its
            message, its log).
    """
    run, nodes = RunDir(Path(cfg.run)), chain(cfg, until)
    if cfg.cluster.kind == "slurm":
        slurm.check_path(run)
    run.check(cfg)
    given.check_unchanged(cfg, run, lambda line: console.print(line, highlight=False, soft_wrap=True))
    if all(run.is_done(node.name) for node in nodes):
        what = f"all {len(nodes)} stages of {run.path} are" if len(nodes) > 1 else f"{nodes[0].name} of {run.path} is"
        console.print(f"{what} done already")
        return
    for _, find in hub.models(cfg).values():
        find()  # a missing model is told now, not by a job that has waited for its turn
    hub.check_images(cfg, hub.find_base(cfg.model))
    run.make()
    with run.lock():
        # queued jobs read the configuration when they begin, so it is written only once it is known that this launch may be
        if cfg.cluster.kind != "slurm":
            _not_with_slurm(run, nodes)
        _same_mode(cfg, run)
        before, last = (run.config_path.read_bytes(), run.config()) if run.config_path.exists() else (None, None)
        if earlier:
            check_names(cfg, run, earlier)
        if not run.is_done("prepare"):  # told now like a missing model; and the folder would keep a name that was misspelt
            given.check(cfg)
        stop_processes(run, console, "stopping what an earlier launch left running:")  # two writers of one stage must not meet
        run.create(cfg)
        if earlier:
            take_over(cfg, run, earlier, console)
        if cfg.cluster.kind == "slurm":
            try:
                slurm.submit_chain(cfg, run, nodes, console, last)
            except BaseException:
                if before is not None:  # what was queued before goes on with what it was submitted with
                    write_bytes(run.config_path, before)
                raise
            console.print(f"see it with: skinsynth status {run.path} --watch", highlight=False, soft_wrap=True)
            return
        if cfg.cluster.kind == "debug":
            in_process(run, nodes)
        else:
            Local(cfg, run, nodes, console).run_all()


def in_process(run: RunDir, nodes: list[Node]) -> None:
    """All nodes one after the other in this process: for tests and debuggers."""
    for node in nodes:
        if not run.is_done(node.name) and stages.run_node(node.name, str(run.path)) != stages.OK:
            raise UserError(f"{node.name} did not finish: {run.failures(node.name).get(0, 'it was stopped')}")


def _not_with_slurm(run: RunDir, nodes: list[Node]) -> None:
    """Two writers of one stage must not meet."""
    if slurm.may_have(run):
        active = slurm.queued_of(run, [n.name for n in nodes])
        if active:
            raise UserError(f"jobs {', '.join(active)} of {run.path} are with Slurm: wait for them, or 'skinsynth cancel {run.path}'")


def _same_mode(cfg: Config, run: RunDir) -> None:
    """Jobs of an array that find themselves told to be a gang would each do all of it, and the other way round."""
    before = run.config().generate.mode if run.config_path.exists() else cfg.generate.mode
    if before != cfg.generate.mode and slurm.may_have(run):
        active = slurm.queued_of(run, ["generate"])
        if active:
            raise UserError(f"generate.mode={cfg.generate.mode}, but jobs {slurm.span(list(active))} were submitted with {before}: wait for them, "
                            f"or 'skinsynth cancel {run.path} generate' first")


def dry_run(cfg: Config, until: str | None = None) -> str:
    """What ``launch`` would submit; nothing is written.

    Raises:
        UserError: the cluster is no Slurm.
    """
    if cfg.cluster.kind != "slurm":
        raise UserError(f"--dry-run shows what is submitted to Slurm; this is cluster={cfg.cluster.kind} (take cluster=slurm)")
    return slurm.plan(cfg, RunDir(Path(cfg.run)), chain(cfg, until))


def cancel(run: RunDir, stage: str | None, console: Console) -> None:
    """Stops what runs and takes back what waits, with Slurm or here. What is done is kept.

    Raises:
        UserError: no such stage, or a single stage of a local launch.
    """
    names = [n.name for n in chain(run.config())]
    chosen = [name for name in names if stage in (None, name, name.split("/")[0])]
    if not chosen:
        raise UserError(f"{run.path} has no stage '{stage}'; there are {', '.join(names)}")
    owner = run.lock_owner()
    if owner is not None and owner[0] != platform.node():
        raise UserError(f"{run.path} is being launched on {owner[0]} (process {owner[1]}): stop it there, with Ctrl-C or 'skinsynth cancel'")
    if owner is not None and stage:
        raise UserError(f"a launch that is under way is stopped as a whole: skinsynth cancel {run.path}")
    if owner is not None:
        try:
            os.kill(owner[1], signal.SIGTERM)
        except PermissionError:
            raise UserError(f"{run.path} is being launched by another user (process {owner[1]}): ask them to stop it") from None
        console.print(f"told the launch (process {owner[1]}) to stop; it saves its state first")
        if run.config().cluster.kind != "slurm":
            return
        while run.lock_owner() == owner:  # it takes back what it submitted; what was with Slurm before it is left
            time.sleep(0.2)
    stopped = stop_processes(run, console, "stopping what a launch that was killed left running:", chosen)
    if slurm.may_have(run):
        active = slurm.queued_of(run, chosen)
        slurm.cancel(active)
        console.print(f"cancelled {slurm.span(list(active))}" if active else "nothing of it is with Slurm")
    elif not stopped:
        console.print(f"nothing of {run.path} is running")
