"""The loop on a model of a few weights: what it does when the loss or the memory goes wrong, and what its checkpoints survive."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import until

from skinsynth.data.dataset import BadSample
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Training
from skinsynth.run import RunDir
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import Clock, TrainLog, _digits, forward_flops, read_lines
from skinsynth.train.loop import train
from skinsynth.train.optimizer import AdamW
from skinsynth.world import Stopped, World


class Numbers:
    """Samples are numbers; ``bad`` are none."""

    workers = 2
    bad: list[BadSample] = []  # noqa: RUF012

    def batch(self, positions: range) -> Batch:
        return {"x": torch.tensor([float(p % 7) for p in positions]), "position": torch.tensor(list(positions))}

    def keys(self, positions: range) -> list[str]:
        return [f"sample-{p}" for p in positions]


def square(model: Any, batch: Batch) -> torch.Tensor:
    return ((model(batch["x"][:, None]) - 3) ** 2).mean()


def go(folder: Path, loss: Callable[[Any, Batch], torch.Tensor] = square, world: World | None = None, more: dict[str, Any] | None = None,
       **keys: Any) -> tuple[RunDir, Any]:
    """``more``: for ``train``."""
    cfg = Training(**{"steps": 60, "global_batch": 4, "lr": 1e-3, "log_every": 5, "checkpoint_every": 10, "zero": 0, **keys})
    run, world = RunDir(folder), world or World()
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    checkpoints = Checkpoints(run.node("it") / "checkpoints", world, {"lr": cfg.lr}, cfg.keep, cfg.keep_every)
    engine = Engine(cfg, world, model, "it", checkpoints.found)
    return run, train(engine, run, "it", checkpoints, Clock(), Numbers(), loss, **(more or {}))


def steps_of(run: RunDir) -> list[int]:
    return [int(p.name[5:]) for p in sorted((run.node("it") / "checkpoints").glob("step-*"))]


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_lines(run.node("it") / "metrics.jsonl")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_the_last_good_checkpoint(tmp_path: Path, value: float) -> None:
    def poisoned(model: Any, batch: Batch) -> torch.Tensor:
        return square(model, batch) + torch.where(batch["position"] == 93, value, 0.0).sum()

    with pytest.raises(UserError, match=r"at step 24 \(samples sample-92, sample-93, sample-94, sample-95\)") as caught:
        go(tmp_path / "run", poisoned)
    assert str(value) in str(caught.value)
    run = RunDir(tmp_path / "run")
    assert steps_of(run) == [10, 20]
    assert len(losses(run)) == 20


def test_an_update_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """The loss of the step is finite, its gradient is not. Without the mistake the same command goes on as if it had never been."""
    def poisoned(model: Any, batch: Batch) -> torch.Tensor:
        bad = torch.sqrt((model.weight * 0).sum()) if 79 in batch["position"] else 0.0  # zero, with a gradient of infinity times zero
        return square(model, batch) + bad

    for _ in range(2):
        with pytest.raises(UserError, match=r"finite at step 20, but '\w+/\w+' is not after .*\(samples sample-76, sample-77, .*from before"):
            go(tmp_path / "run", poisoned)
        assert steps_of(RunDir(tmp_path / "run")) == [10]
    run, _ = go(tmp_path / "run")
    whole, _ = go(tmp_path / "whole")
    assert losses(run) == losses(whole)


def test_at_a_stop_what_is_not_finite_is_not_saved_either(tmp_path: Path) -> None:
    world = World()

    def poisoned(model: Any, batch: Batch) -> torch.Tensor:
        if 63 in batch["position"]:
            world.note_stop(signal.SIGUSR2, None)
        return square(model, batch) + (torch.sqrt((model.weight * 0).sum()) if 63 in batch["position"] else 0.0)

    with pytest.raises(UserError, match="finite at step 16, but"):
        go(tmp_path / "run", poisoned, world)
    assert steps_of(RunDir(tmp_path / "run")) == [10]


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_a_loss_that_explodes_stops_too(tmp_path: Path, log_every: int) -> None:
    """However many of them are looked at together."""
    def exploding(model: Any, batch: Batch) -> torch.Tensor:
        return square(model, batch) * torch.where(batch["position"].max() >= 160, 1e4, 1.0)

    with pytest.raises(UserError, match=r"explodes: .* over steps 32 to 41, usually .* at step 41 \(samples sample-160, "):
        go(tmp_path / "run", exploding, log_every=log_every)
    assert steps_of(RunDir(tmp_path / "run")) == [30, 40]
    go(tmp_path / "free", exploding, explode=1e9)


def test_one_hard_batch_stops_nothing_and_is_no_time_to_save(tmp_path: Path) -> None:
    """The loss of the step before a checkpoint is 100 times the usual one: that of the next one shows whether the weights have exploded."""
    def spiky(model: Any, batch: Batch, steps: range) -> torch.Tensor:
        loss = square(model, batch)
        return 1 + 0 * loss + (99 if int(batch["position"][0]) // 4 + 1 in steps else 0)

    run, _ = go(tmp_path / "once", lambda *given: spiky(*given, range(30, 31)), keep=9)
    assert steps_of(run) == [10, 20, 31, 40, 50, 60]
    with pytest.raises(UserError, match=r"explodes: 20\.8 on average over steps 22 to 31, usually 1 \(see it\.explode\); 100 at step 31"):
        go(tmp_path / "more", lambda *given: spiky(*given, range(30, 61)))
    assert steps_of(RunDir(tmp_path / "more")) == [10, 20]


def easy(step: int) -> float:
    """The loss of most batches comes next to nothing; in one of ten there is an image with a wrong label."""
    return 0.7 if step <= 20 else 0.3 if step % 10 == 0 else 1e-3


def planned(values: Callable[[int], float], world: World | None = None, stop: int = 0) -> Callable[[Any, Batch], torch.Tensor]:
    """A loss that is ``values`` of the step, the first of which is 1; ``world`` hears a signal in the step ``stop``."""
    def loss(model: Any, batch: Batch) -> torch.Tensor:
        step = int(batch["position"][0]) // 4 + 1
        if world and step == stop:
            world.note_stop(signal.SIGUSR2, None)
        return values(step) + 0 * square(model, batch)

    return loss


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_hard_batches_among_easy_ones_are_no_explosion(tmp_path: Path, log_every: int) -> None:
    """They are far above 20 times the usual loss, but below that of the beginning. Each is just before a checkpoint, which is not put off."""
    run, _ = go(tmp_path / "run", planned(easy), steps=100, keep=99, log_every=log_every)
    assert steps_of(run) == list(range(10, 101, 10))


def test_how_a_training_began_outlives_a_restart(tmp_path: Path) -> None:
    """By that its hard batches are known for such also then, and a true explosion for one."""
    def exploding(step: int) -> float:
        return easy(step) if step <= 70 else 20.0

    world = World()
    with pytest.raises(Stopped, match="at step 45 of 100"):
        go(tmp_path / "run", planned(exploding, world, 45), world, steps=100)
    words = r"explodes: 2\.031 on average over steps 62 to 71, usually 0\.001 .*; 20 at step 71 \(samples sample-280, "
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            go(tmp_path / "run", planned(exploding), steps=100)
        assert steps_of(RunDir(tmp_path / "run")) == [60, 70]
    go(tmp_path / "run", planned(easy), steps=100)


def test_out_of_memory_says_what_to_turn_on(tmp_path: Path) -> None:
    def greedy(model: Any, batch: Batch) -> torch.Tensor:
        return square(model, batch) + torch.empty(2**50).sum()

    with pytest.raises(UserError, match=r"out of memory \(.*it\.micro_batch=2 .*it\.precision=bf16.*it\.zero=1"):
        go(tmp_path / "run", greedy)


def test_a_stop_goes_on_at_that_very_step(tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "whole")
    world = World()

    def stopping(model: Any, batch: Batch) -> torch.Tensor:
        if int(batch["position"][0]) == 4 * 16:
            world.note_stop(signal.SIGUSR2, None)
        return square(model, batch)

    with pytest.raises(Stopped, match="at step 17 of 60"):
        go(tmp_path / "run", stopping, world)
    assert steps_of(RunDir(tmp_path / "run")) == [10, 17]
    run, _ = go(tmp_path / "run")
    assert losses(run) == losses(whole)


def test_a_stop_at_a_step_that_was_just_saved_saves_nothing_again(tmp_path: Path) -> None:
    """As when a signal comes while pictures are drawn: with little time left, the one checkpoint of this step is not replaced by its like."""
    run, world, seen = RunDir(tmp_path / "run"), World(), []
    path = run.node("it") / "checkpoints/step-00000010"

    def show(step: int) -> None:
        until("the checkpoint is on disk", path.exists)
        seen.append(path.stat().st_ino)
        world.note_stop(signal.SIGUSR2, None)

    with pytest.raises(Stopped, match="at step 10 of 60"):
        go(run.path, world=world, more={"show": show, "every": 10})
    assert [path.stat().st_ino] == seen
    go(run.path)
    whole, _ = go(tmp_path / "whole")
    assert losses(run) == losses(whole)


def test_what_is_drawn_keeps_no_checkpoint_waiting(tmp_path: Path) -> None:
    """Killed while it draws, it would go on from that very step; what was judged there is in its state."""
    run, seen, told = RunDir(tmp_path / "run"), [], []

    def judge(step: int, state: dict[str, Any]) -> None:
        state["judged"] = step

    def show(step: int) -> None:
        end = time.monotonic() + 5
        while step not in steps_of(run) and time.monotonic() < end:
            time.sleep(0.01)  # a thread writes it meanwhile
        found = Checkpoints(run.node("it") / "checkpoints", World(), {"lr": 1e-3}).found
        seen.append((step, found and found.step, found and found.state["judged"]))
        told.append(read_json(run.progress_path("it", 0))["done"])

    go(run.path, more={"judge": judge, "show": show, "every": 30})
    assert seen == [(30, 30, 30), (60, 60, 60)]
    assert told[-1] == 60, "no step is left while the last pictures are drawn"


def test_the_list_of_bad_samples_outlives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process knows only of those that it met itself."""
    world = World()

    def stopping(model: Any, batch: Batch) -> torch.Tensor:
        if int(batch["position"][0]) == 4 * 16:
            world.note_stop(signal.SIGUSR2, None)
        return square(model, batch)

    monkeypatch.setattr(Numbers, "bad", [BadSample("set", "00001.tar", "b", "is torn"), BadSample("set", "00002.tar", "c", "is torn")])
    with pytest.raises(Stopped):
        go(tmp_path / "run", stopping, world)
    monkeypatch.setattr(Numbers, "bad", [BadSample("set", "00000.tar", "a", "is gone, or so"), BadSample("set", "00002.tar", "c", "is torn")])
    run, state = go(tmp_path / "run")
    lines = (run.node("it") / "bad-samples.csv").read_text().splitlines()
    assert lines == ["key,shard,reason", 'a,set/00000.tar,"is gone, or so"', "b,set/00001.tar,is torn", "c,set/00002.tar,is torn"]
    assert state["bad_samples"] == 3


