"""The values of a checkpoint by name, as DCP flattens nested containers: names are joined by dots.

Unlike DCP, it refuses by name what would be lost or never end: keys of other classes than str and int, two values of
one name, a container inside of itself. What is lost all the same, empty dicts and the class of int keys, is noted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


_MAX_DEPTH = 100
_MAX_VALUES = 1 << 20  # a small file can hold a dict that is there 2**1000 times


@dataclass
class Leaves:
    """Values by name, and the names of dicts that lose something: all (empty), or the class of their keys."""

    values: dict[str, Any] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    int_keys: list[str] = field(default_factory=list)


def leaves_of(loaded: Any) -> Leaves:
    """The values in ``loaded``; raises ValueError, with the name, if they cannot be told by name."""
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"Expected SRC to hold a dict, whose values have names, got {_kind(loaded)}. (Did you mean to write a "
            ".pt file?)"
        )
    found = Leaves()
    for name, value in _walk(loaded, found):
        if name in found.values:
            raise ValueError(
                f"Expected names that differ when they are joined by dots, got {name!r} twice. (Did you mean to "
                "write a .pt file?)"
            )
        found.values[name] = value
        if len(found.values) > _MAX_VALUES:
            raise ValueError(
                f"Expected at most {_MAX_VALUES:,} values, got more. (Is a container shared again and again?)"
            )
    return found


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if isinstance(value, torch.nn.Module):
        return f"a module, {type(value).__name__}, instead of its state dict"
    return f"a {type(value).__name__}"


def _walk(root: Any, found: Leaves) -> Iterator[tuple[str, Any]]:
    stack: list[tuple[str, Any, tuple[int, ...]]] = [("", root, ())]
    while stack:
        name, value, around = stack.pop()
        if not isinstance(value, Mapping) and _is_leaf(value):
            yield name, value
            continue
        if id(value) in around or len(around) == _MAX_DEPTH:
            what = (
                "in more than 100 others"
                if len(around) == _MAX_DEPTH
                else "inside of itself"
            )
            raise ValueError(
                f"Expected values in nested dicts and lists, got {name!r}, a container {what}. (Did you mean to "
                "write a .pt file?)"
            )
        if not value and value is not root:
            found.empty.append(name)
        around = (*around, id(value))
        inner = [
            (f"{name}.{key}" if around[1:] else key, item, around)
            for key, item in _items(name, value, found)
        ]
        stack += reversed(inner)


def _items(name: str, value: Any, found: Leaves) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(str(i), item) for i, item in enumerate(value)]
    others = [key for key in value if type(key) is not str]
    if any(type(key) is not int for key in others):
        key = next(key for key in others if type(key) is not int)
        raise ValueError(
            f"Expected keys of dicts to be str or int, got {key!r}, a {type(key).__name__}, in "
            f"{repr(name) if name else 'the dict at the top'}. (Did you mean to write a .pt file?)"
        )
    if others:
        found.int_keys.append(name)
    return [(str(key), item) for key, item in value.items()]


def _is_leaf(value: Any) -> bool:
    """Whether DCP takes it as a whole: all but dicts, and lists with a tensor or a dict in them at some depth."""
    if not isinstance(value, list):
        return True
    pending = [value]
    seen: set[int] = set()
    while pending:
        items = pending.pop()
        if id(items) in seen:
            continue
        seen.add(id(items))
        for item in items:
            if isinstance(item, (torch.Tensor, Mapping)):
                return False
            if isinstance(item, list):
                pending.append(item)
    return True
