"""What a process sets before torch comes."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import pytest
from conftest import ROOT

from skinsynth import cpu

FAULTS = """
import resource, sys
from skinsynth import cpu
if "kept" in sys.argv:
    cpu.before_torch(1)
def make():
    for megabytes in (40, 60, 50):
        b"x" * (megabytes * 2**20)
make()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In pages that the kernel had to hand out for the same arrays the second time."""
    assert faults() > 10_000
    assert faults("kept") < 1_000


@pytest.mark.parametrize(("told", "threads"), [("3", 3), ("4,2", 4), ("", None), ("0", None), ("many", None)])
def test_threads_are_those_that_the_job_was_given(monkeypatch: pytest.MonkeyPatch, told: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert cpu.threads() == (threads or len(os.sched_getaffinity(0)))


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_keep_freed_memory", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    cpu.before_torch(2)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["GOMP_SPINCOUNT"] == "20000"


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_again_after_the_imports() -> None:
    """Also what was there before, such as the networks of the seed that was trained before this one."""
    old = weakref.ref(Node())
    with cpu.importing():
        new = weakref.ref(Node())
    gc.collect()
    assert (old(), new()) == (None, None)


def test_the_collector_is_as_it_was_after_the_imports() -> None:
    assert gc.isenabled()
    with cpu.importing(), cpu.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), cpu.importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with cpu.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