def test_a_changed_checkpoint_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = go(tmp_path / "run")
    newest = run.node("it") / "checkpoints/step-00000060/rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    before = losses(run)
    with caplog.at_level("WARNING"):
        go(tmp_path / "run")
    assert "step-00000060 is passed over: rank-00000.safetensors has changed since it was written" in caplog.text
    assert losses(run) == before


def test_damaged_checkpoints_do_not_count_as_those_that_are_kept(tmp_path: Path) -> None:
    run, _ = go(tmp_path / "run", keep=3)
    before, world = losses(run), World()
    for name in ("step-00000050", "step-00000060"):
        (run.node("it") / "checkpoints" / name / "complete.json").write_text("")

    def stopping(model: Any, batch: Batch) -> torch.Tensor:
        if int(batch["position"][0]) == 4 * 44:
            world.note_stop(signal.SIGUSR2, None)
        return square(model, batch)

    with pytest.raises(Stopped, match="at step 45 of 60"):
        go(tmp_path / "run", stopping, world, keep=1)
    assert steps_of(run) == [45], "the one that is whole, not one that is newer and damaged"
    with pytest.raises(Stopped, match="at step 45 of 60"):
        go(tmp_path / "run", world=world, keep=1)
    go(tmp_path / "run", keep=1)
    assert steps_of(run) == [60]
    assert losses(run) == before


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    go(tmp_path / "run")
    with pytest.raises(UserError, match=r"(?s)made with another configuration or of other images:\n  lr: 0.001 -> 0.01\n.*delete"):
        go(tmp_path / "run", lr=1e-2)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run, _ = go(tmp_path / "run")
    checkpoints = Checkpoints(run.node("it") / "checkpoints", World(), {"lr": 1e-3})
    with pytest.raises(UserError, match=r"has no 'weight' of '0\.weight': it was made by another model"):
        Engine(Training(zero=0), World(), torch.nn.Sequential(torch.nn.Linear(1, 1)), "it", checkpoints.found)


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path: Path) -> None:
    run, _ = go(tmp_path / "run", keep=1, keep_every=20)
    assert steps_of(run) == [20, 40, 60]


