"""screen: every synthetic image is looked at, and is accepted or set aside with a reason.

    broken      cannot be decoded, or has another size than asked for
    blank       shows next to nothing (its grey levels hardly spread)
    copy        a near-copy of a training image: a patient's picture, not a new one
    held-out    a validation or test image, or nearly, also turned, cropped or tinted: what is judged on must not be trained on
    blur, frame, clipped, saturated    such as next to no real training image is (quality.defects)
    class       a classifier of real images does not see its class (only with screen.agreement)
    duplicate   the same picture as an earlier synthetic image, or nearly

Units are the shards, the synthetic and the real ones alike, and the disguises of planted copies: each gives a part (``quality.parts``) with what was
measured of its images, the search for copies and near-duplicates included. The task that sees all parts decides, measures the distances to
the real images (``quality.evidence``) and writes the lists; that needs no image but those of the worst pairs, and depends on the parts alone.

Memory: pictures and features are read a part at a time, and features kept of ``screen.max_features`` images a class. What grows with the set is its
index, which every stage holds that opens it, and beside it 0.2 kB of keys and measures an image (measured at 800 to 80,000), and its print as well
(0.3 kB) where one has more near-duplicates than are noted; with the real sets, their thumbnails (4 kB each), in which each task searches.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from typing import Any

import numpy as np

from skinsynth.data import descent, withdrawn
from skinsynth.data.cache import open_dataset
from skinsynth.data.dataset import Dataset
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.quality import copies, defects, features, gate, sheet, spectrum
from skinsynth.quality.copies import PLANTED, PLANTS
from skinsynth.quality.evidence import Evidence
from skinsynth.quality.parts import REAL, Parts, Unit, matches, screened
from skinsynth.run import Progress, RunDir, Task

NODE = "screen"
PAIRS = 20  # of nearest synthetic and training images that are kept for the eye
_LEARN = "more finetune.steps or another generate.guidance; or, where the eye finds these images good, a smaller screen."
_DRAW = "more generate.steps, generate.precision=fp32 or a lower generate.guidance"
ADVICE = {  # by the reason of a ``gate.Failure``
    "broken": _DRAW, "blank": _DRAW, "blur": f"{_LEARN}blur", "frame": f"{_LEARN}frame", "clipped": f"{_LEARN}clipped",
    "saturated": f"{_LEARN}saturation", "copy": "fewer finetune.steps, a lower finetune.lr or more images per concept",
    "held-out": "another model.base, since this one seems to know validation or test images",
    "class": "prompts that tell the classes apart, more finetune.steps, or a lower screen.agreement",
    "duplicate": "more and other prompts, a lower generate.guidance or fewer finetune.steps",
    "kid": "more finetune.steps, a model.base that is nearer to the images, or a higher screen.max_kid_ratio",
    "kid unknown": "more screen.kid_subsets, or no limit (screen.max_kid_ratio=null): too few images have no such figure"}


def screen(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``screen/accepted.json``, ``rejected.json``, ``metrics.json``, ``pairs.json``, ``worst-pairs.png`` and ``spectrum.png``.

    Raises:
        UserError: a held-out group trained the generator, a real image is broken, or the set fails as a whole (screen.on_fail=stop).
    """
    tolerate = cfg.data.on_error == "skip"  # a synthetic image that cannot be read is rejected; the real ones are the measure
    sets = {kind: open_dataset(cfg, run, kind, tolerate and kind == "synthetic") for kind in (*REAL, "synthetic")}
    check_lineage(sets)
    if _up_to_date(run, sets):
        return
    parts = Parts(cfg, run.node(NODE) / "parts", sets, features.network_sha256(cfg, run), task.index)
    mine = set(task.mine([unit.number for unit in parts.units]))
    make(parts, [unit for unit in parts.units if unit.number in mine], run, task)
    if all(parts.have(unit) for unit in parts.units):
        Verdict(parts, run).write()


