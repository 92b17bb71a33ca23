from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from skinsynth.data import codec, dataset, shards
from skinsynth.data.dataset import Dataset
from skinsynth.data.places import Places
from skinsynth.data.shards import ShardWriter, claim, missing_parts, write_manifest
from skinsynth.errors import UserError


def fill(folder: Path, count: int = 2) -> None:
    for unit in range(count):
        with ShardWriter(folder, unit) as shard:
            for i in range(3):
                image = np.full((8, 8, 3), (40 * unit + 10 * i) % 256, np.uint8)
                shard.add(f"k{unit}{i}", {"jpg": codec.encode_jpeg(image, 95), "json": b'{"a": 1}'}, target=i % 2, site="arm" if i else None)


def test_samples_are_read_back_by_offset(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = write_manifest(tmp_path, 2, kind="real")
    data = Dataset.open(tmp_path)
    assert (len(data), manifest["count"], manifest["classes"]) == (6, 6, {"0": 4, "1": 2})
    assert data.keys == ["k00", "k01", "k02", "k10", "k11", "k12"]
    assert data.json(4) == {"a": 1}
    assert abs(int(data.image(5).mean()) - 60) <= 1
    assert data.select({"target": 1}) == [1, 4]
    assert data.select({"site": ["arm"], "target": 0}) == [2, 5]
    assert list(data.shard_samples(1)) == [3, 4, 5]
    assert data.verify() == []


def test_places_are_given_back_as_they_were_told() -> None:
    told = [(0, {"jpg": [512, 9000, 2**32 - 1], "json": [10240, 70, 0]}), (0, {"jpg": [11264, 8000]}), (2, {"npy": [2**40, 5, 7]}), (2, {})]
    places = Places()
    for shard, members in told:
        places.append(shard, members)
    assert [places[number] for number in range(4)] == told
    assert places[-2] == told[2]
    assert [list(places.of_shard(shard)) for shard in range(4)] == [[0, 1], [], [2, 3], []]
    with pytest.raises(IndexError):
        places[4]


def test_an_index_of_many_images_is_small(tmp_path: Path) -> None:
    """The parts alone are read: no tar is opened."""
    import tracemalloc

    units, count, rows = 20, 1000, []
    for unit in range(units):
        part = {"shard": f"{unit:05d}.tar", "sha256": "x", "count": count, "set_aside": [], "keys": [f"m{unit:04d}{i:06d}" for i in range(count)],
                "columns": {"target": [i % 2 for i in range(count)], "prompt": [f"a dermoscopy image of kind {i % 5}" for i in range(count)]},
                "members": [{"jpg": [512 + 20000 * i, 15000 + i, 2**31 + i], "json": [16384 + 20000 * i, 300, 2**30 + i]} for i in range(count)]}
        (tmp_path / "parts").mkdir(exist_ok=True)
        shards.part_path(tmp_path, unit).write_text(json.dumps(part))
        (tmp_path / part["shard"]).write_bytes(b"")
        rows.append({"shard": part["shard"], "sha256": "x", "count": count, "bytes": 0})
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": rows, "count": units * count}))
    tracemalloc.start()
    data = Dataset.open(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == units * count
    assert held / len(data) < 250, "bytes an image"


def test_plain_webdataset_reads_the_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    fill(tmp_path)
    found = list(webdataset.WebDataset([str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")], shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in found] == ["k00", "k01", "k02", "k10", "k11", "k12"]
    assert found[0]["jpg"].shape == (8, 8, 3)
    assert found[0]["json"] == {"a": 1}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    assert (tmp_path / "a/00001.tar").read_bytes() == (tmp_path / "b/00001.tar").read_bytes()


def test_a_writer_that_dies_leaves_nothing_visible(tmp_path: Path) -> None:
    def die() -> None:
        with ShardWriter(tmp_path, 0) as shard:
            shard.add("k", {"jpg": b"x"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    (tmp_path / ".00000.tar.999.tmp").write_bytes(b"left by a task that was killed")
    fill(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["00000.json", "00000.tar"]


def test_missing_parts_are_the_work_left(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    assert missing_parts(tmp_path, 4) == [2, 3]


def test_a_name_that_a_tar_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit into a tar"), ShardWriter(tmp_path, 0) as shard:
        shard.add("x" * 90, {"moments.npy": b"x"})


@pytest.mark.parametrize("key", ["../up", "a/b", "a.b", "", "x" * 121])
def test_keys_with_path_tricks_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="sample key"), ShardWriter(tmp_path, 0) as shard:
        shard.add(key, {"jpg": b"x"})


def test_a_folder_is_claimed_by_one_request(tmp_path: Path) -> None:
    claim(tmp_path, {"size": 64, "seed": 1})
    claim(tmp_path, {"size": 64, "seed": 1})
    with pytest.raises(UserError, match="size: 64 -> 128"):
        claim(tmp_path, {"size": 128, "seed": 1})


def test_unfinished_lost_and_changed_shards_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finished"):
        Dataset.open(tmp_path)
    fill(tmp_path)
    write_manifest(tmp_path, 2)
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "00001.tar").write_bytes(data)
    assert Dataset.open(tmp_path).verify() == ["00001.tar"]
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000.tar is missing"):
        Dataset.open(tmp_path)


def test_unknown_filter_column_names_the_known_ones(tmp_path: Path) -> None:
    fill(tmp_path)
    write_manifest(tmp_path, 2)
    with pytest.raises(UserError, match=r"no column 'colour'.*site, target"):
        Dataset.open(tmp_path).select({"colour": "red"})


def test_manifest_written_twice_is_the_same(tmp_path: Path) -> None:
    fill(tmp_path)
    write_manifest(tmp_path, 2, seed=1)
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path, 2, seed=1)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert json.loads(first)["shards"][0]["count"] == 3


def test_the_bytes_are_those_that_tarfile_writes(tmp_path: Path) -> None:
    """So shards made by earlier releases and by this one are the same."""
    import hashlib
    import io
    import tarfile
    import zlib

    files = [(f"key-{i}_{'x' * 13 * i}.{name}", bytes([i]) * size) for i, size in enumerate((0, 1, 511, 512, 513, 10_000, 1 << 20))
             for name in ("jpg", "moments.npy")]
    with open(tmp_path / "peer.tar", "wb") as f, tarfile.open(fileobj=f, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    with ShardWriter(tmp_path, 0) as shard:
        for (name, jpg), (_, npy) in zip(files[::2], files[1::2], strict=True):
            shard.add(name.partition(".")[0], {"jpg": jpg, "moments.npy": npy})
    made = (tmp_path / "00000.tar").read_bytes()
    assert made == (tmp_path / "peer.tar").read_bytes()
    part = json.loads(shards.part_path(tmp_path, 0).read_text())
    assert (part["sha256"], part["bytes"]) == (hashlib.sha256(made).hexdigest(), len(made))
    offset, size, checksum = part["members"][4]["jpg"]
    assert zlib.crc32(made[offset:offset + size]) == checksum


def test_more_shards_than_handles_are_read_under_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(dataset, "HANDLES", 3)
    fill(tmp_path, 9)
    write_manifest(tmp_path, 9)
    data = Dataset.open(tmp_path)
    asked = np.random.default_rng(0).integers(0, 27, 2000).tolist()
    expected = {i: data.read(i, "jpg") for i in range(27)}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: data.read(i, "jpg"), asked)) == [expected[i] for i in asked]
    assert len(data._files) == 3
    data.close()
    assert data.read(0, "jpg") == expected[0]


def test_a_decoded_image_has_the_colours_in_their_order() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0], image[..., 1] = 200, 90
    batch = np.zeros((2, 16, 16, 3), np.uint8)
    codec.decode(codec.encode_jpeg(image, 95), batch[1])
    assert np.array_equal(batch[1], codec.decode(codec.encode_jpeg(image, 95)))
    assert not batch[0].any()
    with pytest.raises(ValueError, match="it is 16 x 16 pixels, not 8 x 16"):
        codec.decode(codec.encode_jpeg(image, 95), np.zeros((16, 8, 3), np.uint8))
    red, green, blue = batch[1].reshape(-1, 3).mean(0)
    assert abs(red - 200) < 3
    assert abs(green - 90) < 3
    assert blue < 5


def test_a_handle_that_went_stale_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's file system, where another host put the file back; a sample is no worse for it."""
    with ShardWriter(tmp_path / "set", 0) as shard:
        shard.add("a", {"jpg": b"bytes"})
    write_manifest(tmp_path / "set", 1, kind="real")
    data, pread, failures = Dataset.open(tmp_path / "set"), os.pread, [errno.ESTALE]

    def stale(*arguments: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    assert data.read(0, "jpg") == b"bytes"
    assert not failures
