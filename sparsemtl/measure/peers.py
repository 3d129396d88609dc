"""Who else can run a model: each saves it in its own form, loads that, and predicts.

Saving and loading are apart so that load time, bytes and memory can be taken of what a deployment
would do: read its file in a fresh process.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.cuda_graph import CudaGraph

Predict = Callable[[Tensor], Mapping[str, Tensor]]
OPSET = 20


class PeerMissing(RuntimeError):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    save: model in evaluation mode, example input, empty folder → what was written, below it
    load: that path, example input → a function from input to task → output
    devices: where it runs; there the example input is
    """

    name: str
    save: Callable[[nn.Module, Tensor, Path], Path]
    load: Callable[[Path, Tensor], Predict]
    devices: tuple[str, ...] = ("cpu", "cuda")


def file_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _save_torch(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save(model, path)
    return path


def _save_bf16(model: nn.Module, x: Tensor, folder: Path) -> Path:
    return _save_torch(copy.deepcopy(model).bfloat16(), x, folder)


def _read(path: Path, **layout: Any) -> nn.Module:
    model: nn.Module = torch.load(path, weights_only=False)  # our own file, written just before
    return model.eval().to(**layout)


def _load_torch(path: Path, x: Tensor) -> Predict:
    layout = torch.contiguous_format
    return torch.no_grad()(_read(path, device=x.device, memory_format=layout))


def _load_channels_last(path: Path, x: Tensor) -> Predict:
    last = torch.channels_last
    model = _read(path, device=x.device, memory_format=last)
    return torch.no_grad()(lambda image: model(image.contiguous(memory_format=last)))


def _load_bf16(path: Path, x: Tensor) -> Predict:
    last = torch.channels_last
    model = _read(path, device=x.device, memory_format=last)
    kind = torch.bfloat16
    return torch.no_grad()(lambda image: model(image.to(kind).contiguous(memory_format=last)))


def _load_compiled(path: Path, x: Tensor) -> Predict:
    from torch._inductor import config

    torch._dynamo.reset()
    model = _read(path, device=x.device, memory_format=torch.channels_last)
    with config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(model, dynamic=False)
        compiled(x)
    return torch.no_grad()(lambda image: compiled(image))


def _load_compiled_graph(path: Path, x: Tensor) -> Predict:
    """The compiled model in the type of its file, as one CUDA graph over a static input."""
    from torch._inductor import config

    torch._dynamo.reset()
    last = torch.channels_last
    model = _read(path, device=x.device, memory_format=last)
    kind = next(model.parameters()).dtype
    static = x.detach().to(kind, copy=True).contiguous(memory_format=last)
    with config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(model, dynamic=False)
        compiled(static)
    graph = CudaGraph(lambda: compiled(static), x.device)

    def predict(image: Tensor) -> Mapping[str, Tensor]:
        static.copy_(image)
        graph.replay()
        found: Mapping[str, Tensor] = graph.result
        return found

    return torch.no_grad()(predict)


class _Tuple(nn.Module):
    """A model whose outputs are a tuple, in the tasks' order: exchange formats know no dicts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x).values())


def _tasks(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        return list(model(x))


def _save_onnx(model: nn.Module, x: Tensor, folder: Path) -> Path:
    _need("onnx", "sparsemtl[export]")
    _need("onnxscript", "sparsemtl[export]")
    path = folder / "model.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Tuple(model).eval(),
            (x,),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=_tasks(model, x),
            verbose=False,
        )
    return folder


def _load_onnxruntime(path: Path, x: Tensor) -> Predict:
    runtime = _need("onnxruntime", "sparsemtl[export]")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(
        str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def predict(image: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"image": image.numpy()})
        return {n: torch.from_numpy(f) for n, f in zip(names, found, strict=True)}

    return predict


def _load_openvino(path: Path, x: Tensor) -> Predict:
    return _openvino(path, "f32")


def _load_openvino_bf16(path: Path, x: Tensor) -> Predict:
    return _openvino(path, "bf16")


def _openvino(path: Path, precision: str) -> Predict:
    openvino = _need("openvino", "openvino")
    options = {
        "INFERENCE_PRECISION_HINT": precision,  # left open, it depends on the processor
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise PeerMissing(
            "OpenVINO computes in bfloat16 on processors with AVX512_BF16 or AMX only"
        )
    compiled = core.compile_model(str(path / "model.onnx"), "CPU", options)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def predict(image: Tensor) -> dict[str, Tensor]:
        request.infer([image.numpy()])
        found = [request.get_output_tensor(i).data for i in range(len(names))]
        return {n: torch.from_numpy(f) for n, f in zip(names, found, strict=True)}

    return predict


def _save_for_openvino(model: nn.Module, x: Tensor, folder: Path) -> Path:
    _need("openvino", "openvino")
    return _save_onnx(model, x, folder)


def _need(package: str, install: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PeerMissing(f"{package} is not installed: pip install '{install}'") from error


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", _save_torch, _load_torch),
        Peer("torch-channels-last", _save_torch, _load_channels_last),
        Peer("torch-compile", _save_torch, _load_compiled),
        Peer("torch-bf16", _save_bf16, _load_bf16),
        Peer("torch-compile-graph", _save_torch, _load_compiled_graph, ("cuda",)),
        Peer("torch-compile-graph-bf16", _save_bf16, _load_compiled_graph, ("cuda",)),
        Peer("onnxruntime", _save_onnx, _load_onnxruntime, ("cpu",)),
        Peer("openvino", _save_for_openvino, _load_openvino, ("cpu",)),
        Peer("openvino-bf16", _save_for_openvino, _load_openvino_bf16, ("cpu",)),
    )
}
