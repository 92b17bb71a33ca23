"""screen: every synthetic image is looked at, and is accepted or set aside with a reason.

    broken      cannot be decoded, or has another size than asked for
    blank       shows next to nothing (its grey levels hardly spread)
    copy        a near-copy of a training image: a patient's picture, not a new one
    duplicate   the same pixels as an earlier synthetic image

Units are the shards, the synthetic and the real ones alike: each gives a part (what was measured) with a thumbnail and
the features of each image. The task that sees all parts compares, decides, measures the Kernel Inception Distance and
writes the lists; that needs no image but those of the worst pairs, and depends on the parts alone.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from skinsynth.data.cache import open_dataset
from skinsynth.data.shards import BadSample, Dataset, to_npy
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.quality import copies
from skinsynth.quality.distances import Scaler, kid
from skinsynth.quality.features import Extractor, space_name
from skinsynth.run import Progress, RunDir, Task, read_json, sha256_file, write_bytes, write_json

NODE = "screen"
KINDS = ("train", "val", "test", "synthetic")  # so numbered that a synthetic set made anew leaves the parts of the real ones valid
REASONS = ("broken", "blank", "copy", "duplicate")
PAIRS = 20  # of nearest synthetic and training images that are kept for the eye
PLANTED = 200  # disguised copies of training images, to measure how many are found


@dataclass(frozen=True)
class Unit:
    """One shard of one of the datasets."""

    number: int
    kind: str
    shard: int
    sha256: str

    @property
    def stem(self) -> str:
        return f"{self.number:05d}"


def screen(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``screen/accepted.json``, ``rejected.json``, ``pairs.json`` and ``worst-pairs.png``.

    Raises:
        UserError: a held-out group trained the generator, a real image is broken, or too few images are accepted.
    """
    tolerate = cfg.data.on_error == "skip"  # a synthetic image that cannot be read is rejected; the real ones are the measure
    sets = {kind: open_dataset(cfg, run, kind, tolerate and kind == "synthetic") for kind in KINDS}
    check_lineage(sets)
    if _up_to_date(run, sets):
        return
    units, folder = plan(sets), run.node(NODE) / "parts"
    mine = [units[n] for n in task.mine([u.number for u in units if not _have(cfg, folder, u)])]
    progress = Progress(run, NODE, task.index, sum(sets[u.kind].manifest["shards"][u.shard]["count"] for u in mine), "images")
    extractor = _extractor(cfg) if mine else None
    for unit in mine:
        assert extractor is not None
        inspect(cfg, sets[unit.kind], unit, folder, extractor, progress)
    if all(_have(cfg, folder, unit) for unit in units):
        Verdict(cfg, run, sets, units).write()


def check_lineage(sets: dict[str, Dataset]) -> None:
    """Raises ``UserError`` where a patient or lesion group of the validation or test split trained the generator."""
    trained = set(sets["synthetic"].manifest.get("lineage", {}).get("group_ids") or [])
    for kind in ("val", "test"):
        shared = sorted(trained & set(sets[kind].columns["group"]))
        if shared:
            raise UserError(f"leakage: the generator of {sets['synthetic'].folder} was trained on {len(shared)} groups of the {kind} split "
                            f"({', '.join(shared[:5])}); its images must not be used with this split. Fine-tune again on the present training split")


def plan(sets: dict[str, Dataset]) -> list[Unit]:
    """All shards, in the order of ``KINDS``."""
    shards = [(kind, n, shard["sha256"]) for kind in KINDS for n, shard in enumerate(sets[kind].manifest["shards"])]
    return [Unit(number, *rest) for number, rest in enumerate(shards)]


def _up_to_date(run: RunDir, sets: dict[str, Dataset]) -> bool:
    accepted = read_json(run.node(NODE) / "accepted.json")
    return run.is_done(NODE) and accepted is not None and accepted["manifest_sha256"] == sha256_file(sets["synthetic"].folder / "manifest.json")


def _have(cfg: Config, folder: Path, unit: Unit) -> bool:
    """True where the part is there and was made from this very shard."""
    part = read_json(folder / f"{unit.stem}.json")
    return part is not None and (part["sha256"], part["batch"]) == (unit.sha256, cfg.screen.batch)


def _extractor(cfg: Config) -> Extractor:
    from skinsynth.world import World

    return Extractor(cfg.model, cfg.screen.batch, World().device)


