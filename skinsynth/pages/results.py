"""What ``report.json`` holds, gathered from a run: no times, paths or versions, so an interrupted run gives the same bytes."""

from __future__ import annotations

from typing import Any

from skinsynth.knobs import Config
from skinsynth.quality import predictions
from skinsynth.quality.compare import compare
from skinsynth.quality.verdict import verdict
from skinsynth.run import RunDir

SPLITS = ("train", "val", "test")


def summary(cfg: Config, run: RunDir) -> dict[str, Any]:
    """``arms``, ``differences``, ``subgroups``, ``test`` (see ``quality.compare``), ``synthetic``, ``data``, ``unfinished``, ``verdict``.

    ``arms`` also says of each ``train_samples``, ``steps`` and, per seed, ``chosen_step``. ``unfinished``: arm -> the seeds that it has.

    Raises:
        UserError: predictions that are damaged, or of other test images than the first arm's.
    """
    found, prepared = predictions.read(cfg, run, predictions.arms_of(cfg)), run.metrics("prepare")
    compared = compare(found) if found else {"arms": {}, "differences": [], "subgroups": [], "test": None}
    for arm, row in compared["arms"].items():
        facts = [predictions.seed_facts(run, arm, folder) for folder in predictions.finished(cfg, run, arm).values()]
        row |= {"train_samples": facts[0].get("train_samples", {}), "steps": facts[0].get("steps"),
                "chosen_step": [one.get("chosen_step") for one in facts]}
    return {**compared, "synthetic": run.metrics("screen"), "data": {s: prepared[s] for s in SPLITS if s in prepared},
            "unfinished": unfinished(cfg, run), "verdict": verdict(compared)}


def unfinished(cfg: Config, run: RunDir) -> dict[str, list[int]]:
    """Arms of the configuration that are not done, each with the seeds that are."""
    return {arm: list(predictions.finished(cfg, run, arm)) for arm in cfg.classify.arms if not run.metrics(f"classify/{arm}")}


def missing(cfg: Config, run: RunDir) -> list[str]:
    """Sentences about what is not there, with the reasons that the jobs left."""
    found = [] if cfg.classify.arms else ["The configuration names no arm."]
    for arm, seeds in unfinished(cfg, run).items():
        has = f"only its seeds {', '.join(map(str, seeds))} are counted" if seeds else "it is not in the comparison"
        seeded = (f"classify/{arm}/{p.name}" for p in sorted(run.node(f"classify/{arm}").glob("seed-*")))
        found += [f"Arm {arm} has not finished: {has}.", *_why(run, [f"classify/{arm}", *seeded])]
    for stage, what in (("prepare", "the data are not described"), ("screen", "there are no screened synthetic images")):
        if not run.done_path(stage).is_file():
            found.append(f"{stage} has not finished: {what}.")
    return found + _why(run, ["prepare", "encode", "finetune", "generate", "screen"])


def _why(run: RunDir, nodes: list[str]) -> list[str]:
    """What the jobs of those nodes that are not done left as their last words; a message may be long, its beginning names the thing."""
    return [f"{node} failed: {why if len(why) <= 300 else why[:297] + '...'}" for node in nodes if not run.done_path(node).is_file()
            for why in dict.fromkeys(run.failures(node).values())]
