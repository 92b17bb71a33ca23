"""A new run takes over from an earlier one what would come out the same: another arm, or another way to screen, needs no image made again.

A node is taken over where its own keys are the same and where what it needs is, by its hash, what the earlier run had. The earlier run is only
read, and either may be deleted: tars and weights are hard links where the file system has them, what may be written to later is copied. No torch
here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from skinsynth import config as configs
from skinsynth.errors import UserError
from skinsynth.files import put_in_place, read_hint, read_json, sha256_or_none, write_json
from skinsynth.knobs import Config
from skinsynth.run import CARDS, RunDir, Task

# What a stage reads itself, beside ``seed``; what it needs from other stages is told by their hashes.
KEYS = {"prepare": ("data.", "prepare."), "encode": ("model.", "encode.", *(f"finetune.{key}" for key in ("method", "concepts", "images", "cache"))),
        "finetune": ("model.", "encode.", "finetune.", "data."), "generate": ("model.", "generate."), "screen": ("model.", "screen."),
        "classify": ("model.", "classify.", "data.")}
DATASETS = ("latents", "synthetic")  # those that belong to a run
LEFT = ("submit", "failed", "restarts", "checkpoints", ".*", *CARDS)  # of a job, of no use to a stage that is done, or written anew by report
ORIGIN = "taken_from"  # in done.json of a node, and in metrics.json of a seed: the earlier run
LINKED = (".tar", ".safetensors")  # large, and never written to once they have their name


def take_over(cfg: Config, run: RunDir, old: RunDir, console: Console) -> None:
    """Fills the new run's folder and datasets; the caller has its lock. What the new run has begun itself stays.

    Raises:
        UserError: as ``check_names``, or a file that cannot be copied.
    """
    check_names(cfg, run, old)
    was = old.config()
    taken: list[str] = []
    for node, needs in configs.needs(cfg).items():
        if node == "report" or run.is_done(node):
            continue
        why = _hindrance(cfg, run, was, old, node, needs)
        if not why:
            found = _take(cfg, run, was, old, node)
            taken += found
            why = "" if found == [node] else "there are other seeds" if found else f"it is not done in {old.path}"
        if why:
            console.print(f"not taken over: {node}, since {why}", highlight=False, soft_wrap=True)
    if taken:
        console.print(f"taken over from {old.path}: {', '.join(taken)}", highlight=False, soft_wrap=True)


def check_names(cfg: Config, run: RunDir, old: RunDir) -> None:
    """Raises ``UserError`` where there is no earlier run, or one that calls its datasets the same."""
    was = old.config()
    if any(old.dataset(was, kind).resolve() == run.dataset(cfg, kind).resolve() for kind in DATASETS):
        raise UserError(f"{run.path} and {old.path} would have the same datasets ({old.dataset(was, 'synthetic')}): give the new run another name")


def origins(cfg: Config, run: RunDir) -> dict[str, list[str]]:
    """Earlier run -> the nodes, and the seeds of arms, that were made there. What was made again since is not among them."""
    files = {node: run.done_path(node) for node in configs.needs(cfg)}
    for arm in cfg.classify.arms:
        files |= {f"classify/{arm}/seed-{seed}": run.seed(arm, seed) / "metrics.json" for seed in cfg.arm_seeds}
    found: dict[str, list[str]] = {}
    for name, path in files.items():
        earlier = (read_hint(path) or {}).get(ORIGIN)
        if earlier:
            found.setdefault(earlier, []).append(name)
    return found


def _hindrance(cfg: Config, run: RunDir, was: Config, old: RunDir, node: str, needs: tuple[str, ...]) -> str:
    """Why a node cannot be taken over."""
    if configs.needs(was).get(node) != needs:
        return f"{old.path} has none" if node not in configs.needs(was) else "it needs other stages than there"
    changed = [line for line in configs.difference(cfg, was) if _concerns(line.split(":")[0], node)]
    if changed:
        return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    for need in needs:
        if not run.is_done(need) or run.made(need) != old.made(need):
            return f"{need} is not the same"
    return f"{run.node(node)} has been begun already" if (run.node(node) / "progress").exists() else ""


def _concerns(key: str, node: str) -> bool:
    stage, _, arm = node.partition("/")
    if key == "classify.seeds" or (key.startswith("classify.arms.") and not key.startswith(f"classify.arms.{arm}.")):
        return False  # an arm's seeds are taken over one by one, and no arm minds the others
    return key == "seed" or key.startswith(KEYS[stage])


def _take(cfg: Config, run: RunDir, was: Config, old: RunDir, node: str) -> list[str]:
    """A node as a whole, or of an arm the seeds that are done; what was taken."""
    _, _, arm = node.partition("/")
    done = read_json(old.done_path(node))
    if done is not None and not old.is_done(node):  # what it read has changed since
        return []
    if arm and (done is None or cfg.arm_seeds != was.arm_seeds):
        return _take_seeds(cfg, run, was, old, arm)
    if done is None:
        return []
    homes = {old.dataset(was, kind).resolve(): run.dataset(cfg, kind).resolve() for kind in DATASETS}
    for source, target in homes.items():
        if any(_place(old, path).is_relative_to(source) for path in done["outputs"]):
            if not target.exists():
                _copy(source, target)
            elif sha256_or_none(target / "manifest.json") != sha256_or_none(source / "manifest.json"):
                raise UserError(f"{target} is there already, of another run of this name: delete it, or give the new run another name")
    homes[old.path.resolve()] = run.path.resolve()

    def here(path: str) -> str:
        place = _place(old, path)
        home = next((home for home in homes if place.is_relative_to(home)), None)
        return os.path.relpath(homes[home] / place.relative_to(home) if home else place, run.path.resolve())

    reads = {here(path): sha256 for path, sha256 in done.get("reads", {}).items()}
    done = {ORIGIN: str(old.path), **done, "outputs": [here(path) for path in done["outputs"]], "reads": reads, "relative": True}
    _copy(old.node(node), run.node(node), {"done.json": done})
    return [node]


def _take_seeds(cfg: Config, run: RunDir, was: Config, old: RunDir, arm: str) -> list[str]:
    """Who trains the others sees that these are there."""
    node, count = f"classify/{arm}", len(cfg.arm_seeds)
    found = {number: seed for number, seed in enumerate(cfg.arm_seeds) if seed in was.arm_seeds and old.has_seed(arm, seed)}
    for seed in found.values():
        metrics = {ORIGIN: str(old.path), **read_json(old.seed(arm, seed) / "metrics.json")}
        _copy(old.seed(arm, seed), run.seed(arm, seed), {"metrics.json": metrics})
    for number, seed in found.items() if len(found) < count else ():  # else one task has to write that all are done
        progress = read_hint(old.progress_path(node, was.arm_seeds.index(seed)))
        if progress:
            write_json(run.progress_path(node, number), {**progress, "of": progress["total"] * count})
        run.finish_task(node, Task(number, count))
    return [f"{node}/seed-{seed}" for seed in found.values()]


def _place(old: RunDir, path: str) -> Path:
    """Where a path of a ``done.json`` leads."""
    return Path(os.path.normpath(old.path.resolve() / path))


def _copy(source: Path, target: Path, changed: dict[str, Any] | None = None) -> None:
    """A whole folder; ``changed``: its files, by name, that are JSON of another content than there."""
    temp = target.with_name(f".{target.name}.reuse.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, temp, ignore=shutil.ignore_patterns(*LEFT, "manifest.json"), copy_function=_link)
    except shutil.Error as error:  # of each file that could not be copied
        path, _, why = error.args[0][0]
        raise UserError(f"{path} cannot be taken over: {why}. Mend that and start the same command again; the earlier run is as it was") from None
    if (source / "manifest.json").exists():
        shutil.copy2(source / "manifest.json", temp)  # last: what has one is taken for a whole dataset
    for name, value in (changed or {}).items():
        write_json(temp / name, value)
    put_in_place(temp, target)


def _link(source: str, target: str) -> None:
    if source.endswith(LINKED):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copy2(source, target)
