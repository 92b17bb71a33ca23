"""What ``report.json`` holds, gathered from a run: no times, paths or versions, so an interrupted run gives the same bytes."""

from __future__ import annotations

from typing import Any

from skinsynth.data import withdrawn
from skinsynth.files import read_json, sha256_file, sha256_of
from skinsynth.knobs import Config
from skinsynth.pages import figures, origin, screening
from skinsynth.quality import predictions
from skinsynth.quality.compare import compare
from skinsynth.quality.verdict import verdict
from skinsynth.run import SPLITS, RunDir


def summary(cfg: Config, run: RunDir) -> dict[str, Any]:
    """``arms``, ``differences``, ``subgroups``, ``test`` (see ``quality.compare``), ``synthetic``, ``lineage`` (see ``origin.facts``), ``data``,
    ``unfinished``, ``outdated``, ``verdict``.

    ``arms`` has what ``arm_facts`` gives as well. ``unfinished``: arm -> the seeds that it has. ``outdated``: arms that finished before what they
    are made from was made anew.

    Raises:
        UserError: predictions that are damaged, or of other test images than the first arm's.
    """
    found, prepared = predictions.read(cfg, run, predictions.arms_of(cfg)), run.metrics("prepare")
    compared = compare(found) if found else {"arms": {}, "differences": [], "subgroups": [], "test": None}
    for arm, row in compared["arms"].items():
        row |= arm_facts(cfg, run, arm)
    return {**compared, "synthetic": screened(cfg, run), "lineage": origin.facts(cfg, run), "data": {s: prepared[s] for s in SPLITS if s in prepared},
            "unfinished": unfinished(cfg, run), "outdated": [arm for arm in cfg.classify.arms if _outdated(run, f"classify/{arm}")],
            "verdict": with_lineage(verdict(compared), compared["arms"], screened(cfg, run))}


def screened(cfg: Config, run: RunDir) -> dict[str, Any]:
    """What ``screen`` measured, ``lineage`` (known, unknown) always among it; where the set did not pass ``gate`` also has
    ``used`` (bool)."""
    stopped = screening.stopped(run)
    found = stopped or run.metrics("screen")
    if not found:
        return {}
    failed = (found.get("gate") or {}).get("failures")
    return {"lineage": _descent(cfg, run), **found, **({"gate": {**found["gate"], "used": not stopped}} if failed else {})}


def _descent(cfg: Config, run: RunDir) -> str:
    return "known" if origin.facts(cfg, run).get("known") else "unknown"


def arm_facts(cfg: Config, run: RunDir, arm: str) -> dict[str, Any]:
    """What an arm was trained on and how, its seeds one after the other in each list.

    ``train_samples``: source -> images. ``mix``: its phases, each with ``share`` of the steps and the ``sources``' weights. ``lineage`` of the
    synthetic images: known, unknown; None without such. ``synthetic_sha256``: which these are; None also where nobody knows. ``steps``,
    ``chosen_step``. ``epochs``: ``step``, ``epoch``, and the validation images' ``accuracy`` and ``auroc`` of each evaluation.
    """
    folders, knobs = predictions.finished(cfg, run, arm).values(), cfg.classify.arms[arm]
    facts, whole = [predictions.seed_facts(run, arm, folder) for folder in folders], sum(part.share for part in knobs.parts) or 1
    told = next((one["lineage"] for one in facts if one.get("lineage")), None) or _descent(cfg, run)
    return {"train_samples": facts[0].get("train_samples", {}), "lineage": told if "synthetic" in knobs.used else None,
            "synthetic_sha256": _images_sha256(run, arm) if "synthetic" in knobs.used else None,
            "mix": [{"share": round(part.share / whole, 4), "sources": dict(part.sources)} for part in knobs.parts],
            "steps": [one.get("steps") for one in facts], "chosen_step": [one.get("chosen_step") for one in facts],
            "epochs": [[_epoch(row) for row in figures.lines(folder / "epochs.jsonl")] for folder in folders]}


def _images_sha256(run: RunDir, arm: str) -> str | None:
    """Of the shards and of which of their images are accepted: the same in a run that took them over. None for an arm that was trained before they
    were made anew, and of a run that an earlier version screened."""
    accepted = read_json(run.node("screen") / "accepted.json") or {}
    if "screened" not in accepted or _outdated(run, f"classify/{arm}"):
        return None
    images, _, _ = accepted["screened"]["synthetic"].partition("-")  # not the manifest's: it names the version of the code
    return sha256_of([images, accepted["keys"]])


def _epoch(row: dict[str, Any]) -> dict[str, Any]:
    figs = {name: row["val"].get(name) for name in ("accuracy", "auroc")}
    return {"step": row["step"], "epoch": row["epoch"], **{name: None if v is None else round(v, 4) for name, v in figs.items()}}


