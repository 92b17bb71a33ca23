"""What is let through: each image by the first reason against it, and the set as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skinsynth.knobs import Screen
from skinsynth.quality import copies, defects

# Copies come before the defects: a patient's picture is one also where it is blurred. Duplicates come last: the one kept is to be a good one.
REASONS = ("broken", "blank", "copy", "held-out", "blur", "frame", "clipped", "saturated", "class", "duplicate")


@dataclass
class Measured:
    """What is known of each synthetic image, rows in their order. ``pairs``: rows (later, earlier) of near-duplicates, sorted; ``held_out``: the
    validation or test image that one is."""

    broken: dict[int, str]
    measures: np.ndarray
    matches: copies.Matches
    agreement: np.ndarray
    pairs: np.ndarray
    held_out: dict[int, str]

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
        for later, earlier in self.pairs.tolist():  # sorted, so the fate of the earlier one is known
            if found[later] is None and found[earlier] is None:
                found[later] = "duplicate"
        return found

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
            first, last = np.searchsorted(self.pairs[:, 0], [image, image + 1])
            return {"value": next(keys[e] for e in self.pairs[first:last, 1].tolist() if found[e] is None)}
        return {"value": defects.value(reason, self.measures[image])}


def copied_share(matches: copies.Matches, limit: float, train: int) -> float:
    """The share of the training images that any synthetic image copies."""
    return round(len(np.unique(matches.index[matches.copies(limit)])) / train, 6)


def failures(metrics: dict[str, Any], knobs: Screen) -> list[str]:
    """Why the set as a whole does not pass; empty where it does."""
    accepted, generated, rejected, found = metrics["accepted"], metrics["generated"], metrics["rejected"], []
    if accepted < knobs.min_accepted * generated:
        why = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
        found.append(f"only {accepted} of {generated} synthetic images were accepted ({why}), less than screen.min_accepted={knobs.min_accepted}")
    if knobs.max_copies is not None and rejected["copy"] > knobs.max_copies * generated:
        found.append(f"{rejected['copy']} of {generated} synthetic images are copies of training images, more than screen.max_copies="
                     f"{knobs.max_copies}")
    ratio = metrics["kid_ratio"]
    if knobs.max_kid_ratio is not None and ratio is not None and ratio > knobs.max_kid_ratio:
        found.append(f"KID ({metrics['features']}) of the synthetic images is {ratio} times that of real images, more than "
                     f"screen.max_kid_ratio={knobs.max_kid_ratio}")
    return found


def kid_ratio(kid: float | None, real: float | None, real_std: float | None) -> float | None:
    """KID of the synthetic images over that of real held-out ones, or over the spread of that where it is larger: real to real is about zero, of
    either sign."""
    return None if kid is None or real is None or real_std is None else round(kid / max(real, real_std, 1e-6), 3)
