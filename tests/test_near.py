"""near: the same picture drawn twice is found, other pictures are not, and neither blocks nor order change anything."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.data.codec import decode, encode_jpeg
from skinsynth.data.dataset import Dataset
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.data.withdrawn import mark
from skinsynth.knobs import Config
from skinsynth.quality import copies, near
from skinsynth.quality.parts import Parts
from skinsynth.run import Progress, RunDir

LIMIT = 0.98


def prints(images: np.ndarray) -> np.ndarray:
    return np.stack([near.fingerprint(copies.thumbnail(image)) for image in images])


@pytest.fixture(scope="module")
def pictures(real: Path) -> np.ndarray:
    """200 real images at 64 pixels, the first of each set of equal ones."""
    files = sorted((real / "isic2017/images").glob("*.jpg"))[:200]
    found = np.stack([cv2.resize(cv2.imread(str(f)), (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1] for f in files])
    return found[np.sort(np.unique(found.reshape(len(found), -1), axis=0, return_index=True)[1])]


@pytest.mark.real
def test_real_redrawn_pictures_are_near_and_others_are_not(pictures: np.ndarray) -> None:
    own = prints(pictures)
    turned = [lambda x, n=n: np.ascontiguousarray(list(copies.turns(x[None]))[n][0]) for n in range(8)]
    for change in (lambda x: decode(encode_jpeg(x, 60)), lambda x: cv2.GaussianBlur(x, (0, 0), 0.7), *turned,
                   lambda x: np.clip(x * 1.1 + 9, 0, 255).astype(np.uint8)):
        changed = prints(np.stack([change(x) for x in pictures]))
        assert (np.diag(near.correlation(own, changed)) >= LIMIT).mean() >= 0.97
    among = near.near_pairs(own, own, LIMIT, same=True)
    assert len(np.unique(among[:, 0])) / len(own) < 0.02


def random_prints(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (n, near.SIDE, near.SIDE)).astype(np.int8)


def poses(print_: np.ndarray) -> list[np.ndarray]:
    return [pose for quarter in range(4) for turned in [np.rot90(print_, quarter)] for pose in (turned, turned.T)]


def slow_pairs(earlier: np.ndarray, later: np.ndarray, limit: float, same: bool) -> list[tuple[int, int]]:
    found = []
    for j, y in enumerate(later.astype(np.float64)):
        mine = []
        for i, x in enumerate(earlier.astype(np.float64)):
            corr = max((x * z).sum() for z in poses(y)) / np.linalg.norm(x) / np.linalg.norm(y)
            if corr >= limit and (i < j or not same):
                mine.append((j, i))
        found += mine[:near.KEPT]
    return found


@pytest.mark.parametrize("same", [True, False])
def test_pairs_are_those_of_the_loop_whatever_the_blocks(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = random_prints(23), random_prints(30, 1)
    two[[3, 9, 17, 18, 19, 20, 21]] = one[5]
    two[[11, 12, 13, 14]] = one[6][:, ::-1], np.rot90(one[6]), one[6][::-1], np.rot90(one[6], 2).T
    one = two[:23] if same else one
    expected = slow_pairs(one, two if not same else one, LIMIT, same)
    assert len(expected) > 4
    for block in (1024, 7, 1):
        monkeypatch.setattr(near, "BLOCK", block)
        assert [tuple(row) for row in near.near_pairs(one, two if not same else one, LIMIT, same).tolist()] == expected


@pytest.mark.parametrize("few", [1, 10_000])
def test_the_bound_rules_out_no_pair_that_is_near(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures as smooth as lesions, many of them nearly the same in another turn; whether the few that are left are looked at alone or all."""
    rng = np.random.default_rng(2)
    base = [cv2.GaussianBlur(rng.normal(0, 1, (near.SIDE, near.SIDE)), (0, 0), 3) for _ in range(12)]
    found = [poses(base[n % 12])[n % 8] + rng.normal(0, 0.1 * np.std(base[n % 12]) * (n % 5), (near.SIDE, near.SIDE)) for n in range(120)]
    prints_ = np.stack([np.round(127 * x / np.abs(x).max()) for x in found]).astype(np.int8)
    monkeypatch.setattr(near, "FEW", few)
    whole = near.correlation(prints_, prints_)
    for limit in (0.5, 0.9, 0.98):
        assert np.array_equal(near.within(prints_, prints_, limit), whole >= limit)
    assert 120 < (whole >= 0.98).sum() < (whole >= 0.9).sum() < whole.size / 4


def test_many_equal_ones_make_few_pairs() -> None:
    same = np.repeat(random_prints(1), 200, axis=0)
    pairs = near.near_pairs(same, same, LIMIT, same=True)
    assert len(pairs) == sum(min(near.KEPT, j) for j in range(200))
    assert pairs[-near.KEPT:].tolist() == [[199, i] for i in range(near.KEPT)]


def test_a_flat_picture_is_near_to_nothing() -> None:
    flat = prints(np.full((2, 64, 64, 3), 120, np.uint8))
    assert not flat.any()
    assert not len(near.near_pairs(flat, flat, 0.5, same=True))


def shards(folder: Path, kind: str, *contents: list[np.ndarray]) -> Path:
    """A dataset with a shard for each list of images."""
    count = 0
    for number, images in enumerate(contents):
        with ShardWriter(folder, number) as shard:
            for image in images:
                shard.add(f"{folder.name}-{count}", {"jpg": encode_jpeg(image, 95), "json": b"{}"}, target=count % 2, group=f"{folder.name}-{count}")
                count += 1
    write_manifest(folder, len(contents), kind=kind)
    return folder


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_shard_of_which_all_is_withdrawn_moves_no_pair(gone: int, tmp_path: Path) -> None:
    """It has no part. The numbers of the images after it are those that they have where it is left out."""
    rng = np.random.default_rng(4)
    picture = [cv2.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), (32, 32)) for _ in range(20)]
    real = {kind: Dataset.open(shards(tmp_path / kind, "real", picture[n:n + 2])) for n, kind in ((0, "train"), (2, "val"), (4, "test"))}
    content = [[picture[6], picture[7]], [picture[8], picture[9], picture[10]], [picture[11], picture[12]]]
    kept = [number for number in range(3) if number != gone]
    content[kept[1]].append(content[kept[0]][1])  # of two shards, the first after the other
    content[kept[1]].append(content[kept[1]][0])  # and in one
    folder, cfg = shards(tmp_path / "synthetic", "synthetic", *content), Config()
    cfg.prepare.size = 32
    keys = Dataset.open(folder).keys
    start = sum(map(len, content[:gone]))
    mark(folder, "g", keys[start:start + len(content[gone])], "drawn over images of theirs")
    sets = real | {"synthetic": Dataset.open(folder)}
    parts = Parts(cfg, tmp_path / "parts", sets, "")
    assert [unit.shard for unit in parts.of("synthetic")] == kept
    for unit in parts.of("synthetic"):
        parts.inspect(unit, lambda images: np.zeros((len(images), 3), np.float32), Progress(RunDir(tmp_path), "screen", 0, 9, "images"))  # type: ignore[arg-type]
    first, second = len(content[kept[0]]), len(content[kept[1]])
    wanted = [[first + second - 2, 1], [first + second - 1, first]]
    assert parts.pairs(LIMIT).tolist() == wanted
    for unit in parts.of("synthetic"):
        parts.compare(unit, LIMIT)
    assert parts.pairs(LIMIT).tolist() == wanted
