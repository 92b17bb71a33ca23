from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from skinsynth.data import cache
from skinsynth.data.cache import Cache, open_dataset
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.export import export, show
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.data.stream import Source
from skinsynth.data.verify import verify
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import birth, read_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task
from skinsynth.stages.prepare import SPLITS, prepare
from skinsynth.withdraw import find, withdraw


@pytest.fixture(scope="module")
def there(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared datasets, ``set-{train,val,test}``."""
    folder = tmp_path_factory.mktemp("there")
    go(config(folder, metadata=str(drawn / "metadata.csv"), images=str(drawn / "images"), shards=str(folder)))
    return folder


def config(here: Path, **data: object) -> Config:
    cfg = Config(run=str(here / "run"))
    cfg.prepare.size, cfg.prepare.shard_size = 32, 16
    cfg.data.name, cfg.data.shards = "set", str(here / "shards")
    for key, value in data.items():
        setattr(cfg.data, key, value)
    return cfg


def go(cfg: Config) -> RunDir:
    run = RunDir(Path(cfg.run))
    prepare(cfg, run, Task())
    return run


class Server(ThreadingHTTPServer):
    """Serves a folder; counts what is asked for, and answers the next requests with ``trouble`` (a status, or 'cut')."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: Counter[str] = Counter()
        self.trouble: list[int | str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
        elif trouble:
            self.send_error(int(trouble))
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves a copy, which a test may damage."""
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    shutil.copytree(there, tmp_path / "there")
    with Server(tmp_path / "there") as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def content(folder: Path) -> list[bytes]:
    data = Dataset.open(folder)
    return [data.read(i, name) for i in range(len(data)) for name in ("jpg", "json")]


@pytest.mark.parametrize("kind", ["http", "pipe", "folder"])
def test_what_lies_elsewhere_is_read_as_if_it_were_here(there: Path, server: Server, tmp_path: Path, kind: str) -> None:
    remote = {"http": server.url + "/", "pipe": f"pipe:cat {there}/{{name}}", "folder": str(there)}[kind]
    cfg = config(tmp_path, remote=remote)
    run = go(cfg)
    assert run.is_done("prepare")
    assert run.metrics("prepare") == RunDir(there / "run").metrics("prepare")
    assert list((tmp_path / "shards").rglob("*.tar")) == [], "no tar is brought before it is read"
    for split in SPLITS:
        data = open_dataset(cfg, run, split)
        assert data.verify() == []
        assert [data.read(i, name) for i in range(len(data)) for name in ("jpg", "json")] == content(there / f"set-{split}")
        assert content(run.dataset(cfg, split)) == content(there / f"set-{split}"), "now it is whole here"
        assert (run.dataset(cfg, split) / "manifest.json").read_bytes() == (there / f"set-{split}" / "manifest.json").read_bytes()
    go(cfg)  # again: nothing to do
    assert all(count == 1 for path, count in server.asked.items() if not path.endswith(("manifest.json", "withdrawn.json")))


def test_only_the_shard_that_is_read_is_brought_and_into_the_cache(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url, cache=str(tmp_path / "cache"))
    run = go(cfg)
    data = open_dataset(cfg, run, "train")
    data.image(next(data.shard_samples(1)))
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.tar")) if "there" not in p.parts] == ["cache/set-train/00001.tar"]


def test_threads_and_processes_bring_a_shard_once(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache import *
cfg = config(Path({str(tmp_path)!r}), remote={server.url!r})
data = open_dataset(cfg, RunDir(Path(cfg.run)), "train")
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as pool:
    print(sum(len(d) for d in pool.map(lambda i: data.read(i, "jpg"), range(len(data)))))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.stdout.readline() for p in processes if p.stdout] == ["ready\n"] * 3
    said = [p.communicate("go\n", timeout=60)[0] for p in processes]
    assert len(set(said)) == 1
    assert int(said[0]) == sum(len(d) for d in content(run.dataset(cfg, "train"))[::2])
    shards = len(Dataset.open(run.dataset(cfg, "train")).manifest["shards"])
    assert {path: n for path, n in server.asked.items() if path.endswith(".tar")} == {f"/set-train/{i:05d}.tar": 1 for i in range(shards)}
    assert [p.name for p in run.dataset(cfg, "train").iterdir() if p.suffix == ".tmp"] == []


def test_the_least_recently_opened_make_room_and_nothing_else_does(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    manifest = json.loads((run.dataset(cfg, "train") / "manifest.json").read_text())
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    cfg.data.cache_gb = (sum(sizes[:3]) + 10) / 1e9
    other = tmp_path / "shards" / "run-latents" / "00000.tar"  # made here, to be had nowhere else
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(sum(sizes)))
    store = Cache(cfg.data, "set-train")

    def here() -> list[str]:
        return sorted(p.stem for p in run.dataset(cfg, "train").glob("*.tar"))

    for age, number in enumerate((0, 1, 2)):
        store.open(manifest["shards"][number])
        os.utime(run.dataset(cfg, "train") / f"0000{number}.tar", (age, age))
    assert here() == ["00000", "00001", "00002"]
    kept = store.open(manifest["shards"][0])  # used again, so 1 is now the oldest
    held = store.open(manifest["shards"][1])
    os.utime(run.dataset(cfg, "train") / "00001.tar", (1, 1))
    store.open(manifest["shards"][3])
    assert "00001" not in here()
    assert {"00000", "00003"} <= set(here())
    assert os.pread(held.number, sizes[1], 0) == (tmp_path / "there/set-train/00001.tar").read_bytes(), "a tar that is open stays readable"
    assert os.fstat(kept.number).st_size == sizes[0]
    assert other.exists()


def test_reading_goes_on_with_room_for_one_shard(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url, cache_gb=0.000001)
    run = go(cfg)
    data = [open_dataset(cfg, run, "train") for _ in range(2)]  # two ranks that take each other's room
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: [d.read(i, "jpg") for d in data], range(len(data[0]))))
    assert found == [[jpg] * 2 for jpg in content(tmp_path / "there/set-train")[::2]]


@pytest.mark.parametrize("trouble", [[503], [500, 503], ["cut"], [429, "cut"]])
def test_a_servers_trouble_is_tried_again(server: Server, tmp_path: Path, trouble: list[int | str]) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    server.trouble = trouble
    assert open_dataset(cfg, run, "train").image(0).shape == (32, 32, 3)
    assert server.trouble == []


def test_a_server_that_stays_in_trouble_is_named(server: Server, tmp_path: Path) -> None:
    server.trouble = [503] * 3
    with pytest.raises(UserError, match=rf"{server.url}/set-train/manifest.json could not be fetched in 3 tries \(503 Service Unavailable\)"):
        go(config(tmp_path, remote=server.url))


def test_what_is_not_there_is_named_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{server.url}/other-train/manifest.json cannot be fetched \(404 "):
        go(config(tmp_path, remote=server.url, name="other"))
    assert server.asked["/other-train/manifest.json"] == 1
    with pytest.raises(UserError, match=r"the command 'cat /nowhere/set-train/manifest.json' ended with 1, 3 times: cat: .*No such file"):
        go(config(tmp_path, remote="pipe:cat /nowhere/{name}"))
    with pytest.raises(UserError, match=r"/nowhere/set-train/manifest.json does not exist"):
        go(config(tmp_path, remote="/nowhere"))
    with pytest.raises(UserError, match=r"must hold \{name\}"):
        go(config(tmp_path, remote="pipe:true"))
    with pytest.raises(UserError, match="pipe:aws s3 cp"):
        go(config(tmp_path, remote="s3://bucket/shards"))


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    with Server(tmp_path) as gone:
        url = gone.url
    with pytest.raises(UserError, match=rf"{url}/set-train/manifest.json could not be fetched in 3 tries .*refused"):
        go(config(tmp_path, remote=url))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_tar_that_is_not_the_manifests_makes_its_samples_bad(server: Server, tmp_path: Path, damage: str) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    path = tmp_path / "there/set-train/00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] if damage == "truncated" else bytes([*whole[:1500], whole[1500] ^ 1, *whole[1501:]]))
    data = open_dataset(cfg, run, "train", tolerate=True)
    first, second = (next(data.shard_samples(n)) for n in (1, 2))
    said = "has 2000 bytes, not" if damage == "truncated" else "has another sha256"
    with pytest.raises(BadSample, match=rf"00001.tar cannot be read \(as fetched the tar {said}"):
        data.image(first)
    source = Source(data, range(len(data)), "skip")
    assert source.read(first, lambda _, number: data.image(number) is not None and number) == second
    assert [bad.key for bad in source.bad] == data.keys[first:second]
    assert server.asked["/set-train/00001.tar"] == 2, "once more, and then no more"
    assert not (run.dataset(cfg, "train") / "00001.tar").exists()


def test_a_fetch_that_was_killed_leaves_nothing_that_looks_finished(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    folder = run.dataset(cfg, "train")
    (folder / f".00000.tar.1.{platform.node()}-999999999-1.tmp").write_bytes(b"half")
    elsewhere = folder / ".00000.tar.1.elsewhere-77-1700000000.tmp"  # on another host nobody can tell, until nothing is written for long
    elsewhere.write_bytes(b"half")
    (folder / "00001.tar").write_bytes(b"cut off by a full disk")
    data = open_dataset(cfg, run, "train")
    assert [data.image(next(data.shard_samples(n))).shape for n in (0, 1)] == [(32, 32, 3)] * 2
    assert list(folder.glob(".*.tmp")) == [elsewhere]
    os.utime(elsewhere, (1, 1))
    (folder / "00000.tar").unlink()
    open_dataset(cfg, run, "train").image(0)
    assert list(folder.glob(".*.tmp")) == []


def test_where_the_file_system_has_no_locks_each_brings_its_own(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cfg = config(tmp_path, remote=f"pipe:cat {there}/{{name}}; case {{name}} in *.tar) sleep 0.3;; esac")
    run = go(cfg)
    data = [open_dataset(cfg, run, "train") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        begun = [(pool.submit(each.read, 0, "jpg"), time.sleep(0.1))[0] for each in data]
        assert len({one.result() for one in begun}) == 1


def test_a_command_that_gives_nothing_is_stopped_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SILENT", 0.5)
    with pytest.raises(UserError, match=r"gave nothing for 0\.5 s and was stopped: still waiting"):
        go(config(tmp_path, remote=f"pipe:echo still waiting >&2; sleep 77 & echo $! > {tmp_path}/pid; wait # {{name}}"))
    started = int((tmp_path / "pid").read_text())
    since = time.monotonic()
    while birth(started) and time.monotonic() - since < 10:  # a kill is not waited for but of the command itself
        time.sleep(0.01)
    assert birth(started) is None


def test_others_wait_while_one_brings_it(server: Server, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=server.url)
    run = go(cfg)
    data = open_dataset(cfg, run, "train")
    with open(run.dataset(cfg, "train") / ".00000.tar.lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(data.read, 0, "jpg")
        shutil.copy(tmp_path / "there/set-train/00000.tar", run.dataset(cfg, "train") / "00000.tar")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(30) == content(tmp_path / "there/set-train")[0]
    assert server.asked["/set-train/00000.tar"] == 0


@pytest.mark.parametrize("name", ["../../outside.tar", "/etc/passwd", "pipe:touch pwned", "00000.tar; touch pwned"])
def test_names_from_a_manifest_run_nothing_and_leave_no_folder(server: Server, tmp_path: Path, name: str) -> None:
    path = tmp_path / "there/set-train/manifest.json"
    path.write_text(path.read_text().replace('"00000.tar"', json.dumps(name)))
    for remote in (server.url, f"pipe:cat {tmp_path}/there/{{name}}"):
        with pytest.raises(UserError, match="cannot be used as a name"):
            go(config(tmp_path, remote=remote))
    assert list(Path.cwd().glob("pwned")) == []


@pytest.mark.parametrize(("change", "said"), [
    (lambda m: m | {"size": 64}, "images of 64 pixels, the configuration's are of 32: set prepare.size=64"),
    (lambda m: m | {"kind": "synthetic"}, "is no manifest of prepared images"),
    (lambda m: {"count": 3}, "is no manifest of prepared images"),
    (lambda m: [], "is no manifest of prepared images"),
])
def test_what_is_no_index_of_such_images_is_refused(server: Server, tmp_path: Path, change: object, said: str) -> None:
    path = tmp_path / "there/set-train/manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        go(config(tmp_path, remote=server.url))


def test_a_dataset_of_that_name_that_is_another_is_refused(there: Path, tmp_path: Path, drawn: Path) -> None:
    mine = config(tmp_path, metadata=str(drawn / "metadata.csv"), images=str(drawn / "images"))
    mine.seed = 5
    go(mine)
    with pytest.raises(UserError, match=r"was made from another request:\n.*seed: 5 -> 0"):
        go(config(tmp_path, remote=str(there)))


# ---- who withdrew where the dataset lies ----

@pytest.mark.parametrize("kind", ["http", "pipe", "folder"])
def test_who_withdrew_there_is_withdrawn_here(server: Server, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of an index that was brought before, and where nothing was withdrawn a command's failure is told."""
    there = tmp_path / "there"
    remote = {"http": server.url, "pipe": f"pipe:cat {there}/{{name}}", "folder": str(there)}[kind]
    cfg = config(tmp_path, remote=remote)
    before = open_dataset(cfg, go(cfg), "train")
    assert ("whether anybody withdrew there is not known" in capsys.readouterr().out) == (kind == "pipe")
    patient = next(name for name in before.columns["patient"] if name)
    found = find(patient, there, tmp_path)
    withdraw(patient, found, there)
    gone = {key for one in found if one.folder == str(there / "set-train") for key in one.keys or ()}
    assert gone
    if kind != "folder":  # which is looked at again at every stage
        go(cfg)
    after = open_dataset(cfg, RunDir(tmp_path / "run"), "train")
    assert set(before.keys) - set(after.keys) == gone
    with pytest.raises(UserError, match=f"{len(gone)} samples of .*set-train were withdrawn while they were used"):
        before.check_withdrawn()
    later = config(tmp_path / "later", remote=remote)
    assert open_dataset(later, go(later), "train").keys == after.keys
    with ShardWriter(tmp_path / "shards/other-train", 0) as shard:  # of another hospital, which numbers its patients in the same way
        shard.add("a", {"jpg": b"x"}, target=0, group=patient, patient=patient, lesion=None)
    write_manifest(tmp_path / "shards/other-train", 1, kind="real")
    assert Dataset.open(tmp_path / "shards/other-train").keys == ["a"]


def test_a_datasets_own_mark_is_seen_where_its_home_has_none(there: Path, tmp_path: Path) -> None:
    shutil.copytree(there, tmp_path / "there")
    mark(tmp_path / "there/set-train", "IP", [Dataset.open(there / "set-train").keys[3]], "of theirs")
    cfg = config(tmp_path, remote=f"pipe:cat {tmp_path}/there/{{name}}")
    assert len(open_dataset(cfg, go(cfg), "train")) == len(Dataset.open(there / "set-train")) - 1


# ---- trouble on the way ----

def test_what_is_cut_off_on_the_way_is_neither_json_nor_a_bad_tar(server: Server, tmp_path: Path) -> None:
    server.trouble = ["cut", "cut"]
    cfg = config(tmp_path, remote=server.url)
    data = open_dataset(cfg, go(cfg), "train", tolerate=True)
    server.trouble = ["cut"] * 3
    with pytest.raises(UserError, match=r"could not be fetched in 3 tries \(cut off after 9 of 100000 bytes\)") as raised:
        data.image(0)
    assert not isinstance(raised.value, BadSample)
    assert data.image(0).shape == (32, 32, 3), "the tar was not to blame"


def test_a_command_that_fails_once_is_asked_again(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    script = tmp_path / "flaky.sh"
    script.write_text(f'head -c 100 {there}/$1; [ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; echo reset >&2; exit 1; }}; '
                      f'tail -c +101 {there}/$1\n')
    cfg = config(tmp_path, remote=f"pipe:sh {script} {{name}}")
    run = go(cfg)
    (tmp_path / "asked").unlink()
    data = open_dataset(cfg, run, "train")
    assert [data.read(0, "jpg")] == content(there / "set-train")[:1]


def test_a_copy_that_is_damaged_here_is_brought_again(server: Server, tmp_path: Path) -> None:
    """But once: where the remote's is damaged too, its samples are bad."""
    cfg = config(tmp_path, remote=server.url, cache=str(tmp_path / "cache"))
    run = go(cfg)
    data = open_dataset(cfg, run, "train")
    wanted, place = data.read(0, "jpg"), data.places[0][1]["jpg"][0]
    tar = tmp_path / "cache/set-train/00000.tar"
    flip(tar, place + 20)
    assert open_dataset(cfg, run, "train").read(0, "jpg") == wanted
    flip(tar, place + 20)
    flip(tmp_path / "there/set-train/00000.tar", place + 20)
    asked = server.asked["/set-train/00000.tar"]
    data = open_dataset(cfg, run, "train", tolerate=True)
    for _ in range(3):
        with pytest.raises(BadSample, match="as fetched the tar has another sha256"):
            data.read(0, "jpg")
    assert server.asked["/set-train/00000.tar"] == asked + 2


def flip(path: Path, place: int) -> None:
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)


def test_a_cache_of_another_user_is_read(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, remote=str(there))
    run = go(cfg)
    open_dataset(cfg, run, "train").image(0)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert open_dataset(cfg, run, "train").image(0).shape == (32, 32, 3)


def test_many_that_bring_at_once_leave_no_more_than_the_limit(there: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, remote=f"pipe:cat {there}/{{name}}; case {{name}} in *.tar) sleep 0.2;; esac")
    run = go(cfg)
    shards = read_json(there / "set-train/manifest.json")["shards"]
    cfg.data.cache_gb = 1.5 * max(shard["bytes"] for shard in shards) / 1e9
    data = open_dataset(cfg, run, "train")
    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(lambda n: data.read(next(data.shard_samples(n)), "jpg"), range(len(shards))))
    left = [path.stat().st_size for path in (tmp_path / "shards").rglob("*.tar")]
    assert 0 < sum(left) <= cfg.data.cache_gb * 1e9, "one, or the last, which is small, beside another"


def test_export_and_show_say_that_tars_lie_elsewhere(there: Path, tmp_path: Path) -> None:
    """And not that the dataset is to be deleted and made again."""
    folder = go(config(tmp_path, remote=str(there))).dataset(config(tmp_path), "train")
    key = Dataset.open(there / "set-train").keys[0]
    said = r"set-train/00000.tar is not here: data.remote brought the index alone, and the tars lie there; give the dataset that lies there instead$"
    for call in (lambda: export(folder, tmp_path / "out", "siim", None), lambda: show(folder, key)):
        with pytest.raises(UserError, match=said):
            call()
    shutil.copy(there / "set-train/00000.tar", folder)
    assert show(folder, key)[0]["origin"] == "real"


def test_verify_knows_that_tars_are_brought_when_they_are_read(there: Path, tmp_path: Path) -> None:
    run = go(config(tmp_path, remote=str(there)))
    folder = run.dataset(config(tmp_path), "train")
    found = verify(folder)
    assert found.problems == []
    assert found.images == len(Dataset.open(there / "set-train"))
    assert "0 of " in found.notes[0]
    shutil.copy(there / "set-train/00000.tar", folder)
    assert "1 of " in verify(folder).notes[0]
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes()[:-600])
    assert any("00000.tar has " in problem for problem in verify(folder).problems)