def inspect(cfg: Config, dataset: Dataset, unit: Unit, folder: Path, extractor: Extractor, progress: Progress) -> None:
    """Writes the part of one shard: ``<n>.npy`` float32 (images, d) features, ``<n>.thumbs.npy`` uint8 (images, 32, 32, 3), and last
    ``<n>.json`` with the grey levels' spread and a hash of the pixels. A broken image has rows of zeros."""
    rows, samples = [], list(dataset.shard_samples(unit.shard))
    features: list[np.ndarray] = []
    thumbs = np.zeros((len(samples), copies.SIDE, copies.SIDE, 3), np.uint8)
    for start in range(0, len(samples), cfg.screen.batch):
        chunk = samples[start:start + cfg.screen.batch]
        images = [_read(dataset, i, cfg.prepare.size) for i in chunk]
        if unit.kind != "synthetic" and any(isinstance(image, str) for image in images):
            bad = next(f"{dataset.keys[i]} {image}" for i, image in zip(chunk, images, strict=True) if isinstance(image, str))
            raise UserError(f"{dataset.folder}: {bad}; the shard is damaged: delete {dataset.folder} and run prepare again")
        whole = [np.zeros((cfg.prepare.size, cfg.prepare.size, 3), np.uint8) if isinstance(image, str) else image for image in images]
        features.append(extractor(np.stack(whole)))
        for place, (image, pixels) in enumerate(zip(images, whole, strict=True), start):
            thumbs[place] = copies.thumbnail(pixels)
            rows.append({"key": dataset.keys[samples[place]], "broken": image if isinstance(image, str) else None,
                         "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
                         "std": round(float(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).std()), 3)})
        progress.advance(len(chunk))
    write_bytes(folder / f"{unit.stem}.npy", to_npy(np.concatenate(features)))
    write_bytes(folder / f"{unit.stem}.thumbs.npy", to_npy(thumbs))
    write_json(folder / f"{unit.stem}.json", {"kind": unit.kind, "shard": unit.shard, "sha256": unit.sha256, "batch": cfg.screen.batch,
                                              "images": rows})


def _read(dataset: Dataset, index: int, size: int) -> np.ndarray | str:
    """uint8 (size, size, 3), or what is wrong with the image."""
    try:
        image = dataset.image(index)
    except (BadSample, KeyError) as error:
        return "has no jpg" if isinstance(error, KeyError) else "cannot be decoded"
    if image.shape != (size, size, 3):
        return f"is {image.shape[1]} x {image.shape[0]} pixels, not {size} x {size}"
    return np.ascontiguousarray(image)


