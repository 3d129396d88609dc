"""Ways to damage an engine folder: bytes, lengths, fields, headers, links."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsemtl.engine.file import PLAN, WEIGHTS

NUMBERS = (0, -1, 1, 2, 7, 255, 256, 1 << 16, 1 << 31, -(1 << 31), 1 << 40, 1 << 63, 1 << 200)
OTHERS = (None, True, False, "", "x", "relu", 0.5, -0.0, 1e308, [], {}, [[]], "d0_2*9", "9" * 5000)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U8", "BOOL", "F8_E4M3", "C64", "X")


def mutate(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Change a folder in one to three ways.

    returns: what was done, and whether checksums were made to fit again, so that the checks behind
             them are met
    """
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice((PLAN, PLAN, WEIGHTS))
        done.append(rng.choice(_OF_FILES)(folder / name, rng))
        if rng.random() < 0.5:
            done.append(_fields(folder, rng))
        if rng.random() < 0.15:
            done.append(_header(folder, rng))
        if rng.random() < 0.1:
            done.append(_as_text(folder, rng))
    fresh = rng.random() < 0.7
    if fresh:
        done.append(_fresh_checksums(folder))
    if rng.random() < 0.04:
        done.append(_link(folder, rng))
    return ", ".join(done), fresh


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    # The header of safetensors is where its structure stands.
    size = min(len(data), rng.choice((64, 4096, len(data))))
    for _ in range(rng.randint(1, 8)):
        if size:
            data[rng.randrange(size)] = rng.randrange(256)
    path.write_bytes(data)
    return f"bytes of {path.name}"


def _truncate(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(
        data[: rng.randrange(len(data) + 1)] if rng.random() < 0.8 else data + b"\0" * 9
    )
    return f"length of {path.name}"


def _move(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if len(data) > 2:
        a, b = sorted(rng.sample(range(len(data)), 2))
        data[a:b] = data[b - 1 : a - 1 if a else None : -1]
        path.write_bytes(data)
    return f"order in {path.name}"


def _nothing(path: Path, rng: random.Random) -> str:
    return "nothing"


_OF_FILES: tuple[Callable[[Path, random.Random], str], ...] = (
    *(_flip, _truncate, _move),
    *(_nothing,) * 4,
)


def _fields(folder: Path, rng: random.Random) -> str:
    """Another number or word in one place of the plan, or two places exchanged."""
    try:
        whole = json.loads((folder / PLAN).read_bytes())
    except (ValueError, RecursionError):
        return "unreadable already"
    places = list(_places(whole))
    if not places:
        return "empty already"
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.4:
        other, other_key = rng.choice(places)
        holder[key], other[other_key] = other[other_key], holder[key]
    elif kind < 0.7:
        holder[key] = rng.choice(NUMBERS)
    elif kind < 0.8 and isinstance(holder[key], int | float):
        holder[key] += rng.choice((-1, 1))
    elif kind < 0.9:
        del holder[key]
    else:
        holder[key] = rng.choice(OTHERS)
    try:
        (folder / PLAN).write_text(json.dumps(whole, sort_keys=True))
    except (ValueError, RecursionError):
        return "no JSON"
    return f"field {key}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def _as_text(folder: Path, rng: random.Random) -> str:
    """What JSON's grammar allows or nearly does: NaN, nesting, names twice, numbers too long."""
    text = (folder / PLAN).read_bytes().decode("utf-8", "replace")
    numbers = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1 : i] in (" ", "[")]
    if not numbers:
        return "no numbers"
    at = rng.choice(numbers)
    end = at
    while end < len(text) and text[end].isdigit():
        end += 1
    kind = rng.choice(("NaN", "Infinity", "1e999", "-", "9" * 6000, "deep", "twice", "text"))
    if kind == "deep":
        depth = rng.choice((50, 900, 5000, 200_000))
        text = text[:at] + "[" * depth + "1" + "]" * depth + text[end:]
    elif kind == "twice":
        brace = text.index("{", at) if "{" in text[at:] else 0
        key = rng.choice(("version", "shape", "op", "name", "attrs", "coding", "weights", "plan"))
        text = f'{text[: brace + 1]}"{key}": {rng.choice(NUMBERS)}, {text[brace + 1 :]}'
    elif kind == "text":
        text = text[:at] + "\udcff\x00" + text[end:]
    else:
        text = text[:at] + kind + text[end:]
    (folder / PLAN).write_bytes(text.encode("utf-8", "surrogateescape"))
    return f"plan with {kind[:8]}"


def _header(folder: Path, rng: random.Random) -> str:
    """The header of the weights' file: its length, and type, shape and place of its tensors."""
    data = (folder / WEIGHTS).read_bytes()
    kind = rng.choice(("length", "dtype", "shape", "offsets", "swap", "overlap", "name", "cut"))
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        one, two = rng.choice(names), rng.choice(names)
        a, b = header[one], header[two]
        if kind == "dtype":
            a["dtype"] = rng.choice(DTYPES)
        elif kind == "shape":
            a["shape"] = rng.choice(
                ([], [rng.choice(NUMBERS)], [*a["shape"], 1], [2, -3], [1 << 32, 1 << 32], [0])
            )
        elif kind == "offsets":
            a["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
        elif kind == "swap":
            header[one], header[two] = b, a
        elif kind == "overlap":
            a["data_offsets"] = b["data_offsets"]
        elif kind == "name":
            header[rng.choice(("0.values", "7.index", "", "x" * 300))] = header.pop(one)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return "no header"
    text = json.dumps(header).encode()
    length = len(text)
    if kind == "length":
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 27, 1 << 40, (1 << 64) - 1))
    if kind == "cut":
        text = text[: rng.randrange(len(text))]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return f"header {kind}"


def _link(folder: Path, rng: random.Random) -> str:
    """Something else than a file under its name."""
    path = folder / rng.choice((PLAN, WEIGHTS))
    path.unlink()
    kind = rng.choice(("itself", "nowhere", "device", "folder", "directory", "empty"))
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    else:
        places = {"itself": path, "nowhere": folder / "no", "device": "/dev/zero", "folder": folder}
        path.symlink_to(places[kind])
    return f"{path.name} is {kind}"


def _fresh_checksums(folder: Path) -> str:
    try:
        whole = json.loads((folder / PLAN).read_bytes())
        data = (folder / WEIGHTS).read_bytes()
        whole["plan"]["weights"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
        text = json.dumps(whole["plan"], sort_keys=True)
        whole["crc32"] = zlib.crc32(text.encode())
        (folder / PLAN).write_text(json.dumps(whole, sort_keys=True))
    except (ValueError, TypeError, KeyError, RecursionError):
        return "no checksums"
    return "checksums"
