"""`sparsemtl run`: an engine on images; colour maps, depth and normals as pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from sparsemtl.data.image import normalise
from sparsemtl.engine.engine import Engine
from sparsemtl.errors import unknown_choice
from sparsemtl.tasks import TASKS, make_task
from sparsemtl.tasks.pictures import paint_scale, palette
from sparsemtl.training.checkpoint import atomic_write

SIZES = ("engine", "own")


@dataclass
class Run:
    """Run an engine on images and write a picture of every task."""

    engine: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that `sparsemtl compile` wrote."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image files."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the pictures, <image>_<task>.png."""
    size: str = "engine"
    """engine: images are resized to what it was compiled for; own: each keeps its size."""
    executor: str = "auto"
    """auto or native (measured on this machine), sparse (not measured) or torch."""
    device: str = "cpu"
    """cpu, or cuda: the whole model as one CUDA graph, layers as measured on the device."""
    precision: str = "float32"
    """What a CUDA device computes in: float32, bf16 or fp16."""

    def run(self) -> int:
        if self.size not in SIZES:
            raise ValueError(unknown_choice("--size", self.size, SIZES))
        if not self.images:
            raise ValueError("Expected at least one IMAGE, got none")
        stems = [path.stem for path in self.images]
        if len(set(stems)) < len(stems):
            raise ValueError(f"Expected images of different names, got {sorted(stems)}")
        engine = Engine.load(
            self.engine, executor=self.executor, device=self.device, dtype=self.precision
        )
        shape = engine.input_shapes[0]
        if len(engine.input_shapes) != 1 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"Expected an engine of one image [B, 3, H, W], got {shape}")
        for path in self.images:
            picture = read_image(path)
            x = picture
            if self.size == "engine":
                x = _resized(picture, shape[2:])
            x = normalise(x, str(engine.about.get("image_normalisation", "unit")))
            x = x.expand(shape[0] if self.size == "engine" else 1, -1, -1, -1)
            start = time.perf_counter()
            found = {task: y.cpu() for task, y in engine(x.to(self.device)).items()}
            seconds = time.perf_counter() - start
            self._write(path.stem, found, picture.shape[2:], engine.about)
            print(f"{path}  {1000 * seconds:.1f} ms  {', '.join(found)}")
        return 0

    def _write(
        self, stem: str, found: Mapping[str, Tensor], size: torch.Size, about: Mapping[str, Any]
    ) -> None:
        from PIL import Image

        tasks = about.get("tasks")
        for task, value in found.items():
            known = tasks.get(task, {}) if isinstance(tasks, dict) else {}
            picture = Image.fromarray(
                paint(task, value, (size[0], size[1]), str(known.get("kind")))
            )
            target = self.out / f"{stem}_{task.replace('/', '_')}.png"
            atomic_write(target, lambda file, picture=picture: picture.save(file, format="png"))  # type: ignore[misc]


def read_image(path: Path) -> Tensor:
    """[1, 3, H, W] uint8 RGB.   raises: ValueError naming a file that is no image"""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"Expected an image in {path}, got: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def paint(task: str, value: Tensor, size: tuple[int, int], kind: str) -> np.ndarray:
    """A prediction [1.., C, h, w] as uint8 RGB [H, W, 3], in the colours of its kind of task."""
    if value.dim() != 4:
        raise ValueError(
            f"Expected task {task!r} to give maps [B, C, h, w], got {list(value.shape)}"
        )
    channels = value.shape[1]
    smooth = F.interpolate(value[:1].float(), size=size, mode="bilinear", align_corners=False)[0]
    if kind in TASKS:
        return make_task(task, kind, channels).to_picture(smooth)
    if channels == 1:
        return paint_scale(smooth[0].numpy(), None, None)
    return palette(channels)[smooth.argmax(0).numpy()]


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, with antialiasing where it shrinks, as image libraries do it."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image.float(), size=list(size), mode="bilinear", antialias=True)
