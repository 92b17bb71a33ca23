"""torch.compile for the UNet. A job keeps what it makes in the run folder (``TORCHINDUCTOR_CACHE_DIR``, set before torch is imported)."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from skinsynth.errors import UserError


def compile_unet(unet: Any, device: torch.device) -> None:
    """In place, so that the names of the weights stay. The first step takes minutes, less where another process has left what it made.

    Raises:
        UserError: no compiler, which Inductor calls (on a CPU a C++ one).
    """
    check(device)
    unet.compile(dynamic=False)


def check(device: torch.device) -> str:
    """The compiler's path. Raises as ``compile_unet`` does."""
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    wanted = os.environ.get(variable)
    found = next((path for name in ((wanted,) if wanted else names) if (path := shutil.which(name))), None)
    if found is None:
        raise UserError(f"model.compile=true needs a compiler on the node ({wanted or ' or '.join(names)} is not on the PATH): load its module in "
                        "slurm/env.sh, or leave model.compile out")
    return found
