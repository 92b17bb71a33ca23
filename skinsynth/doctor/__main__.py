"""``python -m skinsynth.doctor CONFIG [KEY=VALUE]...``: the compute node's part by itself, also under srun or torchrun."""

from __future__ import annotations

import sys

from skinsynth import config as configs
from skinsynth.doctor.check import Check, failed
from skinsynth.doctor.node import node_checks
from skinsynth.errors import UserError


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m skinsynth.doctor CONFIG [KEY=VALUE]...", file=sys.stderr)
        return 2
    found: list[Check] = []
    try:
        for check in node_checks(configs.load(sys.argv[1], sys.argv[2:])):
            print(check, flush=True)
            found.append(check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(failed(found))


if __name__ == "__main__":
    sys.exit(main())