def check_lineage(sets: dict[str, Dataset]) -> bool:
    """False where it is not known what trained the generator.

    Raises:
        UserError: a patient or lesion group of the validation or test split did.
    """
    lineage = sets["synthetic"].manifest.get("lineage") or {}
    for kind in ("val", "test"):
        shared = [f"{group}: {keys[0]}{' ...' * (len(keys) > 1)}" for group, keys in sorted(descent.seen(sets[kind], lineage).items())]
        if shared:
            raise UserError(f"leakage: the generator of {sets['synthetic'].folder} was trained on {len(shared)} groups of the {kind} split "
                            f"({', '.join(shared[:5])}); its images must not be used with this split. Fine-tune again on the present training split")
    return lineage.get("group_ids") is not None


def copies_searched(sets: dict[str, Dataset]) -> dict[str, Any]:
    """Among which images copies were looked for, and how many of those that are known to have trained the generator are not among them (None:
    nobody wrote down all that did): of these no copy can be found. A general base model's own training images are never searched."""
    train, lineage = sets["train"], sets["synthetic"].manifest.get("lineage") or {}
    known = descent.trained_on(lineage)
    told = lineage.get("group_ids") is not None and (bool(known["images"]) or not known["groups"])  # older lineages list groups alone
    missing = len(set(known["images"]) - set(train.keys)) if told else None
    if missing is None:
        more = "; which images trained the generator is not known, and copies of those that are not among them cannot be found"
    elif missing:
        more = f"; {missing:,} other images that trained the generator were not at hand, and copies of them cannot be found"
    elif not known["groups"]:
        more = "; the generator is a general model that was fine-tuned on none of these, and the images that trained it are not at hand"
    else:
        more = ", among them all that the generator is known to be fine-tuned on"
    return {"images": len(train), "not_searched": missing, "told": f"the run's {len(train):,} training images{more}"}


def advice(cfg: Config, run: RunDir, failed: list[gate.Failure]) -> str:
    """What to look at, what to change, and with which command."""
    what = [f"against {reason}: {ADVICE[reason]}" for reason in dict.fromkeys(failure.reason for failure in failed)]
    if cfg.data.synthetic:
        what = ["the images were made elsewhere: give others as data.synthetic"]
    elif cfg.generate.weights == "base":
        what = ["the generator is a published model: take another model.base or other prompts, or fine-tune it (generate.weights=finetuned)"]
    path, new = shlex.quote(str(run.path)), shlex.quote(f"run={run.path}-2")
    return (f"'skinsynth report {path}' shows the images, the nearest pairs and the distances; {run.node(NODE) / 'rejected.json'} has each reason. "
            f"What may help: {'; '.join(what)}. 'skinsynth launch {path}/config.yaml {new} --reuse {path} KEY=VALUE' makes a new run with such a "
            "change, which takes over the stages before it; the same launch with screen.on_fail=warn goes on all the same")


def _up_to_date(run: RunDir, sets: dict[str, Dataset]) -> bool:
    """Whether these very images were screened: a set that was made anew, or of which samples are withdrawn, is another one."""
    accepted = read_json(run.node(NODE) / "accepted.json")
    return run.is_done(NODE) and accepted is not None and accepted.get("screened") == screened(sets)


def make(parts: Parts, mine: list[Unit], run: RunDir, task: Task) -> None:
    """The parts of this task that are not there: those of training shards first, since all others are searched in their thumbnails."""
    units, total = [unit for unit in mine if not parts.have(unit)], sum(unit.count for unit in mine)
    progress = Progress(run, NODE, task.index, total, "images", total - sum(unit.count for unit in units), sum(unit.count for unit in parts.units))
    if units:
        (run.node(NODE) / "metrics.json").unlink(missing_ok=True)  # of another set: what did not pass then would be told of this one
    extractor, limit = _extractor(parts.cfg, run) if units else None, parts.cfg.screen.duplicate
    for unit in units:
        assert extractor is not None
        if unit.kind == "planted":
            parts.plant(unit, progress)
        else:
            parts.inspect(unit, extractor, progress)
        if unit.kind == "synthetic" and limit is not None:
            parts.compare(unit, limit)