class Verdict:
    """All parts together: what is accepted, and how far it lies from the real images."""

    def __init__(self, cfg: Config, run: RunDir, sets: dict[str, Dataset], units: list[Unit]):
        self.cfg, self.run, self.sets, self.folder = cfg, run, sets, run.node(NODE)
        self.images: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.features: dict[str, np.ndarray] = {}
        self.thumbs: dict[str, np.ndarray] = {}
        for kind in KINDS:
            stems = [unit.stem for unit in units if unit.kind == kind]
            self.images[kind] = [row for stem in stems for row in read_json(self.folder / "parts" / f"{stem}.json")["images"]]
            self.features[kind], self.thumbs[kind] = self._arrays(stems, ".npy"), self._arrays(stems, ".thumbs.npy")

    def _arrays(self, stems: list[str], end: str) -> np.ndarray:
        return np.concatenate([np.load(self.folder / "parts" / f"{stem}{end}", allow_pickle=False) for stem in stems])

    def write(self) -> None:
        """Lists, metrics and, last, ``done.json``."""
        matches, limit, checks = self._compare()
        reasons = self._reasons(matches, limit)
        keep = [i for i, found in enumerate(reasons) if found is None]
        rejected = dict(Counter(found[0] for found in reasons if found))
        rejected = {reason: rejected.get(reason, 0) for reason in REASONS}
        self._write_rejected(reasons, rejected)
        self._write_pairs(matches, reasons)
        _check_enough(self.cfg, len(keep), len(reasons), rejected, self.folder)
        synthetic = self.sets["synthetic"]
        write_json(self.folder / "accepted.json", {
            "dataset": str(synthetic.folder), "manifest_sha256": sha256_file(synthetic.folder / "manifest.json"), "count": len(keep),
            "classes": dict(sorted(Counter(synthetic.columns["class"][i] for i in keep).items())), "keys": [synthetic.keys[i] for i in keep]})
        metrics = {"generated": len(reasons), "accepted": len(keep), "rejected": rejected, **self._distances(keep), **checks,
                   "features": space_name(self.cfg.model.base), "copy_threshold": limit}
        self.run.finish(NODE, metrics, [self.folder / "accepted.json", self.folder / "rejected.json"])

    def _compare(self) -> tuple[copies.Matches, float, dict[str, Any]]:
        """Nearest training image of each synthetic one, the limit, and how well the limit works on known cases."""
        gallery, threads = copies.Gallery(self.thumbs["train"]), len(os.sched_getaffinity(0))
        limit = copies.limit(gallery.search(self.thumbs["val"], threads), self.cfg.screen.copy_quantile)
        chosen = np.random.default_rng(self.cfg.seed).permutation(len(self.sets["train"]))[:PLANTED]
        planted = np.stack([copies.thumbnail(copies.plant(self.sets["train"].image(int(i)), int(i))) for i in chosen])
        recall = gallery.search(planted, threads).copies(limit).mean()
        false_alarms = gallery.search(self.thumbs["test"], threads).copies(limit).mean()
        checks = {"copy_recall": round(float(recall), 4), "copy_planted": len(planted), "copy_false_alarms": round(float(false_alarms), 4)}
        return gallery.search(self.thumbs["synthetic"], threads), limit, checks

    def _reasons(self, matches: copies.Matches, limit: float) -> list[tuple[str, dict[str, Any]] | None]:
        """Per synthetic image None, or the first reason that holds with its figures."""
        found: list[tuple[str, dict[str, Any]] | None] = []
        first: dict[str, str] = {}
        for i, (image, copied) in enumerate(zip(self.images["synthetic"], matches.copies(limit), strict=True)):
            earlier = first.setdefault(image["pixels"], image["key"])
            if image["broken"]:
                found.append(("broken", {"value": image["broken"]}))
            elif image["std"] < self.cfg.screen.blank_std:
                found.append(("blank", {"value": image["std"]}))
            elif copied:
                found.append(("copy", {"value": float(matches.nearness[i]), "similarity": float(matches.similarity[i]),
                                       "train_key": self.sets["train"].keys[matches.index[i]]}))
            elif earlier != image["key"]:
                found.append(("duplicate", {"value": earlier}))
            else:
                found.append(None)
        return found

    def _write_rejected(self, reasons: list[tuple[str, dict[str, Any]] | None], counts: dict[str, int]) -> None:
        synthetic = self.sets["synthetic"]
        samples = [{"key": synthetic.keys[i], "target": synthetic.columns["target"][i], "reason": found[0], **found[1]}
                   for i, found in enumerate(reasons) if found]
        write_json(self.folder / "rejected.json", {"count": len(samples), "reasons": counts, "samples": samples})

    def _write_pairs(self, matches: copies.Matches, reasons: list[tuple[str, dict[str, Any]] | None]) -> None:
        """The nearest pairs, kept and set aside alike, for the eye; broken and blank pictures resemble nothing."""
        usable = [i for i, found in enumerate(reasons) if not found or found[0] in ("copy", "duplicate")]
        chosen = sorted(usable, key=lambda i: (-matches.nearness[i], i))[:PAIRS]
        synthetic, train = self.sets["synthetic"], self.sets["train"]
        pairs = [{"key": synthetic.keys[i], "train_key": train.keys[matches.index[i]], "similarity": float(matches.similarity[i]),
                  "nearness": float(matches.nearness[i]), "rejected": reasons[i][0] if reasons[i] else None} for i in chosen]  # type: ignore[index]
        sheet = [np.concatenate([_tile(synthetic.image(i)), _tile(train.image(int(matches.index[i])))], 1) for i in chosen]
        if sheet:
            write_bytes(self.folder / "worst-pairs.png", _sheet(sheet, [f"{p['similarity']:.2f}" for p in pairs]))
        write_json(self.folder / "pairs.json", pairs)

    def _distances(self, keep: list[int]) -> dict[str, Any]:
        """KID of the accepted images to the training images, of real held-out ones for scale, and per class."""
        scale, s = Scaler.of(self.features["train"]), self.cfg.screen
        train, synthetic = scale(self.features["train"]), scale(self.features["synthetic"])
        held_out = scale(np.concatenate([self.features["val"], self.features["test"]]))
        targets, columns = np.array(self.sets["train"].columns["target"]), self.sets["synthetic"].columns

        def distance(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
            if min(len(x), len(y)) < 2:
                return None, None
            mean, std = kid(x, y, s.kid_subsets, s.kid_subset_size, self.cfg.seed)
            return round(mean, 5), round(std, 5)

        per_class = {}
        for name in sorted(set(columns["class"])):
            members = [i for i in keep if columns["class"][i] == name]
            target = next(t for t, c in zip(columns["target"], columns["class"], strict=True) if c == name)
            value, spread = distance(synthetic[members], train[targets == target])
            per_class[name] = {"kid": value, "kid_std": spread, "accepted": len(members)}
        (value, spread), (real, real_spread) = distance(synthetic[keep], train), distance(held_out, train)
        return {"kid": value, "kid_std": spread, "kid_real": real, "kid_real_std": real_spread, "kid_per_class": per_class}


def _check_enough(cfg: Config, accepted: int, generated: int, rejected: dict[str, int], folder: Path) -> None:
    if accepted < cfg.screen.min_accepted * generated:
        why = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
        raise UserError(f"only {accepted} of {generated} synthetic images were accepted ({why}), less than screen.min_accepted="
                        f"{cfg.screen.min_accepted}. Look at {folder / 'worst-pairs.png'} and rejected.json. Many copies: fewer finetune.steps, "
                        "a lower finetune.lr or more images per concept. Many blank or broken: more generate.steps, precision fp32, a lower guidance")


def _tile(image: np.ndarray, side: int = 128) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if len(image) > side else cv2.INTER_LINEAR)


def _sheet(pairs: list[np.ndarray], captions: list[str], columns: int = 4) -> bytes:
    """A PNG of pairs (synthetic left, training right) with their similarity below."""
    cells = []
    for pair, caption in zip(pairs, captions, strict=True):
        strip = np.full((24, pair.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, f"similarity {caption}", (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
        cells.append(np.pad(np.concatenate([pair, strip]), ((4, 4), (4, 4), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i:i + columns], 1) for i in range(0, len(cells), columns)])
    return cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes()
