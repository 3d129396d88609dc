"""An engine as a folder: `plan.json` and `weights.safetensors`.

plan.json            {"format", "version", "crc32" of the plan's text, "plan": {..., "tensors",
                     "weights"}}: the graph (`plan_json.py`), shape and coding of each weight, size
                     and checksum of the other file
weights.safetensors  `<number>.values` and perhaps `<number>.index` of each weight (`codec.py`)

A file is material to judge. Reading checks sizes and checksums, then the form, then the parts of
every weight against its declared shape; then the graph is held against its own rules. Weights are
decoded when a plan packs them. No code is in it, and no operator runs that `aten.may_be_saved` does
not know.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsemtl.engine import aten, codec, saved_choices
from sparsemtl.engine.deferred import from_coded, values
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.plan_json import (
    check_freedom,
    dtype_name,
    dtype_of,
    from_json,
    integer,
    shape_of,
    to_json,
)
from sparsemtl.engine.saved_choices import Choices
from sparsemtl.errors import EngineFileError

FORMAT, VERSION = "sparsemtl-engine", 1
PLAN, WEIGHTS = "plan.json", "weights.safetensors"
DTYPES = ("float32", "bfloat16")
MOST_PLAN_BYTES = 1 << 25

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save_graph(
    graph: Graph,
    folder: Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
    choices: Choices | None = None,
) -> None:
    """Write a graph; a reader finds all of it or nothing.

    dtype:  "bfloat16" rounds the values of matrices and kernels, not biases
    about:  plain data to keep with it
    choices: what was timed, for readers on the same machine
    raises: ValueError for another dtype, an operator that may not be read again, or a folder that
            holds something
    """
    if dtype not in DTYPES:
        raise ValueError(f"engine: Expected dtype to be one of {DTYPES}, got {dtype!r}")
    check_free(folder, overwrite)
    plan, tensors = _plan_and_tensors(graph, torch.bfloat16 if dtype == "bfloat16" else None)
    plan["about"] = about or {}
    plan["choices"] = saved_choices.to_json(choices or {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "engine"
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        size = (fresh / WEIGHTS).stat().st_size
        plan["weights"] = {"bytes": size, "crc32": _checksum(fresh / WEIGHTS)}
        crc32 = zlib.crc32(json.dumps(plan, sort_keys=True).encode())
        whole = {"format": FORMAT, "version": VERSION, "crc32": crc32, "plan": plan}
        (fresh / PLAN).write_text(json.dumps(whole, sort_keys=True), encoding="utf-8")
        (fresh / WEIGHTS).chmod((fresh / PLAN).stat().st_mode)  # safetensors' own is 0600
        for name in (PLAN, WEIGHTS):
            _flush(fresh / name)
        if folder.exists():
            folder.rename(Path(temporary) / "before")
        fresh.rename(folder)


def load_graph(folder: Path) -> tuple[Graph, dict[str, Any], Choices]:
    """Read and check a folder: the graph, its weights deferred; what it is about; what was timed.

    raises: EngineFileError (a ValueError) naming what is wrong; it runs nothing of the graph
    """
    if not (folder / PLAN).is_file() or not (folder / WEIGHTS).is_file():
        raise EngineFileError(f"engine: Expected a folder with {PLAN} and {WEIGHTS}, got {folder}")
    try:
        plan = _read_plan(folder / PLAN)
        _check_weights_file(plan, folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            graph = from_json(plan, _Weights(plan.get("tensors"), file))
        _check_operators(graph)
        graph.validate()
        check_freedom(graph)
        if not isinstance(plan.get("about"), dict):
            raise ValueError("Expected 'about' to be an object, got something else")
        choices = saved_choices.from_json(plan.get("choices", []))
    except (ValueError, SafetensorError, OSError, RecursionError) as error:
        raise EngineFileError(
            f"engine: Expected a sound engine in {folder}, got: {error}"
        ) from error
    return graph, plan["about"], choices


def _plan_and_tensors(
    graph: Graph, values_dtype: torch.dtype | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _check_operators(graph)
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}

    def add(weight: Tensor) -> int:
        if id(weight) in numbers:
            return numbers[id(weight)]
        number = numbers[id(weight)] = len(entries)
        rounded = values_dtype if weight.dim() >= 2 else None
        coding, parts = codec.encode(values(weight).cpu(), rounded)
        for name, part in parts.items():
            tensors[f"{number}.{name}"] = part.clone()  # one file entry each, nothing shared
        entry = {"coding": coding, "dtype": dtype_name(weight.dtype), "parts": sorted(parts)}
        entries.append({**entry, "shape": list(weight.shape)})
        return number

    plan = to_json(graph, add)
    plan["tensors"] = entries
    return plan, tensors


def check_free(folder: Path, overwrite: bool) -> None:
    """raises: ValueError unless an engine may be written there"""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite or not (folder / PLAN).is_file():
        hint = "; overwrite=True replaces an engine" if (folder / PLAN).is_file() else ""
        raise ValueError(f"engine: Expected a new or empty folder, got {folder}{hint}")


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _read_plan(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MOST_PLAN_BYTES:
        raise ValueError(f"Expected {PLAN} of at most {MOST_PLAN_BYTES} bytes, got {size}")
    text = path.read_bytes()
    whole = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"Expected format {FORMAT!r} in {PLAN}, got another file")
    if whole.get("version") != VERSION:
        raise ValueError(
            f"Expected version {VERSION} of {FORMAT}, got {str(whole.get('version'))[:40]!r}. "
            "Save the engine with this version of sparsemtl, or read it with the one that wrote it"
        )
    plan = whole.get("plan")
    if not isinstance(plan, dict):
        raise ValueError(f"Expected a plan in {PLAN}, got {type(plan).__name__}")
    if zlib.crc32(json.dumps(plan, sort_keys=True).encode()) != whole.get("crc32"):
        raise ValueError(f"Expected the checksum of {PLAN}, got another: it was changed")
    return plan


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: readers disagree on which of two counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Expected each name once in an object of {PLAN}, got {twice!r:.40} twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"Expected JSON numbers, got {name}")


def _check_weights_file(plan: dict[str, Any], path: Path) -> None:
    declared = plan.get("weights")
    if not isinstance(declared, dict):
        raise ValueError(f"Expected size and checksum of {WEIGHTS}, got {type(declared).__name__}")
    size = path.stat().st_size
    if declared.get("bytes") != size or size == 0:
        raise ValueError(f"Expected {WEIGHTS} of {declared.get('bytes')} bytes, got {size}")
    if _checksum(path) != declared.get("crc32"):
        raise ValueError(f"Expected the checksum of {WEIGHTS}, got another: it was changed")


def _checksum(path: Path) -> int:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return zlib.crc32(mapped)


def _check_operators(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "torch" and not aten.may_be_saved(str(node.attrs.get("target"))):
            raise ValueError(
                f"engine: Expected operators that a file may name at {node.name!r}, got "
                f"{node.attrs.get('target')!r}. Keep the engine in memory, or take this part out "
                "of the model"
            )


class _Weights:
    """Number → weight. Every entry is held against the file before the first is read."""

    def __init__(self, entries: Any, file: Any) -> None:
        if not isinstance(entries, list):
            raise ValueError(f"Expected a list of tensors, got {type(entries).__name__}")
        self._file = file
        self._known: dict[int, Tensor] = {}
        names = set(file.keys())
        self._entries = [
            self._checked(number, entry, names) for number, entry in enumerate(entries)
        ]
        if names:
            raise ValueError(f"Expected tensors that the plan names, got {sorted(names)[:3]} too")
        total = sum(was.itemsize * prod(shape) for shape, _, _, was in self._entries)
        if total > physical_memory():
            raise ValueError(f"Expected weights that fit this machine's memory, got {total} bytes")

    def _checked(
        self, number: int, entry: Any, names: set[str]
    ) -> tuple[tuple[int, ...], str, list[str], torch.dtype]:
        if not isinstance(entry, dict) or entry.get("coding") not in codec.CODINGS:
            raise ValueError(f"Expected a coding in {codec.CODINGS} of tensor {number}")
        shape = shape_of(entry.get("shape"), f"the shape of tensor {number}")
        parts = ["values"] if entry["coding"] == "dense" else ["values", "index"]
        if sorted(parts) != entry.get("parts"):
            raise ValueError(f"Expected parts {parts} of tensor {number}, got others")
        sizes = {}
        for part in parts:
            name = f"{number}.{part}"
            if name not in names:
                raise ValueError(f"Expected {name!r} in {WEIGHTS}, got no such tensor")
            names.remove(name)
            view = self._file.get_slice(name)
            dtype = _SAFETENSORS.get(view.get_dtype())
            if dtype is None or len(view.get_shape()) != 1:
                raise ValueError(f"Expected {name!r} to be a row of numbers")
            sizes[part] = (dtype, view.get_shape()[0])
        was = dtype_of(entry.get("dtype"))
        narrowed = was is torch.float32 and sizes["values"][0] is torch.bfloat16
        if (entry["coding"] != "dense" and was is not torch.float32) or not (
            narrowed or sizes["values"][0] is was
        ):
            raise ValueError(f"Expected values of {was} in tensor {number}, got others")
        codec.check(entry["coding"], shape, sizes)
        return shape, entry["coding"], parts, was

    def __call__(self, number: int) -> Tensor:
        if number not in self._known:
            integer(number, "the number of a weight", 0, len(self._entries) - 1)
            shape, coding, parts, was = self._entries[number]
            read = {part: self._file.get_tensor(f"{number}.{part}") for part in parts}
            self._known[number] = from_coded(coding, shape, read, was)
        return self._known[number]


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
