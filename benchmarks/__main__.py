"""``python -m benchmarks [--rounds N] [NAME ...]``: all of them without a name; results go to ``benchmarks/results/<name>-<device>.json``.

``--rounds 1`` is for where time is short: each side runs once. What fails is told at the end, and the others run all the same.
A benchmark that has a setting for a GPU (``GPU``) runs there where there is one; the others run on the CPU everywhere.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

from benchmarks import harness

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "__main__", "harness"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, help="of each benchmark, instead of its own number")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    harness.ROUNDS = asked.rounds
    modules = [importlib.import_module(f"benchmarks.{name}") for name in asked.names or NAMES]
    for module in sorted(modules, key=lambda m: not hasattr(m, "GPU")):
        print(f"== {module.__name__.removeprefix('benchmarks.')}", flush=True)
        if not hasattr(module, "GPU"):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            module.main()
        except Exception as error:
            traceback.print_exc()
            harness.failed.append(f"{module.__name__}: {error}")
    for words in harness.failed:
        print(f"failed: {words}", file=sys.stderr)
    return int(bool(harness.failed))


if __name__ == "__main__":
    sys.exit(main())
