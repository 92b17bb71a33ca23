"""What the base model is trained on: drawn lesions, close up, with captions; and their augmentation for the autoencoder."""
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from skinsynth.data.phantom import caption, draw, sample_broad
from skinsynth.models.tiny.networks import SIZE


def drawings(count: int, seed: int, cache: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """(count, 64, 64, 3) RGB and their captions; drawn once (5 ms each) and kept in `cache`."""
    path, words = cache / f"drawings-{seed}-{count}.npy", cache / f"captions-{seed}-{count}.txt"
    if path.exists() and words.exists():
        return np.load(path), words.read_text().splitlines()
    images, captions = np.empty((count, SIZE, SIZE, 3), np.uint8), []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        lesion = sample_broad(rng)
        image = draw(lesion, rng, SIZE * 3 // 2, SIZE * 3 // 2)
        images[number] = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        captions.append(caption(lesion))
    cache.mkdir(parents=True, exist_ok=True)
    words.with_suffix(".part").write_text("\n".join(captions))
    words.with_suffix(".part").replace(words)
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, images)
    path.with_suffix(".part").replace(path)
    return images, captions


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) in 0..255 -> (n, 3, h, w) in -1..1, channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 3, h, w) in -1..1, made much more varied than the drawings are, so that real photographs fall inside."""
    n, _, height, width = x.shape

    def some(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < share).float()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if torch.rand((), generator=generator) < 0.5:
        x = x.transpose(2, 3)
    x = x.flip([dim for dim in (2, 3) if torch.rand((), generator=generator) < 0.5])
    mask = F.interpolate(normal(n, 1, 4, 4), (height, width), mode="bicubic").mul(6).sigmoid() * some(0.25)
    x = torch.lerp(x, x.roll(1, 0), mask)  # two pictures in one
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = x + some(0.5) * torch.rand(n, 1, 1, 1, generator=generator) * 1.5 * (x - blurred)  # sharper than drawn
    grain = int(torch.randint(1, 5, (), generator=generator))
    texture = F.interpolate(normal(n, 3, height // grain, width // grain), (height, width), mode="bicubic")
    grey = some(0.7)
    texture = grey * texture.mean(1, keepdim=True) * 1.7 + (1 - grey) * texture
    x = x + some(0.5) * 0.12 * torch.rand(n, 1, 1, 1, generator=generator) * texture
    x = x + _strokes(n, height, width, generator) * some(0.3) * (normal(n, 1, 1, 1) * 0.4 - 0.6)
    light = (x.clamp(-1, 1) * 0.5 + 0.5) ** (some(0.6) * 0.3 * normal(n, 1, 1, 1)).exp()
    light = light * (some(0.6) * 0.15 * normal(n, 3, 1, 1)).exp()
    return (light * 2 - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _strokes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Thin random lines, such as hairs and ruler ticks: (n, 1, h, w) in 0..1."""
    canvas = np.zeros((n, height, width), np.uint8)
    ends = torch.rand(n, 6, 2, 2, generator=generator).mul(torch.tensor((width * 16, height * 16))).int().numpy()
    for image, lines in zip(canvas, ends, strict=True):
        cv2.polylines(image, list(lines), False, 255, 1, cv2.LINE_AA, 4)
    return torch.from_numpy(canvas).unsqueeze(1).float() / 255