def with_lineage(found: dict[str, Any], arms: dict[str, Any], screened: dict[str, Any]) -> dict[str, Any]:
    """The verdict; among what may not be concluded, and first, what it means for the arms that nobody knows what trained the generator, that there
    was one alone, and that real test images look like training images. ``screened``: as the function gives it."""
    unknown, alike_of = [arm for arm, row in arms.items() if row["lineage"] == "unknown"], _by_images(arms)
    lines = [f"{origin.UNKNOWN} If they were, the figures of {', '.join(unknown)} may be too good."] if unknown else []
    if alike_of:
        others = "".join(f", and all of {', '.join(names)} had the same ones among themselves" for names in alike_of[1:])
        lines.append(f"All trainings of {', '.join(alike_of[0])} had the same synthetic images{others}: another generator, or other images of it, "
                     "may turn out otherwise, and that is in no interval.")
    if alike := screened.get("copy_false_alarms"):
        lines.append(f"{100 * alike:.1f} % of the real test images look so much like training images that they would be called copies. Where they "
                     "show the same lesion once more, of which the ids know nothing, all arms' figures are too good.")
    return {**found, "may_not": [*lines, *found["may_not"]]}


def _by_images(arms: dict[str, Any]) -> list[list[str]]:
    """The arms that were trained on synthetic images, those together of which it is known that they had the same ones."""
    found: dict[str, list[str]] = {}
    for arm, row in arms.items():
        if row["lineage"]:
            found.setdefault(row["synthetic_sha256"] or f"of {arm}", []).append(arm)
    return list(found.values())


def unfinished(cfg: Config, run: RunDir) -> dict[str, list[int]]:
    """Arms of the configuration that are not done, each with the seeds that are."""
    return {arm: list(predictions.finished(cfg, run, arm)) for arm in cfg.classify.arms if not run.metrics(f"classify/{arm}")}


def _outdated(run: RunDir, node: str) -> bool:
    """Whether a node that finished was made from other things than there are now. ``RunDir.is_done`` asks for the files as well: a run that was
    copied without its shards would have to be made anew, yet what is told of it stays true."""
    done, here = read_json(run.done_path(node)) or {}, run.path.resolve()
    if any((here / path).is_file() and sha256_file(here / path) != sha256 for path, sha256 in done.get("reads", {}).items()):
        return True
    return any(run.made(need) != made or (made is not None and _outdated(run, need)) for need, made in done.get("needs", {}).items())


def missing(cfg: Config, run: RunDir) -> list[str]:
    """Sentences about what is not there or not up to date, with the reasons that the jobs left."""
    found = [] if cfg.classify.arms else ["The configuration names no arm."]
    for arm, seeds in unfinished(cfg, run).items():
        has = f"only its seeds {', '.join(map(str, seeds))} are counted" if seeds else "it is not in the comparison"
        seeded = (f"classify/{arm}/{p.name}" for p in sorted(run.node(f"classify/{arm}").glob("seed-*")))
        found += [f"Arm {arm} has not finished: {has}.", *_why(run, [f"classify/{arm}", *seeded])]
    for stage, what in (("prepare", "the data are not described"), ("screen", "there are no screened synthetic images")):
        if stage == "screen" and screening.stopped(run):
            found.append("screen found that the synthetic images as a set did not pass: no arm is trained on them.")
        elif not run.done_path(stage).is_file():
            found.append(f"{stage} has not finished: {what}.")
        elif _outdated(run, stage):
            found.append(f"{stage} was done before what it reads was made anew, or withdrawn from: its figures are of then. Launch again.")
    for stage, kind in (("prepare", "train"), ("screen", "synthetic")):
        if run.done_path(stage).is_file() and not (run.dataset(cfg, kind) / "manifest.json").is_file():
            found.append(f"The {kind} images are not to be found, so none is shown: {run.dataset(cfg, kind).name} does not lie in data.shards. "
                         "Where that is relative, begin in the folder where the run was launched; else launch with data.shards=...")
    for arm in cfg.classify.arms:
        if any(run.node(f"classify/{arm}").glob(f"**/weights/{withdrawn.NAME}")):
            found.append(f"The weights of arm {arm} are withdrawn: they were trained on images of somebody who withdrew since.")
        if _outdated(run, f"classify/{arm}"):
            found += [f"Arm {arm} is out of date: what it was trained on was made anew since, or withdrawn from, so it may have seen other images "
                      "than there are now. Its figures are of then; launch again.", *_why(run, [f"classify/{arm}"])]
    return found + _why(run, ["prepare", "encode", "finetune", "generate", "screen"])


def _why(run: RunDir, nodes: list[str]) -> list[str]:
    """What the jobs of those nodes that are not done left as their last words; a message may be long, its beginning names the thing."""
    return [f"{node} failed: {why if len(why) <= 300 else why[:297] + '...'}" for node in nodes
            if not run.done_path(node).is_file() or _outdated(run, node) for why in dict.fromkeys(run.failures(node).values())]
