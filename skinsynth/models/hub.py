"""Where the models lie on this machine, and how they get there. No torch here: the launch asks before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

from skinsynth.config import Config
from skinsynth.errors import UserError
from skinsynth.models import tiny

REQUIRED = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json",
            "tokenizer": "tokenizer_config.json"}
NETWORKS = ("unet", "vae", "text_encoder")  # those of the parts that have weights


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
    elif not _is_hub_id(base):
        raise UserError(f"model.base={base}: no such folder (give 'builtin', a diffusers folder or a hub id such as owner/name)")
    else:
        folder = _cached("model.base", base)
    check_folder(folder)
    return folder


def resolve_classifier(model: str) -> Path | None:
    """The local folder of a pretrained classifier; None for ``small``, which is built. Nothing is downloaded.

    Raises:
        UserError: as ``resolve_base``.
    """
    if model == "small":
        return None
    if not Path(model).is_dir() and not _is_hub_id(model):
        raise UserError(f"classify.model={model}: no such folder (give 'small', a transformers folder or a hub id such as owner/name)")
    folder = Path(model) if Path(model).is_dir() else _cached("classify.model", model)
    missing = [name for name in ("config.json", "*.safetensors") if not list(folder.glob(name))]
    if missing:
        raise UserError(f"classifier {folder} is not complete: missing {', '.join(missing)} (expected a transformers layout with "
                        "safetensors weights)")
    return folder


def _is_hub_id(name: str) -> bool:
    return not name.startswith((".", "/")) and name.count("/") == 1


def _cached(key: str, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise UserError(f"{key}={name} is neither a folder here nor a hub id: {error}") from None
    except LocalEntryNotFoundError as error:
        # a snapshot without all files of its repository is what `pull` makes; whether a needed one is missing is checked by our own list
        partial = getattr(error, "snapshot_path", None)
        if partial:
            return Path(partial)
        raise UserError(f"{key}={name} is neither a folder here nor in the local Hugging Face cache; where there is internet, "
                        f"run: skinsynth pull CONFIG (or: hf download {name})") from None


def check_folder(folder: Path) -> None:
    """Raises ``UserError`` with the list of what a diffusers Stable Diffusion folder lacks."""
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for part, config in REQUIRED.items():
        if not (folder / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif part in NETWORKS and not list((folder / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise UserError(f"base model {folder} is not complete: missing {', '.join(missing)} (expected a Stable Diffusion in diffusers "
                        "layout with safetensors weights)")


def variant(folder: Path) -> str | None:
    """``fp16`` where the folder holds half-precision weights and no others, as diffusers wants to be told."""
    weights = [path.name for path in (folder / "unet").glob("*.safetensors")]
    return "fp16" if weights and all(".fp16." in name for name in weights) else None


def parameters(folder: Path) -> int:
    """How many numbers the ``.safetensors`` files of a folder hold, by their headers alone."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


# ---- fetching, where there is internet ----

def pull(cfg: Config, say: Callable[[str], None]) -> None:
    """Fetches the models of a configuration that come from the hub and are not in the local cache yet.

    Raises:
        UserError: the hub cannot be reached, refuses (in its own words), or has no such files.
    """
    for key, name, find, choose in (("model.base", cfg.model.base, resolve_base, base_files),
                                    ("classify.model", cfg.classify.model, resolve_classifier, classifier_files)):
        if name in ("builtin", "small"):
            say(f"{key}={name}: nothing to fetch")
        elif not _is_hub_id(name) or Path(name).is_dir():
            say(f"{key}={name}: a folder here, {_size(find(name))}")
        else:
            _pull_one(key, name, find, choose, say)


def _pull_one(key: str, name: str, find: Callable[[str], Path | None], choose: Callable[[list[str]], list[str]], say: Callable[[str], None]) -> None:
    try:
        say(f"{key}={name}: there already, {_size(find(name))}")
        return
    except UserError:
        say(f"{key}={name}: fetching")
    _fetch(key, name, choose)
    say(f"{key}={name}: fetched, {_size(find(name))}")


def _fetch(key: str, name: str, choose: Callable[[list[str]], list[str]]) -> None:
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name)
        wanted = choose([file.rfilename for file in info.siblings or []])
        if wanted:
            snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # the hub's errors, the network's, the proxy's and the disk's have no common base
        words = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{key}={name} cannot be fetched; the hub's client says: {words or type(error).__name__}. Run this where there is internet "
                        "(a login node); a model with a licence to accept needs 'hf auth login' first") from None
    if not any(file.endswith(".safetensors") for file in wanted):
        raise UserError(f"{key}={name}: its repository has no safetensors weights in the expected places; choose a model that has")


def base_files(files: list[str]) -> list[str]:
    """Of a diffusers repository's files those that are read: no checkpoints of other tools, no safety checker."""
    found = [f for f in files if f == "model_index.json"]
    for part in REQUIRED:
        inside = [f for f in files if f.startswith(f"{part}/") and f.count("/") == 1]
        found += [f for f in inside if f.endswith((".json", ".txt"))]
        found += _weights(inside) if part in NETWORKS else []
    return found


def classifier_files(files: list[str]) -> list[str]:
    """Of a transformers repository's files those that are read."""
    top = [f for f in files if "/" not in f]
    return [f for f in top if f.endswith((".json", ".txt"))] + _weights(top)


def _weights(files: list[str]) -> list[str]:
    """Full precision; half precision where there is nothing else."""
    weights = [f for f in files if f.endswith(".safetensors") and "non_ema" not in f]
    return [f for f in weights if ".fp16." not in f] or weights


def _size(folder: Path | None) -> str:
    files = [p for p in folder.rglob("*") if p.is_file()] if folder else []
    return f"{sum(p.stat().st_size for p in files) / 1e9:.2f} GB in {folder}"
