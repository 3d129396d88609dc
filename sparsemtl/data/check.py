"""Look at every file of a dataset on disk and list what is wrong, without stopping at the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsemtl.data.base import DataError, Problem
from sparsemtl.data.nyuv2 import LIST_FILE, stored_13
from sparsemtl.data.nyuv2_files import (
    read_depth,
    read_image,
    read_normals,
    read_npy,
    read_segmentation,
)
from sparsemtl.data.nyuv2_layouts import (
    LAYOUTS,
    FrameFiles,
    Listing,
    find_layout,
    list_frames,
)
from sparsemtl.data.vehiclex import find_vehiclex
from sparsemtl.data.vehiclex_check import vehiclex_problems
from sparsemtl.errors import unknown_choice


@dataclass(frozen=True)
class CheckReport:
    """What `check_dataset` found.

    counts: frames per list, "files" looked at, and "problems"
    """

    root: str
    layout: str
    problems: tuple[Problem, ...]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.problems

    def by_kind(self) -> dict[str, int]:
        """Problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def to_json(self) -> dict[str, Any]:
        """The report as a json object; its problems have file, kind, expected and found."""
        problems = [asdict(problem) for problem in self.problems]
        return {**vars(self), "ok": self.ok, "kinds": self.by_kind(), "problems": problems}

    def __str__(self) -> str:
        counted = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        head = f"{self.root} ({self.layout}): {'ok' if self.ok else 'problems found'}; {counted}"
        return "\n".join([head, *(f"  [{p.kind}] {p}" for p in self.problems)])


def check_dataset(
    root: str | Path, layout: str | None = None, list_file: str = LIST_FILE
) -> CheckReport:
    """Read every file that a NYUv2 or Vehicle-X folder lists.

    layout:  adashare (also called nyuv2, as in write_dataset) | mtan | vehiclex; None to find out
    returns: one Problem per unreadable, missing or mis-sized file, label out of range, NaN, inf or
             negative depth, wrong dtype, faulty list entry, frame listed twice or empty list
    raises:  ValueError on an unknown layout
    """
    if layout == "vehiclex" or (layout is None and find_vehiclex(root) is not None):
        problems, counts = vehiclex_problems(root)
        return CheckReport(str(root), "vehiclex", tuple(problems), counts)
    root, names = Path(root), {"nyuv2": "adashare", **{name: name for name in ("auto", *LAYOUTS)}}
    if (layout or "auto") not in names:
        raise ValueError(f"check_dataset: {unknown_choice('layout', layout, [*names, 'vehiclex'])}")
    try:
        found = find_layout(root, names[layout or "auto"], list_file)
        listing = list_frames(root, found, list_file)
    except DataError as error:
        problem = error.problem or Problem(str(root), "list", "a dataset", str(error))
        return CheckReport(str(root), layout or "auto", (problem,), {"files": 0, "problems": 1})
    frames = list(dict.fromkeys(f for frames in listing.frames.values() for f in frames))
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        checked = list(pool.map(lambda files: _check_frame(files, found), frames))
    problems = [*listing.problems, *_list_problems(listing)]
    problems += _file_problems(checked)
    counts = {name: len(frames) for name, frames in listing.frames.items()}
    counts["files"] = sum(len(frame) for frame in checked)
    counts["problems"] = len(problems)
    return CheckReport(str(root), found, tuple(problems), counts)


@dataclass(frozen=True)
class _File:
    """A file with the size it turned out to have, None if it could not be told."""

    path: Path
    size: tuple[int, int] | None
    problems: tuple[Problem, ...]


def _check_frame(files: FrameFiles, layout: str) -> list[_File]:
    checks: list[tuple[Path, Callable[[Path], Any]]] = [
        (files.image, lambda file: read_image(file, layout)),
        (files.segmentation, lambda file: read_segmentation(file, layout, 40).valid),
        (files.normals, lambda file: read_normals(file, layout, "decoded").valid),
        (files.depth, lambda file: read_depth(file).valid),
    ]
    twin = stored_13(files.segmentation)
    if layout == "adashare" and twin.parent.is_dir():
        checks.append(
            (twin, lambda file: read_segmentation(file, layout, 13, stored_13=True).valid)
        )
    found = [_check_file(path, read) for path, read in checks]
    single = {files.depth} if layout == "adashare" else {files.image, files.normals, files.depth}
    for i, file in enumerate(found):
        if file.path in single and not file.problems:
            found[i] = _File(file.path, file.size, _array_problems(file.path, files.depth))
    return found


def _check_file(path: Path, read: Callable[[Path], Any]) -> _File:
    try:
        shape = read(path).shape
    except DataError as error:
        problem = error.problem or Problem(str(path), "unreadable", "a readable file", str(error))
        return _File(path, None, (problem,))
    return _File(path, (shape[0], shape[1]), ())


def _array_problems(path: Path, depth: Path) -> tuple[Problem, ...]:
    """What readers accept and a layout does not: other floating types, and depth below 0."""
    array, problems = read_npy(path), []
    if array.dtype != np.float32:
        problems.append(Problem(str(path), "dtype", "float32", str(array.dtype)))
    negative = int((array < 0).sum()) if path == depth else 0
    if negative:
        found = f"{negative} negative values"
        problems.append(Problem(str(path), "values", "depth >= 0 metres", found))
    return tuple(problems)


def _file_problems(frames: list[list[_File]]) -> Iterable[Problem]:
    """Problems of the files, and of those whose size is not that of most images."""
    sizes = Counter(frame[0].size for frame in frames if frame[0].size is not None)
    usual = sizes.most_common(1)[0][0] if sizes else None
    for frame in frames:
        for file in frame:
            yield from file.problems
            if usual is not None and file.size is not None and file.size != usual:
                expected = f"{list(usual)} (H, W), the size of most images"
                yield Problem(str(file.path), "size", expected, f"{list(file.size)}")


def _list_problems(listing: Listing) -> Iterable[Problem]:
    """Empty lists, frames listed twice, and frames of test that are trained on."""
    source = str(listing.source)
    for name, frames in listing.frames.items():
        if not frames and name in ("train", "test"):
            yield Problem(source, "list", f"at least one frame in {name!r}", "an empty list")
        for files, times in Counter(frames).items():
            if times > 1:
                expected = f"each frame once in {name!r}"
                yield Problem(str(files.image), "duplicate", expected, f"{times} times")
    test = set(listing.frames.get("test", ()))
    for name in ("train", "train1", "train2", "val"):
        for files in dict.fromkeys(listing.frames.get(name, ())):
            if files in test:
                expected = f"no frame of 'test' in {name!r}"
                yield Problem(str(files.image), "duplicate", expected, "the same frame in both")