def _extractor(cfg: Config, run: RunDir) -> features.Extractor:
    from skinsynth.world import World

    return features.make(cfg, run, World().device)


class Verdict:
    """All parts together: what is accepted, and how far it lies from the real images."""

    def __init__(self, parts: Parts, run: RunDir):
        self.parts, self.cfg, self.run, self.folder = parts, parts.cfg, run, run.node(NODE)
        self.synthetic, self.train = parts.sets["synthetic"], parts.sets["train"]
        self.limits = defects.Limits.of(parts.column("train", "measures"), self.cfg.screen)
        self.copy_limit = copies.limit(self._matches("val"), self.cfg.screen)
        self.evidence = Evidence(parts)
        near, pairs = self.cfg.screen.duplicate, np.empty((0, 2), np.int64)
        self.measured = gate.Measured(parts.broken("synthetic"), parts.column("synthetic", "measures"), self._matches("synthetic"),
                                      self.evidence.agreement(), pairs if near is None else parts.pairs(near),
                                      {} if self.cfg.screen.held_out is None else parts.held_out(self.cfg.screen.held_out, self.copy_limit),
                                      lambda: np.concatenate([parts.read(unit, "prints") for unit in parts.of("synthetic")]), near)
        self.reasons = self.measured.reasons(self.limits, self.copy_limit, self.cfg.screen.agreement)
        self.keep = np.array([i for i, reason in enumerate(self.reasons) if reason is None], np.int64)

    def _matches(self, kind: str) -> copies.Matches:
        return matches(self.parts.column(kind, "matches"))

    def write(self) -> None:
        """Lists, pictures, metrics; then, where the set passes, the list of the accepted and, last, ``done.json``."""
        self._write_rejected()
        self._write_pairs()
        self._write_spectrum()
        metrics = self._metrics()
        write_json(self.folder / "metrics.json", metrics)
        self._judge(metrics)
        classes = Counter(self.synthetic.columns["class"][i] for i in self.keep)
        write_json(self.folder / "accepted.json", {
            "dataset": str(self.synthetic.folder), "manifest_sha256": sha256_file(self.synthetic.folder / "manifest.json"),
            "screened": screened(self.parts.sets),
            "count": len(self.keep), "classes": dict(sorted(classes.items())), "keys": [self.synthetic.keys[i] for i in self.keep]})
        sets = [dataset.folder for dataset in self.parts.sets.values()]  # as ``_up_to_date`` looks at them, for who knows no datasets
        self.run.finish(NODE, metrics, [self.folder / "accepted.json", self.folder / "rejected.json"],
                        [folder / name for folder in sets for name in ("manifest.json", withdrawn.NAME)])

    def _judge(self, metrics: dict[str, Any]) -> None:
        """The set as a whole."""
        failed = gate.failures(metrics, self.cfg.screen)
        if failed and self.cfg.screen.on_fail == "stop":
            (self.folder / "accepted.json").unlink(missing_ok=True)  # of an earlier set, perhaps
            raise UserError("; ".join(failure.why for failure in failed) + ". " + advice(self.cfg, self.run, failed))
        for failure in failed:
            print(f"screen: {failure.why}; going on, since screen.on_fail=warn", file=sys.stderr)

    def _counts(self) -> dict[str, int]:
        counts = Counter(self.reasons)
        return {reason: counts[reason] for reason in gate.REASONS}

    def _classes(self) -> dict[str, Any]:
        """The same of each class that was asked for, also where no image of it came out."""
        names, asked = self.synthetic.columns["class"], self.synthetic.manifest.get("class_names", {})
        counts, found = Counter(zip(names, self.reasons, strict=True)), {}
        for name in sorted({*names, *(name for name, wanted in asked.items() if wanted["count"])}):
            rejected = {reason: counts[name, reason] for reason in gate.REASONS}
            found[name] = {"generated": counts[name, None] + sum(rejected.values()), "accepted": counts[name, None], "rejected": rejected}
        return found

    def _write_rejected(self) -> None:
        columns, keys = self.synthetic.columns, self.synthetic.keys
        samples = [{"key": keys[i], "target": columns["target"][i], "reason": reason,
                    **self.measured.told(reason, i, keys, self.train.keys, self.reasons)} for i, reason in enumerate(self.reasons) if reason]
        write_json(self.folder / "rejected.json", {"count": len(samples), "reasons": self._counts(), "samples": samples})

    def _write_pairs(self) -> None:
        """The nearest pairs, kept and set aside alike, for the eye; broken and blank pictures resemble nothing."""
        found = self.measured.matches
        usable = [i for i, reason in enumerate(self.reasons) if reason not in ("broken", "blank")]
        chosen = sorted(usable, key=lambda i: (-found.nearness[i], i))[:PAIRS]
        pairs = [{"key": self.synthetic.keys[i], "train_key": self.train.keys[found.index[i]], "similarity": float(found.similarity[i]),
                  "nearness": float(found.nearness[i]), "rejected": self.reasons[i]} for i in chosen]
        if chosen:
            pictures = [(self.synthetic.image(i), self.train.image(int(found.index[i]))) for i in chosen]
            write_bytes(self.folder / "worst-pairs.png", sheet.pairs(pictures, [f"{p['similarity']:.2f}" for p in pairs]))
        write_json(self.folder / "pairs.json", pairs)

    def _write_spectrum(self) -> None:
        write_bytes(self.folder / "spectrum.png", spectrum.draw(self.parts.spectra(REAL), self.parts.spectra(("synthetic",))))

    def _metrics(self) -> dict[str, Any]:
        against = self.evidence.against(self.keep)
        distances = against["distances"]
        whole, real, classes = distances["all"], distances["real"], self._classes()
        metrics = {
            "generated": len(self.reasons), "accepted": len(self.keep), "rejected": self._counts(), "classes": classes,
            "features": features.space_name(self.cfg),
            "kid": whole["kid"], "kid_std": whole["kid_std"], "kid_real": real["kid"], "kid_real_std": real["kid_std"],
            "kid_per_class": {name: {"kid": row["kid"], "kid_std": row["kid_std"], "accepted": classes[name]["accepted"]}
                              for name, row in distances["per_class"].items()},
            "kid_ratio": gate.kid_ratio(whole["kid"], real["kid"], real["kid_std"]), **against, **self._copy_metrics(),
            "agreement": self.evidence.agreement_metrics(self.measured.agreement, self.keep),
            "limits": self.limits.values, "real_rejected": self._real_rejected(),
            "lineage": "known" if check_lineage(self.parts.sets) else "unknown", "copies_searched": copies_searched(self.parts.sets)}
        failed = [failure.why for failure in gate.failures(metrics, self.cfg.screen)]
        return {**metrics, "gate": {"passed": not failed, "failures": failed}}

    def _copy_metrics(self) -> dict[str, Any]:
        """How well the limit works on known cases: disguised copies of training images, and real images of the test split."""
        limit = self.copy_limit
        planted = {PLANTS[unit.shard]: matches(self.parts.read(unit, "matches")).copies(limit).mean() for unit in self.parts.of("planted")}
        recall = {name: round(float(share), 4) for name, share in planted.items()}
        return {"copy_threshold": limit, "copy_recall": recall["all"], "copy_recall_per_disguise": recall,
                "copy_planted": min(PLANTED, len(self.train)),
                "copy_false_alarms": round(float(self._matches("test").copies(limit).mean()), 4),
                "copied_share": gate.copied_share(self.measured.matches, limit, len(self.train))}

    def _real_rejected(self) -> dict[str, float]:
        """The share of real held-out images that each defect would set aside."""
        measures = np.concatenate([self.parts.column(kind, "measures") for kind in ("val", "test")])
        return {reason: round(float(beyond.mean()), 4) for reason, beyond in self.limits.beyond(measures).items()}
