"""Writing shards from ready JPEG bytes: ours, with checksums, index and fsync, beside ``webdataset.ShardWriter``, one and two writers.

``python -m benchmarks.shard_writing SIDE WRITERS`` is one measurement.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

from benchmarks.harness import SCRATCH, alternate, images, in_process, report, together

SHARD, PASSES = 1000, 10  # samples in a shard; how often each writer writes its images
SIDES = {"skinsynth, 2 writers": ("ours", 2), "webdataset, 2 writers": ("webdataset", 2), "skinsynth, 1 writer": ("ours", 1),
         "webdataset, 1 writer": ("webdataset", 1)}


def ours(folder: Path, samples: list[tuple[str, bytes]]) -> None:
    from skinsynth.data.shards import ShardWriter

    for unit in range(-(-len(samples) // SHARD)):
        with ShardWriter(folder, unit) as shard:
            for key, jpeg in samples[unit * SHARD:(unit + 1) * SHARD]:
                shard.add(key, {"jpg": jpeg}, target=0)


def webdataset(folder: Path, samples: list[tuple[str, bytes]]) -> None:
    import webdataset as wds

    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD, maxsize=1e12, verbose=0) as writer:
        for key, jpeg in samples:
            writer.write({"__key__": key, "jpg": jpeg})


def work(side: str, folder: Path, number: int, samples: list[tuple[str, bytes]], barrier: Barrier) -> None:
    __import__("skinsynth.data.shards" if side == "ours" else "webdataset")
    barrier.wait()
    {"ours": ours, "webdataset": webdataset}[side](folder / str(number), samples)
    barrier.wait()


def measure(side: str, writers: int) -> float:
    """samples/s of all writers together, each a process of its own, from the moment that all are ready."""
    folder = SCRATCH / "writing"
    shutil.rmtree(folder, ignore_errors=True)
    samples = [(f"{key}-{turn}", jpeg) for turn in range(PASSES) for key, jpeg in images()]
    seconds = together(work, [(side, folder, n, samples[n::writers]) for n in range(writers)])
    shutil.rmtree(folder)
    return len(samples) / seconds


def main() -> None:
    def run(side: str) -> float:
        return float(in_process("benchmarks.shard_writing", *SIDES[side]))

    rounds = alternate({side: partial(run, side) for side in SIDES})
    report("shard-writing", rounds, "skinsynth, 2 writers", "webdataset, 2 writers", "samples/s",
           f"{len(images()) * PASSES} ready JPEGs to tars of {SHARD}, all writers together; ours with sha256 and CRC-32, index, fsync and rename")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
