"""Loading for training: our order and threads beside plain webdataset and litdata, on the same images.

Each side is read for some epochs in a process of its own: shuffled, decoded to uint8 RGB, batches of 32, two workers. What counts is
samples/s from the first batch on. ``python -m benchmarks.stream SIDE ...`` is one such process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import SCRATCH, alternate, images, in_process, report

SIDE, BATCH, WORKERS, SHARD, WINDOW, EPOCHS = 256, 32, 2, 250, 2048, 6
LITDATA = ("litdata==0.2.76", "lightning-utilities", "boto3", "botocore", "jmespath", "s3transfer")  # and what it cannot be imported without
OURS, PLAIN, STOCK, LIT = "skinsynth", "webdataset (cv2)", "webdataset (its own decoder)", "litdata (cv2)"


def decode(jpeg: bytes) -> np.ndarray:
    import cv2

    image: Any = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    return image


def ours(folder: Path, begin: int = 0) -> Iterator[Any]:
    """With all that a training has: checksums checked, the order that can begin anywhere, bad samples told."""
    import torch

    from skinsynth.data.dataset import Dataset
    from skinsynth.data.order import Mixture, share
    from skinsynth.data.stream import Feed, Source

    source = Source(Dataset.open(folder), range(len(Dataset.open(folder))))
    mixture = Mixture((len(source),), (1.0,), 0, (source.shards,), 16, WINDOW)

    def batch(positions: range) -> Any:
        images = np.empty((len(positions), SIDE, SIDE, 3), np.uint8)
        for position, place in zip(positions, images, strict=True):
            source.read(mixture.at(position)[1], partial(Dataset.image, out=place))
        return torch.from_numpy(images)

    todo = ((step, share(step, BATCH, BATCH, 0, 1)) for step in range(begin, len(source) * EPOCHS // BATCH))
    with Feed(batch, todo, WORKERS, ahead=2 * WORKERS) as feed:  # as far ahead as DataLoader's workers
        for _, batches in feed:
            yield from batches


def plain(folder: Path, stock: bool = False) -> Iterator[Any]:
    import webdataset as wds

    urls = sorted(map(str, folder.glob("*.tar")))
    raw = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(WINDOW).repeat(nepochs=EPOCHS)
    decoded = raw.decode("rgb8").to_tuple("jpg") if stock else raw.to_tuple("jpg").map_tuple(decode)
    for (batch,) in wds.WebLoader(decoded.batched(BATCH), batch_size=None, num_workers=WORKERS):
        yield batch


def litdata(folder: Path) -> Iterator[Any]:
    import litdata as ld

    class Images(ld.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return decode(super().__getitem__(index))

    loader = ld.StreamingDataLoader(Images(str(folder), shuffle=True), batch_size=BATCH, num_workers=WORKERS)
    for _ in range(EPOCHS):
        yield from loader


READ: dict[str, Callable[[Path], Iterator[Any]]] = {"ours": ours, "plain": plain, "stock": partial(plain, stock=True), "litdata": litdata}


def one(item: tuple[str, bytes]) -> bytes:
    return item[1]


def prepare() -> Path:
    """Writes the images as our shards (which webdataset reads as well) and as litdata's chunks; both are kept."""
    from skinsynth.data.shards import ShardWriter, write_manifest

    found, folder = images(), SCRATCH / "stream"
    if not (folder / "ours" / "manifest.json").exists():
        units = range(-(-len(found) // SHARD))
        for unit in units:
            with ShardWriter(folder / "ours", unit) as shard:
                for key, jpeg in found[unit * SHARD:(unit + 1) * SHARD]:
                    shard.add(key, {"jpg": jpeg, "json": json.dumps({"isic_id": key, "target": 0}).encode()}, target=0)
        write_manifest(folder / "ours", len(units))
    return folder


def have_litdata() -> bool:
    """Installs the peer and what it cannot be imported without, and nothing else of what it asks for (torchvision, a CUDA torch)."""
    target = SCRATCH / "litdata"
    if not (target / "litdata").is_dir():
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *LITDATA], check=False)
        if done.returncode:
            print("litdata cannot be installed here: it is left out")
            return False
    if not (SCRATCH / "stream" / "litdata" / "index.json").exists():
        in_process("benchmarks.stream", "optimize", env=_with_litdata())
    return True


def _with_litdata() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(SCRATCH / "litdata"), os.environ.get("PYTHONPATH", "")])}


def optimize() -> None:
    import litdata as ld

    ld.optimize(fn=one, inputs=images(), output_dir=str(SCRATCH / "stream" / "litdata"), chunk_bytes="4MB", num_workers=1)


def throughput(batches: Iterator[Any]) -> dict[str, float]:
    """samples/s from the first batch on; seconds to that one."""
    since = time.perf_counter()
    assert next(batches).shape[0] == BATCH
    begun, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
    return {"samples_per_second": count / (time.perf_counter() - begun), "first_batch": begun - since}


def first_batch(folder: Path, share_done: float) -> dict[str, float]:
    """Seconds from opening the dataset to the first batch at a place of the first epoch, imports aside."""
    import cv2  # noqa: F401
    import torch  # noqa: F401

    from skinsynth.data import dataset, order, stream  # noqa: F401

    count = json.loads((folder / "manifest.json").read_text())["count"]
    since = time.perf_counter()
    batches = ours(folder, int(share_done * count) // BATCH)
    next(batches)
    return {"seconds": time.perf_counter() - since}


def main() -> None:
    folder = prepare()
    sides = {OURS: ("ours", "ours"), PLAIN: ("plain", "ours"), STOCK: ("stock", "ours"), **({LIT: ("litdata", "litdata")} if have_litdata() else {})}

    def measure(side: str) -> float:
        what, where = sides[side]
        return float(in_process("benchmarks.stream", what, folder / where, env=_with_litdata() if side == LIT else None)["samples_per_second"])

    rounds = alternate({side: partial(measure, side) for side in sides}, rounds=7)
    count = json.loads((folder / "ours" / "manifest.json").read_text())["count"]
    report("stream", rounds, OURS, PLAIN, "samples/s",
           f"{count} JPEGs of 256 px, {EPOCHS} epochs, shuffled, decoded to uint8, batches of {BATCH}, {WORKERS} workers (ours: threads; the others: "
           "processes); ours with checksums checked and exact resume; each side in a process of its own, from its first batch on", litdata=LITDATA[0])
    starts = alternate({f"at {int(done * 100)} %": partial(_start, folder / "ours", done) for done in (0.0, 0.9)})
    report("resume", starts, "at 90 %", "at 0 %", "s", "seconds from opening the dataset to the first batch, at 90 % and at 0 % of an epoch",
           higher=False)


def _start(folder: Path, done: float) -> float:
    return float(in_process("benchmarks.stream", "first", folder, done)["seconds"])


if __name__ == "__main__":
    side, *rest = sys.argv[1:]
    if side == "optimize":
        optimize()
        print("{}")
    elif side == "first":
        print(json.dumps(first_batch(Path(rest[0]), float(rest[1]))))
    else:
        print(json.dumps(throughput(READ[side](Path(rest[0])))))
