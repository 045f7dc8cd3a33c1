"""``python -m torch_ext inspect FILE``: what a file of weights holds, without reading its tensors.

It opens what ``torch.load(lazy=True)`` opens. Names, shapes, dtypes and which tensors share a storage (ties) are in the
file's index. What ``weights_only`` refuses is refused here, too: to look at a file runs nothing of it. (Of a sparse
tensor torch reads the indices.)
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import rich.filesize
import torch

import torch_ext
from torch_ext._tools.load import load
from torch_ext._tools.torchscript import refuse_torchscript


Path = tuple[str, ...]

_LARGE = 4096  # bytes of a storage, of which what is not used is told
_MAX_DEPTH = 100  # of containers in containers, and of dots in a name


@dataclass(frozen=True)
class Tensor:
    """What there is to know of one tensor; ``storage`` numbers the storages of a file, -1 for none of its own."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    storage: int

    @property
    def name(self) -> str:
        """The path as module names are written."""
        return ".".join(self.path)


class Note(str):
    """Stands for a container that is not looked into."""

    __slots__ = ()


@dataclass(frozen=True)
class Other:
    """What is no tensor."""

    path: Path
    value: Any


@dataclass(frozen=True)
class Contents:
    """What a file holds, in its order, and the bytes of each storage."""

    leaves: list[Tensor | Other]
    storages: list[int]

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @cached_property
    def used(self) -> list[int]:
        """The bytes of the tensors of each storage, those that are in several counted for each."""
        found = [0] * len(self.storages)
        for tensor in self.tensors:
            if tensor.storage >= 0:
                found[tensor.storage] += tensor.nbytes
        return found

    @property
    def ties(self) -> list[list[Tensor]]:
        """Tensors that share a storage, by storage."""
        groups: dict[int, list[Tensor]] = {}
        for tensor in self.tensors:
            if tensor.storage >= 0 and self.storages[tensor.storage]:
                groups.setdefault(tensor.storage, []).append(tensor)
        return [group for group in groups.values() if len(group) > 1]


def main(path: str, as_json: bool) -> int:
    """Print what ``path`` holds; returns the exit status."""
    try:
        contents = read(path)
    except Exception as e:
        print(f"torch_ext: {path}: {e}", file=sys.stderr)
        return 1
    size = os.path.getsize(path) if os.path.isfile(path) else None
    print(_json(path, size, contents) if as_json else _text(path, size, contents))
    return 0


def read(path: str) -> Contents:
    """Look at a file; none of its tensors' data are read."""
    refuse_torchscript(path)
    with torch_ext.enable("load_lazy"):
        return _contents(load(path))