def test_a_checkpoint_that_was_gone_on_from_is_let_go_of(tmp_path: Path) -> None:
    """Its room on the disk is free once it is pruned, not when the process ends."""
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/run" in line]

    seen: list[int] = []

    def watching(model: Any, batch: Batch) -> torch.Tensor:
        seen.append(len(mapped()))
        return square(model, batch)

    go(tmp_path / "run", steps=10)
    cfg, run, world = Training(zero=0), RunDir(tmp_path / "run"), World()
    found = Checkpoints(run.node("it") / "checkpoints", world, {"lr": 1e-3}).found
    assert found
    Engine(cfg, world, torch.nn.Linear(1, 1), "it", found)
    assert mapped(), "it is seen while it is read from"
    found.close()
    go(tmp_path / "run", watching, steps=20)
    assert seen
    assert not any(seen)


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The writing thread's error reaches the loop; nothing half-written looks whole, and the same command goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    done: list[int] = []

    def limiting(model: Any, batch: Batch) -> torch.Tensor:
        done.append(int(batch["position"][0]) // 4)
        if done[-1] == 15:
            time.sleep(1)  # the thread that writes step 10 is not to be the one that fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        if done[-1] == 22:
            time.sleep(1)  # the one that writes step 20 is
        return square(model, batch)

    try:
        with pytest.raises(OSError, match="File too large"):
            go(tmp_path / "run", limiting, log_every=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_of(RunDir(tmp_path / "run")) == [10]
    assert len(done) < 30, "it is told at a step, not when the next one is to be saved"
    run, _ = go(tmp_path / "run")
    whole, _ = go(tmp_path / "whole")
    assert losses(run)[-10:] == losses(whole)[-10:]


def test_what_is_logged(tmp_path: Path) -> None:
    run, _ = go(tmp_path / "run")
    rows = read_lines(run.node("it") / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0].keys() == {"step", "loss", "lr", "samples_per_second", "samples_per_second_per_rank", "tflops_per_rank", "mfu", "data_wait",
                              "peak_memory_gb"}
    speeds = [tuple(row[name] for name in ("samples_per_second", "data_wait", "peak_memory_gb")) for row in rows]
    assert all(len(set(speeds[first:first + 5])) == 1 for first in range(0, 60, 5)), "one value for all steps of a flush"
    assert len(set(speeds)) > 1
    assert 0 <= rows[-1]["data_wait"] < 1
    assert rows[-1]["peak_memory_gb"] > 0.1
    startup = json.loads((run.node("it") / "startup.json").read_text())
    assert startup["seconds"]["first step"] > 0


def test_peak_memory_is_that_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what is drawn between them."""
    peak = [0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    engine = SimpleNamespace(cfg=Training(), world=World(), device=torch.device("cuda"), micro=4, mean=lambda values: values, state_bytes=dict,
                             skipped=False)
    log = TrainLog(tmp_path, engine, 0, Clock(), Numbers(), {})  # type: ignore[arg-type]
    for step, bytes_ in enumerate((3e9, 2e9)):
        log.add(step, torch.tensor(1.0))
        peak[0] = max(peak[0], int(bytes_))
        log.flush(0.0)
        peak[0] = int(9e9)
        log.resume()
    assert [row["peak_memory_gb"] for row in read_lines(tmp_path / "metrics.jsonl")] == [3, 2]


def test_a_moving_average_is_what_is_exported(tmp_path: Path) -> None:
    """Against the average written out: decay min(0.9, (1 + t) / (10 + t)), begun with the weights after the first step."""
    seen: list[float] = []
    cfg = Training(steps=8, global_batch=4, lr=1e-2, zero=0, ema_decay=0.9)
    torch.manual_seed(0)
    engine = Engine(cfg, World(), torch.nn.Linear(1, 1), "it")
    expected = 0.0
    for step in range(8):
        decay = min(0.9, (1 + step) / (10 + step))
        engine.step(1e-2, decay, [Numbers().batch(range(4 * step, 4 * step + 4))], square)
        now = float(engine.full("weight", "bias"))
        expected = now if step == 0 else decay * expected + (1 - decay) * now
        seen.append(now)
    assert float(dict(engine.weights())["bias"]) == pytest.approx(expected, rel=1e-5)
    assert len(set(seen)) == 8


def test_the_8_bit_optimizer_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """Its packed states are saved as they are (large enough a layer to be packed)."""
    def run(folder: Path, steps: int) -> list[float]:
        cfg = Training(steps=steps, global_batch=4, lr=1e-3, zero=0, optimizer="adamw8bit", checkpoint_every=5, log_every=5)
        out, world = RunDir(folder), World()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 1))
        checkpoints = Checkpoints(out.node("it") / "checkpoints", world, {})
        engine = Engine(cfg, world, model, "it", checkpoints.found)
        train(engine, out, "it", checkpoints, Clock(), Numbers(), square)
        packed = engine.adam.state[engine.trained["1.weight"]]["state1"]
        assert packed.dtype == torch.uint8
        return losses(out)

    whole = run(tmp_path / "whole", 15)
    run(tmp_path / "run", 5)
    assert run(tmp_path / "run", 15) == whole


def test_only_the_models_own_operations_are_counted() -> None:
    """Not what the loss does round it, such as the VAE of a training without cached latents."""
    model, frozen = torch.nn.Linear(4, 8), torch.nn.Linear(4, 4)
    with forward_flops(model) as counter:
        (frozen(model(frozen(torch.ones(2, 4)))[:, :4]) @ torch.ones(4, 4)).sum()
    assert counter.get_total_flops() == 2 * 2 * 4 * 8


def test_the_moving_average_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    clone = torch.Tensor.clone
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = AdamW([{"params": [p], "ema_decay": 0.5}], fused=True)
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **more: copied.append(self.numel()) or clone(self, **more))
    for _ in range(3):
        p.grad = torch.ones(10)
        optimizer.step()
    assert copied.count(10) == 1


def test_a_speed_keeps_its_digits() -> None:
    """Of a large model on a CPU an image takes half a minute, of a small one on a GPU there are thousands a second."""
    assert [_digits(rate) for rate in (0.048731, 47.9132, 12345.6)] == [0.04873, 47.91, 12350.0]
