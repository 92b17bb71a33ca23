"""The configuration of a run: typed dataclasses (``knobs``) <- YAML <- ``key=value``.

``load`` reads a YAML file and overrides into a ``Config``; ``dump`` writes the resolved form, which is what the
nodes read. Unknown keys, wrong types and impossible values are ``UserError``s that name the key. No torch here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skinsynth.errors import UserError
from skinsynth.knobs import (
    PROMPT_FIELDS,
    Arm,
    Classify,
    Cluster,
    Concept,
    Config,
    Finetune,
    Generate,
    GeneratedClass,
    Resources,
    phase_starts,
    proportion,
)

STAGES = ("prepare", "encode", "finetune", "generate", "screen", "classify", "report")
PATHS = ("metadata", "images", "duplicates", "instance_data_dir", "class_data_dir", "synthetic", "shards", "cache")  # of data
COMMAND_LINE = "command line"
FINITE, NOT_USED = "expected a finite number", "the configuration cannot be used:\n  "
NAME = re.compile(r"\w[\w.-]*")
CLUSTERS = Path(__file__).resolve().parent / "clusters"  # a link to configs/cluster, which a wheel has the files of


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies ``key=value`` overrides and checks every value.

    Raises:
        UserError: no such file, not YAML, unknown key (with the nearest known one), wrong type, value out of range.
    """
    path = Path(path)
    if path.is_dir():
        inside = f", such as {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise UserError(f"configuration {path} is a folder: give a YAML file{inside}")
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist (the shipped ones are in configs/)")
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # yaml's own errors have no common base that omegaconf exports
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected 'key: value' pairs at the top, found {type(raw).__name__}")
    base: Any = OmegaConf.structured(Config)
    for layer, where, anew in ((raw, str(path), ""), *((part, COMMAND_LINE, key) for key, part in _parts(overrides or []))):
        if anew and _make_room(base, anew.split("."), layer):
            continue
        if isinstance(layer, dict) and isinstance(layer.get("cluster"), str):  # another cluster, with nothing left of the one before
            base.cluster = OmegaConf.structured(Cluster())
        base = _merge(base, _cluster(_rename(layer, "class", "class_"), where), where)
    try:
        config: Config = OmegaConf.to_object(base)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${...} that stands for nothing, or something that must be given
        key = (error.full_key or "").replace("class_", "class")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    _expand(config)
    check(config)
    return config


def _expand(config: Config) -> None:
    """~ in paths: the shell expands none after an equals sign, and a folder of that name would be made."""
    for section, names in ((config, ("run",)), (config.data, PATHS)):
        for name in names:
            value = getattr(section, name)
            if value and value.startswith("~"):
                setattr(section, name, str(Path(value).expanduser()))


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the spelling that ``load`` reads."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    return OmegaConf.to_yaml(OmegaConf.create(_rename(plain, "class_", "class")))


def flat(config: Config) -> dict[str, Any]:
    """``{"finetune.steps": 100, ...}``: for comparing and for hashing."""
    plain = _rename(OmegaConf.to_container(OmegaConf.structured(config)), "class_", "class")
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found[prefix] = value

    walk("", plain)
    return found


def difference(mine: Config, theirs: Config, ignore: tuple[str, ...] = ("cluster.", "run")) -> list[str]:
    """Lines ``key: theirs -> mine`` for every key that differs; keys that change no result are left out."""
    new, old, unbound = flat(mine), flat(theirs), set(free_keys(Config()))
    keys = [k for k in sorted(new.keys() | old.keys()) if new.get(k) != old.get(k) and k not in unbound]
    return [f"{k}: {old.get(k, '(not set)')} -> {new.get(k, '(not set)')}" for k in keys if not k.startswith(ignore)]


