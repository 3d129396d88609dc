"""Look at every file of a Vehicle-X folder and list what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsemtl.data.base import DataError, Problem
from sparsemtl.data.vehiclex import LABELS, VehicleXFiles, list_vehiclex, read_picture

LISTS = ("list_color.txt", "list_type.txt")


def vehiclex_problems(root: str | Path) -> tuple[list[Problem], dict[str, int]]:
    """Problems of labels and pictures, and counts of pictures per split.

    A picture without an item, or whose name contradicts its item, is a problem; an item without a
    picture is not, as the published XML lists more than each archive holds.
    """
    try:
        files = list_vehiclex(root)
    except DataError as error:
        problem = error.problem or Problem(str(root), "list", "Vehicle-X labels", str(error))
        return [problem], {"files": 0, "problems": 1}
    problems = list(files.problems)
    problems += [
        Problem(str(files.folder / name), "list", f"an item in {LABELS}", "none")
        for name, _ in files.unmatched
    ]
    problems += [
        Problem(str(files.folder / name), "missing", "the list", "no such file")
        for name in LISTS
        if not (files.folder / name).is_file()
    ]
    problems += _split_problems(files)
    paths = [
        files.folder / split / name for split, names in files.pictures.items() for name in names
    ]
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        found = list(pool.map(_look_at, paths))
    problems += [result for result in found if isinstance(result, Problem)]
    sizes = Counter(result for result in found if isinstance(result, tuple))
    usual = sizes.most_common(1)[0][0] if sizes else None
    for path, result in zip(paths, found, strict=True):
        if isinstance(result, tuple) and result != usual:
            expected = f"{list(usual or ())} (H, W), the size of most images"
            problems.append(Problem(str(path), "size", expected, str(list(result))))
    counts = {split: len(names) for split, names in files.pictures.items()}
    counts["files"] = len(paths) + len(files.unmatched)
    counts["problems"] = len(problems)
    return problems, counts


def _look_at(path: Path) -> tuple[int, int] | Problem:
    """The picture's (H, W), or what is wrong with it."""
    try:
        _, height, width = read_picture(path).shape
    except DataError as error:
        return error.problem or Problem(str(path), "unreadable", "a readable jpg", str(error))
    return height, width


def _split_problems(files: VehicleXFiles) -> Iterator[Problem]:
    """Empty splits, names that contradict the labels, and pictures in two splits."""
    seen: dict[str, str] = {}
    for split, names in files.pictures.items():
        folder = files.folder / split
        if not names and split in ("train", "test"):
            yield Problem(str(folder), "list", f"at least one picture in {split!r}", "none")
        for name in names:
            item = files.items[name]
            expected = f"{item.vehicle + 1:04d}_c{item.camera:03d}_*.jpg, as its item says"
            if not name.startswith(expected.split("*")[0]):
                yield Problem(str(folder / name), "labels", expected, name)
            if name in seen:
                yield Problem(
                    str(folder / name),
                    "duplicate",
                    f"no picture of {seen[name]!r}",
                    "the same name",
                )
            seen[name] = split
