"""The Inception v3 of the field's FID (Heusel et al. 2017), as pytorch-fid has it: 2,048 pooled features, from that port's weights.

The weights are ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid's release ``fid_weights``: a plain dictionary of tensors, read with
``weights_only``, or the same as ``.safetensors``. The network differs from torchvision's in its pools, which leave the padding out, and one
of which takes the maximum. Widths come from the file; what is written here is how the layers are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skinsynth.errors import UserError

SIDE, FEATURES, EPSILON = 299, 2048, 0.001
BLOCKS = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")
PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
LAYERS, CLASSES = 94, 1008  # of this network; torchvision's own weights, of 1,000 classes, fit the layers and would give other features


def read(path: Path) -> dict[str, Tensor]:
    """Name -> float32 tensor.

    Raises:
        UserError: the file cannot be read without running what is in it, or is of another network.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes do to the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"screen.features={path} cannot be read as a dictionary of tensors ({reason}): take "
                        "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or its tensors as .safetensors") from None
    found = found if isinstance(found, dict) else {}
    layers = [name.removesuffix(PARTS[0]) for name in found if name.endswith(PARTS[0])]
    whole = [layer for layer in layers if all(layer + part in found for part in PARTS)]
    if len(whole) != LAYERS or "fc.bias" not in found or found["fc.bias"].shape != (CLASSES,):
        raise UserError(f"screen.features={path} is not the Inception v3 of FID ({LAYERS} convolutions, {CLASSES} classes): take "
                        "pt_inception-2015-12-05-6726825d.pth of pytorch-fid")
    return {name: value.float() for name, value in found.items()}


class Inception:
    """float32 (n, 3, height, width), 0..1 -> (n, 2048)."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device | str = "cpu"):
        self.convolutions: dict[str, tuple[Tensor, Tensor]] = {}
        for name in [key.removesuffix(".conv.weight") for key in tensors if key.endswith(".conv.weight")]:
            mean, var, weight, bias = (tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            scale = weight / torch.sqrt(var + EPSILON)  # batch normalization of a trained network is part of its convolution
            kernel = tensors[f"{name}.conv.weight"] * scale.view(-1, 1, 1, 1)
            self.convolutions[name] = kernel.to(device), (bias - mean * scale).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1  # without antialiasing, as pytorch-fid does
        x = self._conv("Conv2d_1a_3x3", x, stride=2)
        x = self._conv("Conv2d_2a_3x3", x, pad=False)
        x = F.max_pool2d(self._conv("Conv2d_2b_3x3", x), 3, 2)
        x = self._conv("Conv2d_3b_1x1", x)
        x = F.max_pool2d(self._conv("Conv2d_4a_3x3", x, pad=False), 3, 2)
        for block in BLOCKS:
            x = torch.cat(self._block(block, x), 1)
        return x.mean((2, 3))

    def _conv(self, name: str, x: Tensor, stride: int = 1, pad: bool = True) -> Tensor:
        """Convolution and ReLU; with stride 1 the size stays, unless ``pad`` is off."""
        kernel, bias = self.convolutions[name]
        height, width = kernel.shape[2:]
        padding = (height // 2, width // 2) if pad and stride == 1 else (0, 0)
        return F.conv2d(x, kernel, bias, stride, padding).relu_()

    def _block(self, block: str, x: Tensor) -> list[Tensor]:
        def run(*names: str, stride: int = 1) -> Tensor:
            """The layers one after the other, the last one with the stride."""
            y = x
            for name in names:
                y = self._conv(f"{block}.branch{name}", y, stride if name == names[-1] else 1)
            return y

        def fork(*names: str) -> list[Tensor]:
            """The last two names side by side."""
            y = run(*names[:-2])
            return [self._conv(f"{block}.branch{name}", y) for name in names[-2:]]

        def pooled(pool: Callable[..., Tensor], **options: bool) -> Tensor:
            return self._conv(f"{block}.branch_pool", pool(x, 3, 1, 1, **options))

        if block == "Mixed_6a":
            return [run("3x3", stride=2), run("3x3dbl_1", "3x3dbl_2", "3x3dbl_3", stride=2), F.max_pool2d(x, 3, 2)]
        if block == "Mixed_7a":
            return [run("3x3_1", "3x3_2", stride=2), run("7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4", stride=2), F.max_pool2d(x, 3, 2)]
        last = pooled(F.max_pool2d) if block == "Mixed_7c" else pooled(F.avg_pool2d, count_include_pad=False)
        if block.startswith("Mixed_5"):
            return [run("1x1"), run("5x5_1", "5x5_2"), run("3x3dbl_1", "3x3dbl_2", "3x3dbl_3"), last]
        if block.startswith("Mixed_6"):
            return [run("1x1"), run("7x7_1", "7x7_2", "7x7_3"), run(*(f"7x7dbl_{number}" for number in range(1, 6))), last]
        return [run("1x1"), *fork("3x3_1", "3x3_2a", "3x3_2b"), *fork("3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b"), last]