def free_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The names of the knobs that are marked ``free``."""
    for f in fields(node):
        name = f"{prefix}.{f.name}".lstrip(".")
        if is_dataclass(getattr(node, f.name)):
            yield from free_keys(getattr(node, f.name), name)
        elif f.metadata.get("free"):
            yield name


def binding(section: Any) -> dict[str, Any]:
    """The knobs of a section that decide what comes out, as plain values: what a checkpoint of it must have been made with."""
    plain, unbound = asdict(section), set(free_keys(section))
    return {name: value for name, value in plain.items() if name not in unbound}


def needs(config: Config) -> dict[str, tuple[str, ...]]:
    """Node -> the nodes that must be done before it, in an order in which they may run. An arm without synthetic images needs only ``prepare``,
    as does generation straight from a published model; and synthetic images from elsewhere come in there."""
    found: dict[str, tuple[str, ...]] = {"prepare": ()}
    if config.generate.weights == "finetuned" and not config.data.synthetic:
        found |= {"encode": ("prepare",), "finetune": ("encode",)}
    if not config.data.synthetic:
        found["generate"] = (list(found)[-1],)
    before = [list(found)[-1]]
    if config.screen.features == "classifier" and config.real_arm is not None:  # it looks with that arm's eyes
        before.append(f"classify/{config.real_arm}")
        found[before[-1]] = ("prepare",)
    found["screen"] = tuple(before)
    for arm, wanted in config.classify.arms.items():
        found.setdefault(f"classify/{arm}", ("screen",) if "synthetic" in wanted.used else ("prepare",))
    return {**found, "report": tuple(node for node in found if node.split("/")[0] in ("screen", "classify"))}


def check(config: Config) -> None:
    """Ranges, choices and what must fit together. Raises ``UserError`` with every problem found."""
    problems = list(_check_fields("", config))
    if any(problem.endswith(FINITE) for problem in problems):  # what follows counts with them
        raise UserError(NOT_USED + "\n  ".join(problems))
    for name, concept in config.finetune.concepts.items():
        if not concept.instance_prompt:
            problems.append(f"finetune.concepts.{name}.instance_prompt is empty")
    problems += _check_names("generate.classes", config.generate.classes)
    problems += _check_names("classify.arms", config.classify.arms)
    if "/" in config.data.name or config.data.name in ("", ".", ".."):
        problems.append(f"data.name={config.data.name!r} cannot be the beginning of folders' names: leave '/' out (data.shards says where they lie)")
    problems += _check_generate(config.generate)
    problems += _check_arms(config.classify)
    for section, training in (("finetune", config.finetune), ("classify", config.classify)):
        if training.micro_batch and training.global_batch % training.micro_batch:
            problems.append(f"{section}.global_batch={training.global_batch} is no multiple of micro_batch={training.micro_batch}")
        if training.offload == "parameters" and training.zero != 3:
            problems.append(f"{section}.offload=parameters needs {section}.zero=3: only ZeRO-3 shards parameters")
        if training.offload == "optimizer" and not training.zero:
            problems.append(f"{section}.offload=optimizer needs {section}.zero=1, 2 or 3")
        if training.optimizer == "adamw8bit" and training.zero:
            problems.append(f"{section}.optimizer=adamw8bit needs {section}.zero=0: its packed states cannot be sharded")
        if training.optimizer == "adamw8bit" and training.ema_decay:
            problems.append(f"{section}.optimizer=adamw8bit keeps no moving average of the weights: leave {section}.ema_decay at 0, or take adamw")
        ranks = config.cluster.of(section)
        if 0 < ranks.gpus_per_node < ranks.tasks_per_node:
            problems.append(f"cluster.stages.{section} has tasks_per_node={ranks.tasks_per_node} and gpus_per_node={ranks.gpus_per_node}: each rank "
                            "of a training needs a GPU of its own")
    if config.screen.copy_least > config.screen.copy_most:
        problems.append(f"screen.copy_least={config.screen.copy_least} is above screen.copy_most={config.screen.copy_most}: the limit of copies lies "
                        "between them")
    if config.screen.max_kid_ratio is not None and config.screen.kid_subsets < 2:
        problems.append(f"screen.max_kid_ratio={config.screen.max_kid_ratio} needs screen.kid_subsets=2 or more: KID is judged by its spread over "
                        "them")
    side, own = config.classify.image_size or config.prepare.size, config.classify.model == "small" and config.classify.arms
    if own and side % config.classify.patch:
        problems.append(f"classify.patch={config.classify.patch} does not divide the image side of {side} pixels: choose another patch, or "
                        "classify.image_size")
    for stage in config.cluster.stages:
        if stage not in ("default", *STAGES):
            near = difflib.get_close_matches(stage, STAGES, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"cluster.stages.{stage}: there is no such stage, only {', '.join(STAGES)}{hint}")
    if problems:
        raise UserError(NOT_USED + "\n  ".join(problems))


def _check_names(where: str, names: Iterable[str]) -> Iterator[str]:
    """They become folders and words of shell lines."""
    for name in names:
        if not NAME.fullmatch(name):
            yield f"{where}: {name!r} cannot be a name: letters, digits, '_', '-' and '.' only, the first one a letter, a digit or '_'"


def _check_arms(c: Classify) -> Iterator[str]:
    for name, arm in c.arms.items():
        if arm.phases and arm.sources:
            yield f"classify.arms.{name} has both sources and phases: give one of them"
            continue
        starts = phase_starts(arm.parts, c.steps)
        for number, part in enumerate(arm.parts):
            where, given = f"classify.arms.{name}" + (f".phases[{number}]" if arm.phases else ""), part.sources
            if set(given) - {"real", "synthetic"} or not given or min(given.values()) < 0 or sum(given.values()) <= 0:
                yield f"{where}.sources is {given}: give 'real' and 'synthetic' positive weights"
            elif not all(proportion([weight for weight in given.values() if weight > 0])):
                yield f"{where}.sources is {given}: a source of less than a thousandth would never be drawn: leave it out, or raise its weight"
            if starts[number + 1] <= starts[number]:
                yield f"{where}.share={part.share} of classify.steps={c.steps} is no step at all, once rounded: raise one of them"
    if len(set(c.seeds)) < len(c.seeds) or not all(0 <= seed < 2**31 for seed in c.seeds):
        yield f"classify.seeds is {c.seeds}: give different numbers from 0 to 2147483647"
    if c.hidden_size % c.heads:
        yield f"classify.hidden_size={c.hidden_size} is no multiple of heads={c.heads}"


def _check_generate(g: Generate) -> Iterator[str]:
    for name, wanted in g.classes.items():
        if wanted.count and not wanted.prompts:
            yield f"generate.classes.{name}.prompts is empty: give at least one prompt"
        for prompt in wanted.prompts:
            try:
                unknown = [field for _, field, _, _ in Formatter().parse(prompt) if field is not None and field not in PROMPT_FIELDS]
            except ValueError as error:
                yield f"generate.classes.{name}.prompts: '{prompt}': {error}"
                continue
            if unknown:
                yield f"generate.classes.{name}.prompts: there is no {{{unknown[0]}}}, only {', '.join(f'{{{f}}}' for f in PROMPT_FIELDS)}"
    if g.method != "text-to-image" and int(g.steps * g.strength) < 1:
        yield f"generate.strength={g.strength} of generate.steps={g.steps} is no step at all: raise one of them"


def _check_fields(prefix: str, node: Any) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _check_fields(f"{prefix}.{key}", value)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{prefix}.{key} is {value}, {FINITE}"
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from _check_fields(f"{prefix}[{number}]", value)
    if not is_dataclass(node):
        return
    for f in fields(node):
        name, value = f"{prefix}.{f.name}".lstrip("."), getattr(node, f.name)
        choices, span = f.metadata.get("choices"), f.metadata.get("range")
        if choices and value not in choices:
            words = [str(choice) for choice in choices]
            near = difflib.get_close_matches(str(value), words, 1)
            yield f"{name} is '{value}', expected one of {', '.join(words)}" + (f" (did you mean {near[0]}?)" if near else "")
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}, {FINITE}"
        if span and value is not None and not span[0] <= value <= span[1]:
            yield f"{name} is {value}, expected {span[0]} to {span[1]}" if span[1] < math.inf else f"{name} is {value}, expected {span[0]} or more"
        yield from _check_fields(name, value)


def _parts(overrides: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, layer) of each override that says anew what a whole key holds (``classify.arms={...}``, ``classify.arms.hybrid=null``), and ("", layer)
    of the others between them, together. Clusters come first: cluster=slurm cluster.account=x is the file and then the key.

    Raises:
        UserError: one that is not of the form key=value.
    """
    together: list[str] = []
    for item in sorted(map(_dot, overrides), key=lambda item: not item.startswith("cluster=")):
        try:
            value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        except Exception as error:  # omegaconf's and yaml's own
            raise UserError(f"{COMMAND_LINE}: '{item}' cannot be read as YAML ({_first_line(error)}): put a text with brackets, colons or commas in "
                            """quotes, for example 'generate.classes.benign.prompts=["a {diagnosis}"]'""") from None
        key, layer = item.partition("=")[0].strip(), value
        for _ in key.split("."):
            value = next(iter(value.values()))
        if isinstance(value, dict) or value is None or key == "cluster":
            yield from _together(together)
            yield key, layer
            together = []
        else:
            together.append(item)
    yield from _together(together)


