from __future__ import annotations

import gc
import io
import json
import os
import pickle
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from skinsynth.data import codec, shards
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.order import Mixture, share
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.data.stream import TURN, Feed, Source
from skinsynth.errors import UserError

SIZE = 6  # samples in each of three shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """18 images, each of its own grey, in three shards."""
    for unit in range(3):
        with ShardWriter(tmp_path, unit) as shard:
            for i in range(SIZE):
                number = unit * SIZE + i
                image = np.full((16, 16, 3), 10 * number, np.uint8)
                shard.add(f"k{number:02d}", {"jpg": codec.encode_jpeg(image, 95), "moments.npy": codec.to_npy(np.full(3, number))}, target=0)
    write_manifest(tmp_path, 3)
    return tmp_path


def place(folder: Path, number: int, extension: str = "jpg") -> tuple[Path, int, int]:
    """The tar, the offset and the bytes of a sample's file."""
    part = json.loads(shards.part_path(folder, number // SIZE).read_text())
    offset, size, _ = part["members"][number % SIZE][extension]
    return folder / part["shard"], offset, size


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def flip_a_byte(folder: Path) -> set[str]:
    path, offset, size = place(folder, 8)
    overwrite(path, offset + size // 2, bytes([path.read_bytes()[offset + size // 2] ^ 1]))
    return {"k08"}


def truncate(folder: Path) -> set[str]:
    path, offset, _ = place(folder, 10)
    os.truncate(path, offset + 5)
    return {"k10", "k11"}


def lose_a_shard(folder: Path) -> set[str]:
    (folder / "00002.tar").unlink()
    return {f"k{number}" for number in range(12, 18)}


def noise_for_a_jpeg(folder: Path) -> set[str]:
    """The checksum is that of the noise, as if it had been written so: only the decoder can tell."""
    path, offset, size = place(folder, 3)
    noise = np.random.default_rng(0).bytes(size)
    overwrite(path, offset, noise)
    part = shards.part_path(folder, 0)
    content = json.loads(part.read_text())
    content["members"][3]["jpg"][2] = zlib.crc32(noise)
    part.write_text(json.dumps(content))
    return {"k03"}


def grey(dataset: Dataset, number: int) -> int:
    return round(float(dataset.image(number).mean()) / 10)


DAMAGE = [flip_a_byte, truncate, lose_a_shard, noise_for_a_jpeg]


@pytest.mark.parametrize("damage", DAMAGE)
def test_stop_names_the_sample_its_shard_and_what_is_wrong(folder: Path, damage: object) -> None:
    bad = damage(folder)  # type: ignore[operator]
    source = Source(Dataset.open(folder, tolerate=True), range(18), "stop")
    for number in range(18):
        key = f"k{number:02d}"
        if key not in bad:
            assert source.read(number, grey) == number
            continue
        with pytest.raises(BadSample, match=rf"sample {key} in {folder}/0000{number // SIZE}.tar (is|cannot be) .*data.on_error=skip"):
            source.read(number, grey)
    assert source.bad == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_skip_takes_the_next_good_sample_and_tells_each_bad_one_once(folder: Path, damage: object) -> None:
    bad = damage(folder)  # type: ignore[operator]
    numbers = range(0, 18)
    expected = {n: next(m % 18 for m in range(n, n + 18) if f"k{m % 18:02d}" not in bad) for n in numbers}
    for asked in (list(numbers), list(reversed(numbers)), [*numbers, *numbers]):  # the order in which they are asked for changes nothing
        source = Source(Dataset.open(folder, tolerate=True), range(18), "skip")
        assert {n: source.read(n, grey) for n in asked} == expected
        assert [(error.key, error.shard) for error in source.bad] == [(k, f"0000{int(k[1:]) // SIZE}.tar") for k in sorted(bad)]
    assert pickle.loads(pickle.dumps(source.bad[0])).reason == source.bad[0].reason, "other ranks can be told"


def test_opening_without_tolerance_refuses_a_truncated_shard(folder: Path) -> None:
    truncate(folder)
    with pytest.raises(UserError, match=r"00001.tar is missing or has not the \d+ bytes"):
        Dataset.open(folder)


def test_a_source_with_no_good_sample_left_is_an_error(folder: Path) -> None:
    lose_a_shard(folder)
    source = Source(Dataset.open(folder, tolerate=True), range(12, 18), "skip")
    with pytest.raises(UserError, match="none of the 6 samples to train on can be read; the first sample k12"):
        source.read(2, grey)
    assert len(source.bad) == 6


def test_a_part_without_checksums_is_read_as_before(folder: Path) -> None:
    flip_a_byte(folder)
    for unit in range(3):
        path = shards.part_path(folder, unit)
        part = json.loads(path.read_text())
        part["members"] = [{name: where[:2] for name, where in members.items()} for members in part["members"]]
        path.write_text(json.dumps(part))
    data = Dataset.open(folder)
    assert [int(data.array(n, "moments.npy")[0]) for n in range(18)] == list(range(18))


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_from_a_shard_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    objects = io.BytesIO()
    np.save(objects, np.array([Planted(mark)], dtype=object), allow_pickle=True)
    plain = pickle.dumps(Planted(mark))
    with ShardWriter(tmp_path / "set", 0) as shard:
        shard.add("k", {"pkl": plain, "moments.npy": objects.getvalue(), "npy": plain, "jpg": plain, "json": plain})
    write_manifest(tmp_path / "set", 1)
    source = Source(Dataset.open(tmp_path / "set"), range(1), "stop")
    for how in (lambda d, n: d.array(n, "moments.npy"), lambda d, n: d.array(n, "npy"), lambda d, n: d.image(n), lambda d, n: d.json(n)):
        with pytest.raises(BadSample, match="cannot be decoded"):
            source.read(0, how)
    assert source.read(0, lambda d, n: d.read(n, "pkl")) == plain
    assert not mark.exists()
    pickle.loads(plain)
    assert mark.exists(), "it would have shown"


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "a.b", ""])
def test_keys_in_an_index_that_could_leave_the_folder_are_refused(folder: Path, key: str) -> None:
    path = shards.part_path(folder, 1)
    part = json.loads(path.read_text())
    part["keys"][2] = key
    path.write_text(json.dumps(part))
    with pytest.raises(UserError, match=f"'{key}' cannot be used as a name"):
        Dataset.open(folder)


def test_a_shard_name_that_leaves_the_folder_is_refused(folder: Path) -> None:
    for path in (folder / "manifest.json", shards.part_path(folder, 0)):
        path.write_text(path.read_text().replace("00000.tar", "../../00000.tar"))
    with pytest.raises(UserError, match=r"00000\.tar' cannot be used as a name"):
        Dataset.open(folder)


# ---- Feed ----

def batches(folder: Path, workers: int, ranks: int = 1, rank: int = 0, on_error: str = "stop") -> Iterator[tuple[int, list[list[int]]]]:
    source = Source(Dataset.open(folder, tolerate=True), range(18), on_error)
    mixture = Mixture((18,), (1.0,), 0, (source.shards,), 3, 3)
    todo = ((step, share(step, 6, 3 // ranks, rank, ranks)) for step in range(12))
    with Feed(lambda positions: [source.read(mixture.at(p)[1], grey) for p in positions], todo, workers, ahead=3) as feed:
        yield from feed


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_batches_are_the_same_with_any_number_of_workers(folder: Path, workers: int) -> None:
    found = list(batches(folder, workers))
    assert found == list(batches(folder, 1))
    assert [step for step, _ in found] == list(range(12))
    drawn = [number for _, passes in found for batch in passes for number in batch]
    for epoch in range(4):
        assert sorted(drawn[epoch * 18:(epoch + 1) * 18]) == list(range(18))


@pytest.mark.parametrize("damage", DAMAGE)
def test_ranks_agree_on_the_replacements(folder: Path, damage: object) -> None:
    bad = damage(folder)  # type: ignore[operator]
    together = {step: sorted(n for batch in passes for n in batch) for step, passes in batches(folder, 2, on_error="skip")}
    parts = [dict(batches(folder, 2, 3, rank, "skip")) for rank in range(3)]
    assert {step: sorted(n for part in parts for batch in part[step] for n in batch) for step in together} == together
    assert not {f"k{n:02d}" for numbers in together.values() for n in numbers} & bad


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_rises_at_its_own_step(workers: int) -> None:
    def make(positions: range) -> int:
        if positions.start == 40:
            raise BadSample("set", "00000.tar", "k", "is damaged")
        return positions.start

    feed = Feed(make, ((s, [range(10 * s, 10 * s + 5)]) for s in range(9)), workers, ahead=4)
    reader = iter(feed)
    assert [next(reader) for _ in range(4)] == [(s, [10 * s]) for s in range(4)]
    with pytest.raises(BadSample, match="sample k"):
        next(reader)
    assert feeding() == []


def feeding() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.parametrize("leave", ["close", "break", "drop", "drop unread", "error in a with block"])
def test_no_thread_is_left_behind(leave: str) -> None:
    def work() -> None:
        feed = Feed(lambda positions: list(positions), ((s, [range(s)]) for s in range(1000)), 3, ahead=5)
        assert feeding()
        if leave == "drop unread":
            return
        if leave == "break":
            for step, _ in feed:
                if step == 2:
                    break
            return
        if leave == "error in a with block":
            with feed:
                raise RuntimeError
        reader = iter(feed)
        next(reader)
        assert feeding()
        if leave == "close":
            feed.close()

    with suppress(RuntimeError):
        work()
    gc.collect()
    deadline = time.monotonic() + 10
    while feeding() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert feeding() == []


def test_waiting_is_counted_and_work_is_done_ahead() -> None:
    gate, begun = threading.Event(), []

    def make(positions: range) -> int:
        begun.append(positions.start)
        gate.wait(10)
        return positions.start

    threading.Timer(0.2, gate.set).start()
    with Feed(make, ((s, [range(s, s + 1)]) for s in range(6)), 2, ahead=3) as feed:
        reader, since = iter(feed), time.perf_counter()
        assert next(reader) == (0, [0])
        waited = feed.waited
        assert 0 < waited <= time.perf_counter() - since
        deadline = time.monotonic() + 10
        while len(begun) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(begun) == [0, 1, 2, 3], "three steps are made ahead of the one in use, not more"
        assert [step for step, _ in reader] == [1, 2, 3, 4, 5]
        assert feed.waited >= waited


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_taking_turns_nothing_is_made_while_a_batch_is_in_use(workers: int) -> None:
    """Side by side with a training on the CPU, loading would take its cores."""
    making: list[int] = []

    def make(positions: range) -> int:
        making.append(positions.start)
        time.sleep(0.01)
        making.remove(positions.start)
        return positions.start

    with Feed(make, ((s, [range(s, s + 1), range(s + 100, s + 101)]) for s in range(2 * TURN + 3)), workers, turns=True) as feed:
        seen = []
        for step, passes in feed:
            assert not making
            time.sleep(0.02)  # time enough for any that were begun
            assert not making
            seen.append((step, passes))
    assert seen == [(s, [s, s + 100]) for s in range(2 * TURN + 3)]
    assert feed.waited > 0


def test_taking_turns_an_error_rises_at_its_own_step() -> None:
    def make(positions: range) -> int:
        if positions.start == 2:
            raise BadSample("set", "00000.tar", "k", "is damaged")
        return positions.start

    reader = iter(Feed(make, ((s, [range(s, s + 1)]) for s in range(5)), 2, turns=True))
    assert [next(reader), next(reader)] == [(0, [0]), (1, [1])]
    with pytest.raises(BadSample, match="sample k"):
        next(reader)
    assert feeding() == []
