"""A checkpoint in several files, as one dict.

An index (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``) tells which of
the files beside it, the shards, has which tensor. Law: the result is what the shards hold,
in the index' order; then, by shard, what the index does not list. What the index lists and
the shard it names lacks, and what two shards have, is an error. No file is opened outside
of the index' folder, but through links in it.

``torch.load`` itself has no such thing.
"""

import json
import os
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

from torch._load_lazy._sniff import BEGINNING, describe


_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
MAX_INDEX = 1 << 28


def find_checkpoint(folder: str) -> str:
    """Returns the path of what a folder holds: a sharded checkpoint's index, or the one file of a small model."""
    for name in _INDICES:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    names = sorted(os.listdir(folder))
    found = [name for name in names if name in _FILES]
    if len(found) == 1:
        return os.path.join(folder, found[0])
    others = found or [name for name in names if name.endswith(_SUFFIXES)]
    shown = " and ".join(others[:4]) + (" and more" if len(others) > 4 else "")
    raise IsADirectoryError(
        f"Expected {folder} to be a file, or to hold the index of a sharded checkpoint ({' or '.join(_INDICES)}) or "
        f"one of {' and '.join(_FILES)}, got a folder with {shown or 'none of them'}. (Did you mean a file in it?)"
    )


def load(path: str, index: bytes, load_shard: Callable[[str], Any]) -> dict[Any, Any]:
    """Returns what the shards hold.

    Args:
        path: of the index
        index: its contents
        load_shard: loads the file of a path
    """
    shard_of = _weight_map(path, index)
    listed: dict[str, list[Any]] = {}
    for key, name in shard_of.items():
        listed.setdefault(name, []).append(key)
    result = dict.fromkeys(shard_of)
    for name, keys in listed.items():
        shard_path = os.path.join(os.path.dirname(path), name)
        shard = _shard(shard_path, path, load_shard)
        for key in keys:
            if key not in shard:
                _bad(shard_path, f"{reprlib.repr(key)}, as {path} says", "no such key")
        for key, value in shard.items():
            other = shard_of.setdefault(key, name)
            if other != name:
                expected = f"{reprlib.repr(key)} in shard {reprlib.repr(other)} alone"
                _bad(path, expected, f"it in {reprlib.repr(name)}, too")
            result[key] = value
    return result


def _shard(
    shard_path: str, path: str, load_shard: Callable[[str], Any]
) -> dict[Any, Any]:
    try:
        shard = load_shard(shard_path)
    except FileNotFoundError as error:
        why = f"No such shard, which {path} lists"
        raise FileNotFoundError(error.errno, why, shard_path) from error
    if not isinstance(shard, dict):
        _bad(shard_path, "a dict, as a shard has", f"a {type(shard).__name__}")
    return shard


def _weight_map(path: str, data: bytes) -> dict[Any, str]:
    """Returns the name of the shard of each key."""
    if len(data) > MAX_INDEX:
        _bad(path, f"an index of at most {MAX_INDEX} bytes", "more")
    try:
        index = json.loads(data.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        found = describe(data[:BEGINNING])
        if found is not None:
            _bad(path, "an index in JSON", found.kind, found.remedy)
        _bad(path, "an index in JSON", f"{type(error).__name__} ({error})")
    weight_map = index.get("weight_map") if type(index) is dict else index
    if type(weight_map) is not dict:
        _bad(path, "an object 'weight_map'", reprlib.repr(weight_map))
    for key, name in weight_map.items():
        if type(name) is not str or not _is_plain(name):
            what = f"{reprlib.repr(name)} for {reprlib.repr(key)}"
            _bad(path, "names of files beside it as its shards", what)
    return weight_map


def _is_plain(name: str) -> bool:
    # NB: whatever the system, since what is a name on one is a path on another.
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name[:80]!r} is there twice")
        result[name] = value
    return result


def _bad(path: str, expected: str, got: str, remedy: str = "") -> NoReturn:
    remedy = remedy or "Are the files of one checkpoint, and complete?"
    raise RuntimeError(f"Expected {path} to have {expected}, got {got}. ({remedy})")
