"""Where a base model lies on this machine. No torch here: the launch asks before anything is submitted."""

from __future__ import annotations

from pathlib import Path

from skinsynth.errors import UserError
from skinsynth.models import tiny

REQUIRED = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json",
            "tokenizer": "tokenizer_config.json"}


def resolve_base(base: str) -> Path:
    """The local folder of a base model: ``builtin``, a diffusers folder, or a hub id that lies in the local cache.

    Nothing is downloaded: compute nodes have no internet.

    Raises:
        UserError: no such folder, not in the cache (with the command that fetches it), or a file is missing.
    """
    if base == "builtin":
        folder = tiny.WEIGHTS
    elif Path(base).is_dir():
        folder = Path(base)
    elif base.startswith((".", "/")) or base.count("/") != 1:
        raise UserError(f"model.base={base}: no such folder (give 'builtin', a diffusers folder or a hub id such as owner/name)")
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(base, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(f"model.base={base} is neither a folder here nor in the local Hugging Face cache; where there is internet, "
                            f"run: hf download {base}") from None
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises ``UserError`` with the list of what a diffusers Stable Diffusion folder lacks."""
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for part, config in REQUIRED.items():
        if not (folder / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif part in ("unet", "vae", "text_encoder") and not list((folder / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise UserError(f"base model {folder} is not complete: missing {', '.join(missing)} (expected a Stable Diffusion in diffusers "
                        "layout with safetensors weights)")