def _contents(loaded: Any) -> Contents:
    contents = Contents([], [])
    numbers: dict[int, int] = {}
    for where, value in _leaves(loaded):
        if not isinstance(value, torch.Tensor):
            contents.leaves.append(Other(where, value))
            continue
        number = -1
        if value.layout is torch.strided:
            key, size = _storage(value)
            number = numbers.setdefault(key, len(numbers))
            if number == len(contents.storages):
                contents.storages.append(size)
        dtype = str(value.dtype).removeprefix("torch.")
        nbytes = value.numel() * value.element_size()
        shape = tuple(value.shape)
        contents.leaves.append(Tensor(where, dtype, shape, nbytes, number))
    return contents


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others, and its size."""
    # NB: here, since it is found while the patch is on, and not before.
    from torch._load_lazy._deferred_tensor import (  # type: ignore[import-not-found]
        deferral_of,
    )

    deferral = deferral_of(tensor)
    if deferral is not None:
        return id(deferral.storage), deferral.storage.contents.nbytes
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _leaves(root: Any) -> Iterator[tuple[Path, Any]]:
    """What is in nested containers, with the way to it."""
    stack: list[tuple[Path, Any]] = [((), root)]
    seen: dict[int, Path] = {}
    while stack:
        path, value = stack.pop()
        if not isinstance(value, (dict, list, tuple)) or not value:
            yield path, value
        # NB: a small file can hold a container that contains itself, or that is there 2**1000 times.
        elif id(value) in seen:
            yield path, Note(f"is {'.'.join(seen[id(value)]) or 'the whole'}")
        elif len(path) == _MAX_DEPTH:
            yield path, Note("goes deeper")
        else:
            seen[id(value)] = path
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = [((*path, str(key)), item) for key, item in items]
            stack += reversed(inner)


def _json(path: str, size: int | None, contents: Contents) -> str:
    ties = [[list(tensor.path) for tensor in group] for group in contents.ties]
    tensors = [
        {
            "path": list(tensor.path),
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "storage": tensor.storage if tensor.storage >= 0 else None,
        }
        for tensor in contents.tensors
    ]
    found = {
        "file": path,
        "file_bytes": size,
        "storage_bytes": contents.storages,
        "tensors": tensors,
        "ties": ties,
        "others": [
            {"path": list(leaf.path), "value": _short(leaf.value)}
            for leaf in contents.leaves
            if isinstance(leaf, Other)
        ],
    }
    return json.dumps(found, indent=1)


def _text(path: str, size: int | None, contents: Contents) -> str:
    tied = {t.path: group[0] for group in contents.ties for t in group[1:]}
    rows: dict[Path, tuple[str, ...]] = {}
    for leaf in contents.leaves:
        if isinstance(leaf, Tensor):
            tied_to = tied.get(leaf.path)
            tie = f"shares {_printable(tied_to.name)}" if tied_to else ""
            of = _of_storage(leaf, contents)
            tie = ", ".join(filter(None, (tie, of and f"of a storage of {of}")))
            nbytes = rich.filesize.decimal(leaf.nbytes)
            cells: tuple[str, ...] = leaf.dtype, str(list(leaf.shape)), nbytes, tie
        else:
            cells = (_short(leaf.value),)
        rows[_levels(leaf.path)] = cells
    lines = _tree(rows)
    label = max((len(line) for line, _ in lines), default=0)
    widths = [
        max((len(cells[i]) for _, cells in lines if len(cells) > 1), default=0)
        for i in range(3)
    ]
    text = [path]
    for line, cells in lines:
        padded = [cell.ljust(w) for cell, w in zip(cells, widths, strict=False)]
        if len(cells) == 1:
            padded = list(cells)
        text.append("  ".join([line.ljust(label), *padded, *cells[3:]]).rstrip())
    return "\n".join([*text, "", _summary(size, contents)])


def _of_storage(tensor: Tensor, contents: Contents) -> str:
    """The size of a tensor's storage, if the tensors use a small part of it: the file is larger than they are."""
    if tensor.storage < 0:
        return ""
    size, used = contents.storages[tensor.storage], contents.used[tensor.storage]
    return rich.filesize.decimal(size) if size >= _LARGE and 2 * used <= size else ""


def _summary(size: int | None, contents: Contents) -> str:
    total = rich.filesize.decimal(sum(contents.storages))
    of_file = "" if size is None else f" of a file of {rich.filesize.decimal(size)}"
    ties = len(contents.ties)
    tensors = f"{len(contents.tensors):,} tensor{'s'[: len(contents.tensors) != 1]}"
    storages = f"{len(contents.storages):,} storage{'s'[: len(contents.storages) != 1]}"
    shared = f", {ties:,} of them shared" if ties else ""
    used = sum(map(min, contents.used, contents.storages))
    is_small = 2 * used <= sum(contents.storages) >= _LARGE
    of_use = f", tensors use {rich.filesize.decimal(used)}" if is_small else ""
    return f"{tensors} in {storages}{shared}: {total}{of_file}{of_use}"


def _levels(path: Path) -> Path:
    """The path with each name cut at its dots, as modules nest."""
    return tuple(part for name in path for part in name.split(".", _MAX_DEPTH))


def _tree(rows: dict[Path, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """Lines of the tree, each with its cells; a level that holds one name alone stands on that name's line."""
    children: dict[Path, dict[Path, None]] = {}
    for path in rows:
        for i in range(len(path), 0, -1):
            children.setdefault(path[: i - 1], {})[path[:i]] = None
    lines: list[tuple[str, tuple[str, ...]]] = []
    stack: list[tuple[Path, int, int]] = [((), 0, 0)]
    while stack:
        path, shown, depth = stack.pop()
        inner = list(children.get(path, ()))
        if len(inner) == 1 and path not in rows:
            stack.append((inner[0], shown, depth))
            continue
        if path or path in rows:
            name = _printable(".".join(path[shown:]))
            lines.append(("  " * depth + name, rows.get(path, ())))
        stack += [(p, len(path), depth + 1) for p in reversed(inner)]
    return lines


def _printable(name: str) -> str:
    """The name, with escapes for what would tell a terminal to do something, or can't be encoded."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _short(value: Any) -> str:
    if isinstance(value, Note):
        return _printable(value)
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{type(value).__name__} {text}"
