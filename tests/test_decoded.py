from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.data import codec
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.decoded import Decoded, fit
from skinsynth.data.shards import ShardWriter, write_manifest


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with ShardWriter(tmp_path, 0) as shard:
        for number in range(4):
            image = cv2.resize(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8), (256, 256))
            shard.add(f"k{number}", {"jpg": codec.encode_jpeg(image, 95)}, target=0)
    write_manifest(tmp_path, 1, kind="real")
    return Dataset.open(tmp_path)


@pytest.mark.parametrize(("side", "reduce"), [(256, 1), (224, 1), (128, 2), (100, 2), (64, 4), (32, 8), (300, 1)])
def test_decoded_no_larger_than_needed_it_shows_the_same(dataset: Dataset, side: int, reduce: int) -> None:
    decoded = Decoded(256, side, 0)
    image, whole = decoded.read(dataset, 1), fit(dataset.image(1), side)
    assert decoded.reduce == reduce
    assert (image.shape, image.dtype) == ((side, side, 3), np.uint8)
    assert np.abs(image.astype(int) - whole).mean() < 1.5
    assert np.corrcoef(image[..., 0].ravel(), image[..., 2].ravel())[0, 1] == pytest.approx(
        np.corrcoef(whole[..., 0].ravel(), whole[..., 2].ravel())[0, 1], abs=0.05), "red is red"


def test_an_image_smaller_than_the_shards_say_is_made_larger(dataset: Dataset) -> None:
    assert Decoded(1024, 128, 0).read(dataset, 0).shape == (128, 128, 3)


def test_no_more_than_the_limit_is_kept_and_nobody_can_write_to_it(dataset: Dataset) -> None:
    decoded = Decoded(256, 64, 2 * 64 * 64 * 3 + 100)
    first = [decoded.read(dataset, number) for number in range(4)]
    again = [decoded.read(dataset, number) for number in range(4)]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False, False]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="read-only"):
        first[0][:] = 0


def test_a_bad_sample_is_one_and_is_not_kept(dataset: Dataset) -> None:
    tar = dataset.folder / "00000.tar"
    content = bytearray(tar.read_bytes())
    offset, size, _ = dataset.places[2][1]["jpg"]
    content[offset + size // 2] ^= 255
    tar.write_bytes(bytes(content))
    decoded = Decoded(256, 64, 1e9)
    for _ in range(2):
        with pytest.raises(BadSample, match="another checksum"):
            decoded.read(dataset, 2)
