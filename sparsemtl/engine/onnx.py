"""Export to ONNX: the dense model with its zeros, verified against ONNX Runtime.

ONNX has no sparse convolution: runtimes read the file and compute the zeros too. It is for other
machines and tools; for speed there is `compile`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.engine.capture import inference
from sparsemtl.engine.engine import example_inputs
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.sparsify import Sparsity

OPSET = 20
TOLERANCE = 1e-4  # of the largest value of a task


def export_onnx(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | tuple[int, ...],
    path: str | os.PathLike[str],
) -> dict[str, float]:
    """Write a model as ONNX, of the example's input size, after comparing it with the model.

    model:   as for `compile`; returns a dict of task → tensor
    returns: task → largest difference between ONNX Runtime and the model, relative to the task's
             largest value
    raises:  ImportError with the line that installs the extra; RuntimeError if a task differs by
             more than 1e-4, in which case nothing is written
    """
    runtime = _packages()
    if isinstance(getattr(model, "sparsity", None), Sparsity):
        model = finalize(model)  # plain layers: ONNX knows no threshold
    inputs = tuple(_random_like(x) for x in example_inputs(model, example))
    with inference(model), torch.no_grad():
        expected = model(*inputs)
        if not isinstance(expected, dict):
            raise TypeError(
                f"export_onnx: Expected a model that returns a dict of task → tensor, got "
                f"{type(expected).__name__}"
            )
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its own parts
            file = Path(temporary, "model.onnx")
            torch.onnx.export(
                model, inputs, file, dynamo=True, opset_version=OPSET, verbose=False,
                output_names=list(expected), external_data=False,
            )  # fmt: skip
            errors = _compare(runtime, file, inputs, expected)
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f".{target.name}.tmp")
            fresh.write_bytes(file.read_bytes())
            os.replace(fresh, target)
    return errors


def _packages() -> Any:
    try:
        import onnx  # noqa: F401  # what torch.onnx writes with
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {error.name}: pip install 'sparsemtl[export]'"
        ) from error
    return onnxruntime


def _random_like(x: Tensor) -> Tensor:
    """Values for the comparison, the same each time."""
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)


def _compare(
    runtime: Any, file: Path, inputs: Sequence[Tensor], expected: dict[str, Tensor]
) -> dict[str, float]:
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {
        given.name: x.cpu().numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)
    }
    found = dict(zip(expected, session.run(None, feeds), strict=True))
    errors = {}
    for task, value in expected.items():
        difference = (torch.from_numpy(found[task]) - value.cpu()).abs().max()
        errors[task] = float(
            difference / value.abs().max().clamp_min(torch.finfo(value.dtype).tiny)
        )
        if not errors[task] <= TOLERANCE:
            raise RuntimeError(
                f"export_onnx: Expected ONNX Runtime to give the model's outputs, got a relative "
                f"difference of {errors[task]:.2g} in task {task!r}"
            )
    return errors
