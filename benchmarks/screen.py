"""Searching synthetic images for copies of training images and for near-duplicates: blocked, as the screen does it, beside a loop over pairs.

Both sides of a pair must find the same, or there is no figure. ``screen-candidates``: the coarse search in eight poses. ``screen-copies``: the whole
search, beside aligning each query with every training image in every pose. ``screen-duplicates``: near-duplicates within one set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import alternate, images, report
from skinsynth.data.codec import decode
from skinsynth.quality import copies, near

QUERIES = 400
SLOW = {"candidates": 20, "copies": 4, "duplicates": 100}  # queries of the loops, which would take hours over all
LIMIT = 0.98


def candidates_by_loop(queries: np.ndarray, gallery: np.ndarray) -> list[list[int]]:
    """As ``copies.candidates``, one pair at a time."""
    rows = [image.ravel().astype(np.float32) for image in gallery]
    lengths = [max(float(np.linalg.norm(row)), 1.0) for row in rows]
    found = []
    for query in queries:
        poses = [turned[0].ravel().astype(np.float32) for turned in copies.turns(query[None])]
        likeness = [max(float(pose @ row) for pose in poses) / length for row, length in zip(rows, lengths, strict=True)]
        found.append(sorted(range(len(rows)), key=lambda i: (-likeness[i], i))[:copies.POOL])
    return found


def copies_by_loop(queries: np.ndarray, gallery: np.ndarray) -> list[int]:
    """The nearest training image of each query, by aligning it with every one in every pose."""
    details, found = [copies._detail(thumb) for thumb in gallery], []
    for query in queries:
        templates = [template for turned in copies.turns(copies._detail(query)[None]) for template in copies._templates(turned[0])]
        best = [max(copies._correlation(detail, template) for template in templates) for detail in details]
        found.append(int(np.argmax(best)))
    return found


def duplicates_by_loop(prints: np.ndarray, later: range) -> list[tuple[int, int]]:
    """As ``near.near_pairs``, of the later ones, one pair at a time."""
    rows, found = [p.astype(np.float32) for p in prints], []
    for j in later:
        poses, kept = [np.ascontiguousarray(turned[0]) for turned in copies.turns(rows[j][None])], 0
        for i in range(j):
            product = max(float(np.vdot(rows[i], pose)) for pose in poses)
            length = float(np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
            if kept < near.KEPT and product >= LIMIT * max(length, 1.0):
                found.append((j, i))
                kept += 1
    return found


def compare(name: str, what: str, pairs: tuple[int, int], fast: Callable[[], Any], slow: Callable[[], Any], same: Callable[[Any, Any], bool]) -> None:
    """``pairs``: how many each side looks at."""
    if not same(fast(), slow()):
        raise RuntimeError(f"{name}: the blocked search and the loop do not find the same")

    def timed(run: Callable[[], Any], count: int) -> float:
        since = time.perf_counter()
        run()
        return count / (time.perf_counter() - since)

    rounds = alternate({"blocked": lambda: timed(fast, pairs[0]), "loop over pairs": lambda: timed(slow, pairs[1])}, 3)
    report(f"screen-{name}", rounds, "blocked", "loop over pairs", "pairs/s", what)


def main() -> None:
    pictures = [decode(jpeg) for _, jpeg in images()]
    thumbs = np.stack([copies.thumbnail(picture) for picture in pictures])
    queries, train = thumbs[:QUERIES], thumbs[QUERIES:]
    known = np.stack([copies.thumbnail(copies.plant(picture, i)) for i, picture in enumerate(pictures[QUERIES:QUERIES + SLOW["copies"]])])
    count, n = len(train), SLOW["candidates"]
    small, large = copies.coarse(queries), copies.coarse(train)
    compare("candidates", f"{QUERIES} images (loop: {n}) against {count} real ones in eight poses: the {copies.POOL} coarsely nearest",
            (QUERIES * count, n * count), lambda: copies.candidates(small, large)[0].tolist(), lambda: candidates_by_loop(small[:n], large),
            lambda fast, slow: fast[:n] == slow)
    gallery = copies.Gallery(train)
    planted = np.concatenate([known, queries])
    compare("copies", f"{len(planted)} images (loop: {len(known)} of them, disguised copies) against {count} real ones, aligned over shifts and "
            "scales: ours the coarsely nearest, the loop all; the copies' originals equal", (len(planted) * count, len(known) * count),
            lambda: gallery.search(planted).index.tolist(), lambda: copies_by_loop(known, train),
            lambda fast, slow: fast[:len(known)] == slow)
    prints = np.stack([near.fingerprint(thumb) for thumb in thumbs])
    last = range(len(prints) - SLOW["duplicates"], len(prints))
    compare("duplicates", f"{len(prints)} images among themselves (loop: the last {len(last)} with all before), in eight poses; equal",
            (len(prints) * (len(prints) - 1) // 2, sum(last)), lambda: near.near_pairs(prints, prints, LIMIT, same=True),
            lambda: duplicates_by_loop(prints, last), lambda fast, slow: [tuple(row) for row in fast.tolist() if row[0] in last] == slow)


if __name__ == "__main__":
    main()
