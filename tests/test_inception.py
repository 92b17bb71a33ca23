"""FID's Inception: its layers are those of pytorch-fid. The figures below are what pytorch-fid 0.3.0's own network gives with the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import save_file

from skinsynth.errors import UserError
from skinsynth.knobs import Config, Screen
from skinsynth.models.inception import Inception, read
from skinsynth.quality import features
from skinsynth.run import RunDir

POINT, SQUARE, FLAT, TALL = (1, 1), (3, 3), (1, 7), (7, 1)
Layers = list[tuple[str, int, int, tuple[int, int]]]  # name, channels out and in, kernel


def a(block: str, n: int, pool: int) -> Layers:
    return [(f"{block}.branch{name}", *rest) for name, *rest in (
        ("1x1", 64, n, POINT), ("5x5_1", 48, n, POINT), ("5x5_2", 64, 48, (5, 5)), ("3x3dbl_1", 64, n, POINT), ("3x3dbl_2", 96, 64, SQUARE),
        ("3x3dbl_3", 96, 96, SQUARE), ("_pool", pool, n, POINT))]


def c(block: str, m: int) -> Layers:
    return [(f"{block}.branch{name}", *rest) for name, *rest in (
        ("1x1", 192, 768, POINT), ("7x7_1", m, 768, POINT), ("7x7_2", m, m, FLAT), ("7x7_3", 192, m, TALL), ("7x7dbl_1", m, 768, POINT),
        ("7x7dbl_2", m, m, TALL), ("7x7dbl_3", m, m, FLAT), ("7x7dbl_4", m, m, TALL), ("7x7dbl_5", 192, m, FLAT), ("_pool", 192, 768, POINT))]


def e(block: str, n: int) -> Layers:
    return [(f"{block}.branch{name}", *rest) for name, *rest in (
        ("1x1", 320, n, POINT), ("3x3_1", 384, n, POINT), ("3x3_2a", 384, 384, (1, 3)), ("3x3_2b", 384, 384, (3, 1)), ("3x3dbl_1", 448, n, POINT),
        ("3x3dbl_2", 384, 448, SQUARE), ("3x3dbl_3a", 384, 384, (1, 3)), ("3x3dbl_3b", 384, 384, (3, 1)), ("_pool", 192, n, POINT))]


LAYERS: Layers = [
    ("Conv2d_1a_3x3", 32, 3, SQUARE), ("Conv2d_2a_3x3", 32, 32, SQUARE), ("Conv2d_2b_3x3", 64, 32, SQUARE), ("Conv2d_3b_1x1", 80, 64, POINT),
    ("Conv2d_4a_3x3", 192, 80, SQUARE), *a("Mixed_5b", 192, 32), *a("Mixed_5c", 256, 64), *a("Mixed_5d", 288, 64),
    ("Mixed_6a.branch3x3", 384, 288, SQUARE), ("Mixed_6a.branch3x3dbl_1", 64, 288, POINT), ("Mixed_6a.branch3x3dbl_2", 96, 64, SQUARE),
    ("Mixed_6a.branch3x3dbl_3", 96, 96, SQUARE), *c("Mixed_6b", 128), *c("Mixed_6c", 160), *c("Mixed_6d", 160), *c("Mixed_6e", 192),
    ("Mixed_7a.branch3x3_1", 192, 768, POINT), ("Mixed_7a.branch3x3_2", 320, 192, SQUARE), ("Mixed_7a.branch7x7x3_1", 192, 768, POINT),
    ("Mixed_7a.branch7x7x3_2", 192, 192, FLAT), ("Mixed_7a.branch7x7x3_3", 192, 192, TALL), ("Mixed_7a.branch7x7x3_4", 192, 192, SQUARE),
    *e("Mixed_7b", 1280), *e("Mixed_7c", 2048)]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Each tensor drawn by its own name, as was done for the figures."""
    found: dict[str, torch.Tensor] = {}
    for layer, out, into, kernel in LAYERS:
        shapes = {"conv.weight": (out, into, *kernel), "bn.weight": (out,), "bn.bias": (out,), "bn.running_mean": (out,), "bn.running_var": (out,)}
        for part, shape in shapes.items():
            name = f"{layer}.{part}"
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            if part == "conv.weight":
                found[name] = torch.randn(shape, generator=generator) * (2 / (into * kernel[0] * kernel[1])) ** 0.5
            elif part in ("bn.weight", "bn.running_var"):
                found[name] = torch.rand(shape, generator=generator) + 0.5
            else:
                found[name] = torch.randn(shape, generator=generator) * 0.1
    return {**found, "fc.bias": torch.zeros(1008)}


def test_its_features_are_those_of_pytorch_fid(weights: dict[str, torch.Tensor]) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = Inception(weights)(pixels)
    assert (found.shape, found.dtype) == ((2, 2048), torch.float32)
    assert found[0, :4].tolist() == pytest.approx([21.0414, 0.0273, 0.0012, 0.4597], abs=2e-4)
    assert found[1, -4:].tolist() == pytest.approx([5.5187, 4.4027, 0.0, 0.0018], abs=2e-4)
    assert (float(found.mean()), float(found.std())) == pytest.approx((2.60349, 3.75551), abs=2e-4)


def test_as_the_space_of_screen_from_either_file(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "pt.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "st.safetensors")
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).numpy()
    found = []
    for name in ("pt.pth", "old.pth", "st.safetensors"):
        cfg = Config(screen=Screen(features=str(tmp_path / name), batch=2))
        assert features.space_name(cfg) == "inception-fid"
        found.append(features.make(cfg, RunDir(tmp_path / "run"))(images))
    assert found[0].shape == (3, 2048)
    assert all((other == found[0]).all() for other in found)


class Evil:
    def __init__(self, where: str):
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.where,)


def test_no_other_file_is_taken_for_it(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Evil(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth cannot be read as a dictionary of tensors"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"PK\x03\x04 not a file of torch"):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / "cut.pth")
    lacking = {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.running_var"}
    for name, tensors in (("lacking", lacking), ("torchvision", {**weights, "fc.bias": torch.zeros(1000)}), ("none", {"a": torch.zeros(1)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=r"is not the Inception v3 of FID \(94 convolutions, 1008 classes\)"):
            read(tmp_path / f"{name}.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="is not the Inception v3 of FID"):
        read(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no such file"):
        features.make(Config(screen=Screen(features=str(tmp_path / "none.pth"))), RunDir(tmp_path / "run"))
