"""Runs ours and the peers in turns, so that what else the machine does meets all of them, and writes what came out.

A result is one JSON file: ``name``, ``device``, ``ours`` and ``peer`` (medians, in ``unit``), ``ratio`` (ours over the peer, above 1
is faster), ``spread`` (lowest and highest of each side), ``peers`` where there are several (``peer`` is the one named as required),
``versions``, ``commit``, ``measured`` (in words) and every single value under ``rounds``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from skinsynth.files import write_json
from skinsynth.run import code_version, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".bench"  # ignored by git: data sets and peers that are made or installed once
REAL = ROOT.parent / "shared" / "isic"
Measure = Callable[[], float]
ROUNDS: int | None = None  # of every benchmark, instead of its own number: ``--rounds``
failed: list[str] = []  # what was broken off, in words


@cache
def gpus() -> list[str]:
    """The GPUs' names. Asked of nvidia-smi: who forks must not have loaded torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.lower().splitlines() if done.returncode == 0 else []


def gpu() -> str | None:
    """The first GPU as a word ("h100"), None without one."""
    return next((word for name in gpus()[:1] for word in name.split() if any(letter.isdigit() for letter in word)), None)


def alternate(sides: dict[str, Measure], rounds: int = 5) -> dict[str, list[float]]:
    """Each side's values; every round runs all sides, and begins with another one. A side that fails is left out from then on, and of what is found:
    the others may have run for an hour."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS or rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in found:
                continue
            try:
                found[name].append(sides[name]())
            except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
                failed.append(f"{name}: {error}")
                del found[name]
                print(f"  round {number + 1}: {failed[-1]}", file=sys.stderr, flush=True)
            else:
                print(f"  round {number + 1}: {name}: {found[name][-1]:,.4g}", flush=True)
    return found


def together(work: Callable[..., None], calls: list[tuple[Any, ...]]) -> float:
    """Seconds that forked processes take side by side, from the moment that all are ready: each gets a barrier as the last argument, and passes
    it when it is ready and when it is done. Raises ``RuntimeError`` where one of them fails."""
    context = multiprocessing.get_context("fork")  # the parent must not have loaded torch
    barrier = context.Barrier(len(calls) + 1)
    processes = [context.Process(target=_or_break, args=(work, *call, barrier)) for call in calls]
    for process in processes:
        process.start()
    try:
        barrier.wait()
        since = time.perf_counter()
        barrier.wait()
        return time.perf_counter() - since
    except threading.BrokenBarrierError:
        raise RuntimeError(f"a process of {work.__module__}.{work.__qualname__} failed") from None
    finally:
        for process in processes:
            process.join()


def _or_break(work: Callable[..., None], *arguments: Any) -> None:
    """Whoever fails lets nobody wait for it."""
    try:
        work(*arguments)
    except BaseException:
        arguments[-1].abort()
        raise


def in_process(module: str, *arguments: object, env: dict[str, str] | None = None) -> Any:
    """What ``python -m MODULE ARGUMENTS`` prints as JSON in its last line: a side in a process of its own, free of the others' state."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def on_two_ranks(log: Path, module: str, *arguments: object) -> None:
    """``python -m MODULE ARGUMENTS`` twice, as torchrun would start it; what they print goes to the log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as out:
        ranks = [subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, stdout=out, stderr=out,
                                  env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    if [rank.wait() for rank in ranks] != [0, 0]:
        raise RuntimeError(log.read_text()[-2000:])


def report(name: str, rounds: dict[str, list[float]], ours: str, peer: str, unit: str, measured: str, higher: bool = True, device: str = "cpu",
           **more: Any) -> dict[str, Any]:
    """Writes and prints a result. ``higher``: more is better, as with samples/s; not so with seconds. Raises ``RuntimeError`` where ours or the
    peer failed."""
    if lacking := {ours, peer} - rounds.keys():
        raise RuntimeError(f"{name}: no result, since {' and '.join(sorted(lacking))} failed")
    median = {side: statistics.median(values) for side, values in rounds.items()}

    def ratio(side: str) -> float:
        return round(median[ours] / median[side] if higher else median[side] / median[ours], 3)

    result = {
        "name": name, "device": device, "cores": len(os.sched_getaffinity(0)), "ours": median[ours], "peer": median[peer], "peer_name": peer,
        "unit": unit, "ratio": ratio(peer), "spread": {side: [min(values), max(values)] for side, values in rounds.items()},
        "peers": [{"name": side, "value": median[side], "ratio": ratio(side)} for side in rounds if not side.startswith(ours.split(",")[0])],
        "measured": measured, "rounds": rounds, "versions": versions(), "commit": code_version(), **more}
    write_json(RESULTS / f"{name}-{device}.json", result)
    print(f"{name}: {ours} {median[ours]:,.4g} {unit}")
    for row in result["peers"]:
        print(f"  {row['name']}: {row['value']:,.4g} {unit}, ratio {row['ratio']:.2f}")
    return result


def medians(rows: list[dict[str, Any]], *names: str) -> dict[str, float]:
    """Of lines of ``metrics.jsonl``; without what was not measured."""
    return {name: statistics.median(row[name] for row in rows) for name in names if rows[0][name] is not None}


def images(count: int = 2150, size: int = 256) -> list[tuple[str, bytes]]:
    """(key, JPEG) of real lesions of ISIC 2017 (256 px) where they are, else of drawn ones."""
    folder = REAL / "isic2017" / "images"
    if not folder.is_dir():
        from skinsynth.data.phantom import write_dataset

        folder = SCRATCH / f"drawn-{size}" / "images"
        if not folder.is_dir():
            write_dataset(folder.parent, images=min(count, 600), malignant=0.3, height=size, width=size)
    return [(path.stem, path.read_bytes()) for path in sorted(folder.glob("*.jpg"))[:count]]