def _together(items: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if items:
        yield "", OmegaConf.to_container(OmegaConf.from_dotlist(items))  # type: ignore[misc]


def _make_room(base: Any, path: list[str], layer: Any) -> bool:
    """Empties what a mapping says anew: of names that the user chose (arms, concepts, classes, stages, sources, filters) none of the old ones stays,
    while a section's other keys do. A name that is null is taken out; True where nothing is left to merge then."""
    parent, value, path = base, _rename(layer, "class", "class_"), ["class_" if name == "class" else name for name in path]
    for name in path[:-1]:
        parent, value = parent.get(name, {}), next(iter(value.values()))
    value = next(iter(value.values()))
    if not OmegaConf.is_dict(parent):
        return False
    if value is None and _names(parent) and parent._metadata.element_type is not Any:
        if path[-1] not in parent:
            raise UserError(f"{COMMAND_LINE}: {'.'.join(path)}=null takes out what is not there; there are {', '.join(map(str, parent)) or 'none'}")
        parent.pop(path[-1])
        return True
    _empty(parent, path[-1], value)
    return False


def _empty(parent: Any, name: str, value: Any) -> None:
    if not isinstance(value, dict) or name not in parent or not OmegaConf.is_dict(parent[name]):
        return
    if _names(parent):
        parent.pop(name)
    elif _names(parent[name]):
        OmegaConf.update(parent, name, {}, merge=False)
    else:
        for inner, its in value.items():
            _empty(parent[name], inner, its)


def _names(node: Any) -> bool:
    """Whether the keys are the user's own names, and not a section's."""
    return OmegaConf.get_type(node) is dict


def _merge(base: Any, layer: dict[str, Any], where: str) -> Any:
    for key, value in layer.items():
        section = getattr(Config(), str(key), None)
        if is_dataclass(section) and not isinstance(value, dict):
            raise UserError(f"{where}: {key} is a section, of which keys can be set, not {'null' if value is None else repr(value)}: give one of "
                            f"them ({key}.{fields(section)[0].name}), or leave it out")
    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        key = (error.full_key or "").replace("class_", "class")
        if type(error).__name__ == "ConfigKeyError":
            raise UserError(f"{where}: unknown key '{key}'{_suggest(key)}") from None
        if "not Optional" in str(error) or "Incompatible value 'None'" in str(error):
            raise UserError(f"{where}: {key} cannot be null: give it a value, or leave it out") from None
        raise UserError(f"{where}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    except TypeError as error:  # a list's item by its number, a list for a mapping
        raise UserError(f"{where}: a value is of another kind than its key's ({_first_line(error)}): give lists as a whole, for example "
                        "classify.seeds=[0,1,2], and sections as sections") from None


def _suggest(key: str) -> str:
    """The nearest known key, looked for at the same place first and then everywhere."""
    example = Config(finetune=Finetune(concepts={"NAME": Concept()}), classify=Classify(arms={"NAME": Arm()}),
                     generate=Generate(classes={"NAME": GeneratedClass()}), cluster=Cluster(stages={"NAME": Resources()}))
    known = list(flat(example))
    parents = {k[:i] for k in known for i, letter in enumerate(k) if letter == "."}
    near = difflib.get_close_matches(key, sorted({*known, *parents}), 1, 0.6)
    if not near:
        near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    return f"; did you mean '{near[0]}'?" if near else "; 'skinsynth config CONFIG' lists all keys"


def _dot(item: str) -> str:
    if "=" not in item:
        raise UserError(f"'{item}' is not of the form key=value (for example finetune.steps=200)")
    if re.fullmatch(r"[^=]*=\s*(0\d+|\d+(:[0-5]?\d)+)\s*", item):
        raise UserError(f"'{item}': YAML would take this for a number to the base of 8 or 60. Give minutes as a number; a word goes in quotes, for "
                        f"""example '{item.replace("=", '="', 1)}"'""")
    return item


def _cluster(layer: Any, where: str) -> Any:
    """``cluster: local`` stands for the content of configs/cluster/local.yaml."""
    name = layer.get("cluster") if isinstance(layer, dict) else None
    if not isinstance(name, str):
        return layer
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CLUSTERS.glob("*.yaml"))
        raise UserError(f"{where}: cluster={name}: no such cluster; there are {', '.join(known)}, or give the path of a YAML file")
    return {**layer, "cluster": OmegaConf.to_container(OmegaConf.load(path))}


def _rename(node: Any, old: str, new: str) -> Any:
    """``class`` is the field's word but a Python keyword, so the dataclass spells it ``class_``."""
    if isinstance(node, dict):
        return {(new if key == old else key): _rename(value, old, new) for key, value in node.items()}
    return [_rename(value, old, new) for value in node] if isinstance(node, list) else node


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
