"""The pictures of fine-tuning: what the weights draw before, while and after they are trained, always from the same noise.

::

    finetune/previews/00000000.png ...   by steps; a row per prompt
                      prompts.json       of the rows
                      strip.png          all of them side by side, over time
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from skinsynth.data.order import sample_rng
from skinsynth.files import write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.models import denoiser, diffusion
from skinsynth.run import RunDir
from skinsynth.world import World

COLUMNS = 6  # images per prompt
PROMPTS = 6  # rows at most
IN_STRIP = 2  # of each prompt's images
AT_ONCE = 2  # images a rank draws in one go, whatever the number of ranks: the batch shape decides the last bits


class Previews:
    """Drawn by all ranks, each its share, with pipelines of their own that stand on the host between times; written by rank 0.

    ``fresh`` gives the base, ready to draw as ``generate`` would.
    """

    def __init__(self, cfg: Config, run: RunDir, world: World, prompts: list[str], fresh: Callable[[], Any]):
        self.cfg, self.folder, self.world, self.fresh = cfg, run.node("finetune") / "previews", world, fresh
        self.prompts = prompts[:PROMPTS]
        self.pipe: Any = None

    def draw(self, step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray] | None:
        """Draws with the weights, and with the base where that is not there yet. A collective; on rank 0 it returns the picture for TensorBoard.

        None there: left out, since a stop signal is not kept waiting, or a rank's memory does not hold a pipeline beside the training; or there
        are no prompts.
        """
        if not self.prompts:
            return None
        self.pipe = self.pipe or self.fresh()
        if not self.there(0) and self._sheet(0) is None:
            return None
        denoiser.put_back(self.pipe, self.cfg.finetune, weights)
        sheet = self._sheet(step)
        if sheet is None or not self.world.is_main:
            return None
        write_json(self.folder / "prompts.json", self.prompts)
        write_bytes(self.folder / "strip.png", _png(self._strip()))
        return {"previews": sheet}

    def there(self, step: int) -> bool:
        """Whether rank 0 has written that step's. A collective."""
        return bool(self.world.gather(self._path(step).exists())[0])

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.png"

    def _sheet(self, step: int) -> np.ndarray | None:
        pieces = self._pieces(step)
        if pieces is None:
            return None
        rows = [np.concatenate([image for piece in row for image in piece], axis=1) for row in pieces]
        sheet = np.concatenate(rows, axis=0)
        if self.world.is_main:
            write_bytes(self._path(step), _png(sheet))
        return sheet

    def _pieces(self, step: int) -> list[list[np.ndarray]] | None:
        """Of each prompt its images, ``AT_ONCE`` at a time: uint8 (n, height, width, 3). A collective."""
        todo = [(prompt, first) for prompt in self.prompts for first in range(0, COLUMNS, AT_ONCE)]
        mine: dict[int, np.ndarray] = {}
        memory = ""
        for start in range(0, len(todo), self.world.size):
            if self.world.max(int(self.world.stop)):
                break
            number = start + self.world.rank
            if number < len(todo) and not memory:
                try:
                    mine[number] = self._piece(*todo[number])
                except torch.OutOfMemoryError as error:
                    memory = str(error).splitlines()[0]
        self.pipe.to("cpu")
        found = self.world.gather((mine, memory))
        lacking = next((f"rank {rank}: {words}" for rank, (_, words) in enumerate(found) if words), "")
        if lacking and self.world.is_main:
            logging.warning("the previews of step %d are left out, for lack of memory beside the training (%s)", step, lacking)
        done = {number: piece for part, _ in found for number, piece in part.items()}
        if len(done) < len(todo):
            return None
        per_row = COLUMNS // AT_ONCE
        return [[done[row * per_row + i] for i in range(per_row)] for row in range(len(self.prompts))]

    def _piece(self, prompt: str, first: int) -> np.ndarray:
        cfg, pipe = self.cfg, self.pipe.to(self.world.device)
        shape = diffusion.latent_shape(pipe, cfg.prepare.size)
        noise = np.stack([sample_rng(cfg.seed, 2**40 + first + i).standard_normal(shape, np.float32) for i in range(AT_ONCE)])
        text, negative = (diffusion.encode_prompts(pipe, [words], cfg.prepare.size) for words in (prompt, cfg.generate.negative_prompt))
        return diffusion.sample(pipe, text, negative, noise, cfg.generate.steps, cfg.generate.guidance)

    def _strip(self) -> np.ndarray:
        """Time goes to the right: the first images of each prompt, under the number of steps."""
        side, columns = self.cfg.prepare.size, []
        for path in sorted(self.folder.glob("[0-9]*.png")):
            sheet = np.asarray(Image.open(path).convert("RGB"))[:, : side * IN_STRIP]
            label = Image.new("RGB", (sheet.shape[1], 14), "white")
            ImageDraw.Draw(label).text((2, 1), f"{int(path.stem):,}", fill="black")
            columns += [np.concatenate([np.asarray(label), sheet]), np.full((sheet.shape[0] + 14, 3, 3), 255, np.uint8)]
        return np.concatenate(columns[:-1], axis=1)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
