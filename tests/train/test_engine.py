"""One optimizer step: what changes nothing (accumulation, offload of a single rank), and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, free_port
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from test_loop import go, losses, square, steps_of

from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Finetune, Model, Training
from skinsynth.models import diffusion
from skinsynth.models.denoiser import Denoiser
from skinsynth.run import RunDir
from skinsynth.train.engine import Engine, micro_batch
from skinsynth.world import World

OFFLOADED = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], "tests"]
from test_loop import go
for zero, offload in ((2, "optimizer"), (3, "parameters")):
    go(Path(sys.argv[2], f"zero-{zero}"), steps=20, zero=zero, offload=offload)
    go(Path(sys.argv[2], f"turned-{zero}"), steps=10, zero=zero, offload=offload)
    go(Path(sys.argv[2], f"turned-{zero}"), steps=20)
"""


def test_a_single_rank_may_offload(tmp_path: Path) -> None:
    """DeepSpeed's way, with its flat shares and masters; it changes no loss, and may begin or end at any restart. In a process of its own: at stage 3
    DeepSpeed puts a linear layer of its own in the place of torch's, for good."""
    plain, _ = go(tmp_path / "plain", steps=20)
    done = subprocess.run([sys.executable, "-c", OFFLOADED, str(Path(__file__).parent), str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
                          timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for zero in (2, 3):
        run, turned = RunDir(tmp_path / f"zero-{zero}"), RunDir(tmp_path / f"turned-{zero}")
        assert read_json(run.node("it") / "checkpoints/step-00000020/complete.json")["topology"] == {"ranks": 1, "zero": zero}
        assert losses(run) == pytest.approx(losses(plain), abs=1e-6)
        assert losses(turned) == pytest.approx(losses(plain), abs=1e-6)


LEFT_OUT = """
import os
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], "tests"]
import torch
from test_loop import go
from skinsynth.errors import UserError
from skinsynth.world import World, join

def loss(model, batch):
    weight = model.module.weight
    bad = torch.sqrt((weight.float() * 0).sum()) if poisoned in batch["position"] else 0.0  # zero, with a gradient of infinity times zero
    return ((model(batch["x"][:, None].to(weight.dtype)).float() - 3) ** 2).mean() + bad

world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
with join(world, {}):
    for precision, zero, poisoned in (("fp32", 1, 51), ("fp32", 2, 51), ("bf16", 2, 79)):
        try:
            go(Path(sys.argv[2], f"{precision}-{zero}"), loss, world, steps=30, zero=zero, precision=precision)
        except UserError as error:
            print(f"{precision} {zero}: {error}")
"""


def test_a_gradient_that_is_not_finite_ends_a_sharded_training(tmp_path: Path) -> None:
    """DeepSpeed would leave such an update out and go on without a word; the loss is finite, and on the first of two ranks so is the gradient. In
    fp32 the step is known by that, in bf16 by what the update made of the weights."""
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEFT_OUT, str(Path(__file__).parent), str(tmp_path)]
    gang = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    said = [process.communicate(timeout=150) for process in gang]
    assert [process.returncode for process in gang] == [0, 0], said[0][1][-3000:]
    for words, _ in said:
        told = [line for line in words.splitlines() if line.startswith(("fp32 ", "bf16 "))]
        for zero, line in zip((1, 2), told, strict=False):
            assert line.startswith(f"fp32 {zero}: the loss may be finite, but its gradients at step 13 are not (samples sample-48, sample-49, ")
        assert len(told) == 3
        assert re.match(r"bf16 2: the loss is finite at step 20, but '\w+/\w+' is not after that step's update \(samples sample-76, ", told[2])
    assert [steps_of(RunDir(tmp_path / name)) for name in ("fp32-1", "fp32-2", "bf16-2")] == [[10]] * 3


def test_what_is_loaded_for_inference_is_trained_in_training_mode() -> None:
    """Also inside a module that is new, which says that it is in that mode: dropout and the text encoder's checkpointing ask the parts."""
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5)).eval())
    engine = Engine(Training(steps=1, global_batch=4, zero=0), World(), model, "it")
    engine.step(1e-3, 0.0, [{"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}], square)
    assert all(part.training for part in model.modules())


def test_accumulation_changes_no_loss(tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "whole", steps=20, global_batch=8)
    for micro in (1, 2, 4):
        parts, _ = go(tmp_path / str(micro), steps=20, global_batch=8, micro_batch=micro)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5), micro


def test_a_gradient_is_clipped_to_its_norm_and_without_a_norm_left_alone(tmp_path: Path) -> None:
    def moved(norm: float) -> float:
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        engine = Engine(Training(steps=1, global_batch=4, lr=1.0, weight_decay=0.0, zero=0, max_grad_norm=norm), World(), model, "it")
        engine.adam = torch.optim.SGD(model.parameters(), lr=1.0)
        engine.optimizer = engine.accelerator.prepare(engine.adam)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        engine.step(1.0, 0.0, [{"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}], square)
        return float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm())

    assert moved(0.5) == pytest.approx(0.5, rel=1e-3)
    assert moved(0.0) == pytest.approx(moved(1e9))
    assert moved(0.0) > 1


def test_half_precision_with_a_loss_scale_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"it\.precision=fp16 needs a GPU.*bf16"):
        Engine(Training(global_batch=4, precision="fp16", zero=0), World(), torch.nn.Linear(1, 1), "it")


def scaled(sharded: bool) -> Any:
    """An engine of which there is nothing but its loss scale, DeepSpeed's or torch's own."""
    engine = Engine.__new__(Engine)
    engine.cfg, engine.sharded = Training(precision="fp16"), sharded
    own = DynamicLossScaler(2.0**16, 1000, 1, 1, False)
    engine.model = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=own))
    engine.accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    engine.adam = SimpleNamespace(state={"p": {"step": torch.tensor(12.0)}})  # type: ignore[assignment]
    return engine


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("here", [True, False])
def test_the_loss_scale_goes_on_with_and_without_zero(here: bool, there: bool) -> None:
    old, new = scaled(here), scaled(there)
    if here:
        own = old.model.optimizer.loss_scaler
        own.cur_scale, own.cur_iter, own.last_overflow_iter = 2.0**15, 6, 5  # as after an overflow in the sixth step
        for _ in range(7):
            own.update_scale(False)
    else:
        own = old.accelerator.scaler
        own.load_state_dict({**own.state_dict(), "scale": 2.0**15, "_growth_tracker": 7})
    assert old.scaler() == {"scale": 2.0**15, "since": 7, "updates": 12, **({"hysteresis": 1} if here else {})}
    new._set_scaler(old.scaler())
    assert new.scaler() == {"scale": 2.0**15, "since": 7, "updates": 12, **({"hysteresis": 1} if there else {})}
    if there:
        for _ in range(993):  # 7 and 993 good steps are a window
            new.model.optimizer.loss_scaler.update_scale(False)
        assert new.model.optimizer.loss_scaler.cur_scale == 2.0**15
        new.model.optimizer.loss_scaler.update_scale(False)
        assert new.model.optimizer.loss_scaler.cur_scale == 2.0**16


@pytest.mark.parametrize("micro", [1, 5, 12])
def test_what_is_advised_where_memory_lacks_can_be_done(micro: int) -> None:
    cfg = Finetune(global_batch=60, micro_batch=micro, zero=0, optimizer="adamw8bit", precision="bf16")
    engine = Engine.__new__(Engine)
    engine.cfg, engine.section, engine.micro = cfg, "finetune", micro
    advice = engine._memory_advice("no memory")
    assert "finetune.zero" not in advice, "8-bit states cannot be sharded"
    assert ("finetune.micro_batch=" in advice) is (micro > 1)
    if micro > 1:
        smaller = int(advice.split("finetune.micro_batch=")[1].split(" ")[0])
        assert smaller < micro
        assert micro_batch(Finetune(global_batch=60, micro_batch=smaller), World(), "finetune") == smaller


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_residual_blocks_stay_channels_last_while_the_unet_trains(dropout: float) -> None:
    """In training mode diffusers copies what their shortcut reads; where there is dropout they must be in that mode all the same."""
    base = diffusion.load_base(Model()).unet
    unet = type(base).from_config({**base.config, "dropout": dropout})
    model = Denoiser(unet).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    seen: list[bool] = []
    for name, part in unet.named_modules():
        if name.endswith("conv_shortcut"):
            part.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    model(torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), {"text": torch.randn(2, 77, 128)})
    assert len(seen) >= 5
    assert all(seen) is (dropout == 0)
    assert unet.training
    assert all(part.training for part in unet.modules() if isinstance(part, torch.nn.Dropout) and part.p)
