"""`sparsemtl compile`: a finished model into an engine folder that runs faster and is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl.cli.run_folder import RunFolder, load_model, read_json
from sparsemtl.engine.engine import Engine, compile
from sparsemtl.engine.file import check_free
from sparsemtl.engine.target import make_target
from sparsemtl.tasks import TASKS
from sparsemtl.training.checkpoint import write_json


@dataclass
class Compile:
    """Compile a finished model for an input size and save it as an engine folder."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, its model folder, or the model.safetensors in it."""
    input: Annotated[str, tyro.conf.arg(metavar="B,3,H,W")]
    """Shape that it is prepared for, for example 1,3,321,321; others work too."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder for the engine."""
    dtype: str = "float32"
    """Of the saved weights: float32, or bf16 (bfloat16) for half the size."""
    executor: str = "auto"
    """auto or native (measured on this machine), sparse (not measured) or torch."""
    device: str = "cpu"
    """cpu, or cuda: layers are measured there and shown; the folder serves any device."""
    precision: str = "float32"
    """What a CUDA device computes in: float32, bf16 or fp16."""
    onnx: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the dense model with its zeros as ONNX too, compared with ONNX Runtime."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the table of layers here too."""
    quiet: bool = False
    """Do not print the table of layers."""

    def run(self) -> int:
        shape = parse_shape(self.input)
        check_free(self.out, overwrite=False)  # before minutes of work
        make_target("compile", self.device, self.precision)
        folder = find_model(self.model)
        model = load_model(folder)
        engine = compile(
            model,
            shape,
            executor=self.executor,
            device=self.device,
            dtype=self.precision,
            about=about(folder),
        )
        dtype = {"bf16": "bfloat16"}.get(self.dtype, self.dtype)
        engine.save(self.out, dtype=dtype)
        explanation = engine.explain()
        if self.json is not None:
            write_json(self.json, explanation.to_json())
        if not self.quiet:
            print(explanation)
        if self.onnx is not None:
            from sparsemtl.engine.onnx import export_onnx

            errors = export_onnx(model, shape, self.onnx)
            print(f"{self.onnx}  differs by {max(errors.values()):.1e} in ONNX Runtime")
        print(f"{self.out}  {folder_bytes(self.out) / 1e6:.1f} MB")
        return 0


@dataclass
class Explain:
    """Show what runs how in an engine folder, layer by layer, and why."""

    engine: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that `sparsemtl compile` wrote."""
    input: Annotated[str | None, tyro.conf.arg(metavar="B,3,H,W")] = None
    """Another input size than it was compiled for."""
    executor: str = "auto"
    device: str = "cpu"
    """cpu, or cuda: the whole model as one CUDA graph, layers as measured on the device."""
    precision: str = "float32"
    """What a CUDA device computes in: float32, bf16 or fp16."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the table here too."""

    def run(self) -> int:
        engine = Engine.load(
            self.engine, executor=self.executor, device=self.device, dtype=self.precision
        )
        explanation = engine.explain(*([parse_shape(self.input)] if self.input else []))
        if self.json is not None:
            write_json(self.json, explanation.to_json())
        print(explanation)
        return 0


def parse_shape(text: str) -> tuple[int, ...]:
    """ "1,3,321,321" as numbers.   raises: ValueError for anything but four positive integers"""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"Expected --input to be four positive sizes such as 1,3,321,321, got {text!r}"
        )
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class _ModelFolder(RunFolder):
    """A model folder that stands by itself."""

    @property
    def weights(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def model_config(self) -> Path:
        return self.root / "config.json"


def find_model(path: Path) -> RunFolder:
    """The run or model folder that a path means.   raises: ValueError if there is no model"""
    folder = path.parent if path.is_file() else path
    for found in (RunFolder(folder), _ModelFolder(folder)):
        if found.weights.is_file() and (not path.is_file() or path == found.weights):
            return found
    raise ValueError(
        f"Expected MODEL to be a finished run folder, a model folder or a model.safetensors of "
        f"sparsemtl, got {path}. A model of your own is compiled in Python: sparsemtl.compile"
    )


def about(folder: RunFolder) -> dict[str, Any]:
    """What `sparsemtl run` must know beside the network: how images are normalised, the tasks."""
    saved = read_json(folder.model_config, "a model folder")
    data, heads = saved.get("data"), saved.get("heads")
    normalisation = data.get("image_normalisation") if isinstance(data, dict) else None
    tasks = {
        name: {"kind": name if name in TASKS else "", "channels": channels}
        for name, channels in (heads if isinstance(heads, dict) else {}).items()
    }
    return {"image_normalisation": normalisation or "unit", "tasks": tasks}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
