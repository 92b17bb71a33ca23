"""``python -m benchmarks [NAME ...]``: all of them without a name; results go to ``benchmarks/results/<name>-<device>.json``.

A benchmark that has a setting for a GPU (``GPU``) runs there where there is one; the others run on the CPU everywhere.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "__main__", "harness"))


def main() -> int:
    unknown = set(sys.argv[1:]) - set(NAMES)
    if unknown:
        print(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    modules = [importlib.import_module(f"benchmarks.{name}") for name in sys.argv[1:] or NAMES]
    for module in sorted(modules, key=lambda m: not hasattr(m, "GPU")):
        print(f"== {module.__name__.removeprefix('benchmarks.')}", flush=True)
        if not hasattr(module, "GPU"):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        module.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
