"""What is let through: each image by the first reason against it, and the set as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skinsynth.knobs import Screen
from skinsynth.quality import copies, defects, near

# Copies come before the defects: a patient's picture is one also where it is blurred. Duplicates come last: the one kept is to be a good one.
REASONS = ("broken", "blank", "copy", "held-out", "blur", "frame", "clipped", "saturated", "class", "duplicate")


@dataclass
class Measured:
    """What is known of each synthetic image, rows in their order. ``pairs``: rows (later, earlier) of near-duplicates, sorted, of each later one
    the first ``near.KEPT``; ``held_out``: the validation or test image that one is; ``prints`` gives all prints and ``near_limit`` is the
    correlation of near-duplicates, for images that may have more of these."""

    broken: dict[int, str]
    measures: np.ndarray
    matches: copies.Matches
    agreement: np.ndarray
    pairs: np.ndarray
    held_out: dict[int, str]
    prints: Callable[[], np.ndarray]
    near_limit: float | None
    like: dict[int, int] = field(init=False, default_factory=dict)  # a duplicate -> the first accepted image that it is like

    def reasons(self, limits: defects.Limits, copy_limit: float, agreement: float | None) -> list[str | None]:
        """Per image the first of ``REASONS`` that holds, or None."""
        count = len(self.measures)
        holds = {**limits.beyond(self.measures), "copy": self.matches.copies(copy_limit),
                 "broken": np.isin(np.arange(count), list(self.broken)), "held-out": np.isin(np.arange(count), list(self.held_out)),
                 "class": np.zeros(count, bool) if agreement is None else self.agreement < agreement}
        found: list[str | None] = [None] * count
        for reason in reversed(REASONS):
            for i in np.flatnonzero(holds.get(reason, ())):
                found[i] = reason
        self._find_duplicates(found)
        return found

    def _find_duplicates(self, found: list[str | None]) -> None:
        """In their order, so that the fate of all earlier ones is known. Where as many near ones as are noted are all set aside, there may be more
        that are not: only then it is looked for among all that are accepted, which takes their prints."""
        prints, good = None, np.array([reason is None for reason in found], bool)
        later, starts = np.unique(self.pairs[:, 0], return_index=True)
        for image, earlier in zip(later.tolist(), np.split(self.pairs[:, 1], starts[1:]), strict=False):
            if not good[image]:
                continue
            like = next((e for e in earlier.tolist() if good[e]), None)
            if like is None and len(earlier) == near.KEPT and self.near_limit is not None:
                prints = self.prints() if prints is None else prints
                between = earlier[-1] + 1 + np.flatnonzero(good[earlier[-1] + 1:image])
                like = near.first_near(prints, image, between, self.near_limit)
            if like is not None:
                found[image], good[image], self.like[image] = "duplicate", False, like

    def told(self, reason: str, image: int, keys: list[str], train_keys: list[str], found: list[str | None]) -> dict[str, Any]:
        """The figures that go with a reason."""
        if reason == "broken":
            return {"value": self.broken[image]}
        if reason == "copy":
            return {"value": float(self.matches.nearness[image]), "similarity": float(self.matches.similarity[image]),
                    "train_key": train_keys[self.matches.index[image]]}
        if reason == "held-out":
            return {"value": self.held_out[image]}
        if reason == "class":
            return {"value": round(float(self.agreement[image]), 4)}
        if reason == "duplicate":
            return {"value": keys[self.like[image]]}
        return {"value": defects.value(reason, self.measures[image])}


def copied_share(matches: copies.Matches, limit: float, train: int) -> float:
    """The share of the training images that any synthetic image copies."""
    return round(len(np.unique(matches.index[matches.copies(limit)])) / train, 6)


@dataclass(frozen=True)
class Failure:
    """``why`` a set as a whole does not pass, and the ``reason`` to do something about: of ``REASONS``, or ``kid``."""

    why: str
    reason: str


def failures(metrics: dict[str, Any], knobs: Screen) -> list[Failure]:
    """Those of the set as a whole; empty where it passes. A class that was asked for and has no accepted image never does."""
    generated, rejected, features = metrics["generated"], metrics["rejected"], metrics["features"]
    found = _too_few("synthetic images", metrics, knobs.min_accepted, "")
    for name, row in metrics["classes"].items():
        found += _too_few(f"{name} images", row, knobs.min_accepted, " of this class") or _none(name, row)
    if knobs.max_copies is not None and rejected["copy"] > knobs.max_copies * generated:
        found.append(Failure(f"{rejected['copy']} of {generated} synthetic images are copies of training images, more than screen.max_copies="
                             f"{knobs.max_copies}", "copy"))
    ratio, limit = metrics["kid_ratio"], knobs.max_kid_ratio
    if limit is not None and ratio is None:
        found.append(Failure(f"KID ({features}) of the synthetic images beside that of real ones is unknown, so screen.max_kid_ratio={limit} cannot "
                             "be told", "kid unknown"))
    elif limit is not None and ratio > limit:
        found.append(Failure(f"KID ({features}) of the synthetic images is {ratio} times that of real images, more than screen.max_kid_ratio={limit}",
                             "kid"))
    return found


def _too_few(what: str, row: dict[str, Any], least: float, share_of: str) -> list[Failure]:
    if row["accepted"] >= least * row["generated"]:
        return []
    told, most = _reasons(row)
    return [Failure(f"only {row['accepted']} of {row['generated']} {what} were accepted ({told}), less than screen.min_accepted={least}{share_of}",
                    most)]


def _none(name: str, row: dict[str, Any]) -> list[Failure]:
    if row["accepted"]:
        return []
    if not row["generated"]:  # those that came out faulty were left out
        return [Failure(f"there is no {name} image, though some were asked for", "broken")]
    told, most = _reasons(row)
    return [Failure(f"none of {row['generated']} {name} images was accepted ({told})", most)]


def _reasons(row: dict[str, Any]) -> tuple[str, str]:
    """All with their counts, and that which set most images aside."""
    rejected = row["rejected"]
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count), max(rejected, key=rejected.__getitem__)


def kid_ratio(kid: float | None, real: float | None, real_std: float | None) -> float | None:
    """KID of the synthetic images over that of real held-out ones, or over its spread over subsets where that is larger: real to real is about zero,
    of either sign. None where one of them is unknown, as the spread is of fewer than four images."""
    return None if kid is None or real is None or real_std is None else round(kid / max(real, real_std, 1e-6), 3)
