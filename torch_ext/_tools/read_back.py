"""Whether what was written reads back as what it was made of: numbers bit for bit, a block of a tensor at a time.

Ties are not looked at, nor are objects of classes without an ``==``, of which the class alone is compared.
"""

import importlib
import io
from collections.abc import Iterator
from typing import Any

import torch

from torch_ext._tools.unread import Unread


_NO_EQUALITY: Any = object.__eq__


def compare(old: Any, new: Any) -> None:
    """Raise RuntimeError with the name of the first value of ``new`` that is not as in ``old``."""
    for name, what in _differences(old, new):
        raise RuntimeError(
            f"Expected {name!r} to read back from DST as it is in SRC, got {what}. Nothing was written. (Did another "
            "program change SRC meanwhile?)"
        )


def _differences(old: Any, new: Any) -> Iterator[tuple[str, str]]:
    # What was compared once is not compared again; a container may be inside of itself.
    seen: dict[tuple[int, int], tuple[Any, Any]] = {}
    stack: list[tuple[str, Any, Any]] = [("", old, new)]
    while stack:
        name, a, b = stack.pop()
        if (id(a), id(b)) in seen:
            continue
        seen[id(a), id(b)] = a, b
        if isinstance(a, (Unread, torch.Tensor)):
            if not _is_same_tensor(_read(a), _read(b)):
                yield name, "another value"
        elif type(a) is not type(b):
            yield name, f"a {type(b).__name__} instead of a {type(a).__name__}"
        elif isinstance(a, dict):
            # NB: not the order, which differs where one of the two is by name.
            lacking = a.keys() ^ b.keys()
            if lacking:
                yield _joined(name, min(lacking, key=str)), "it in one of them alone"
            stack += [(_joined(name, k), v, b[k]) for k, v in a.items() if k in b]
        elif isinstance(a, (list, tuple)):
            if len(a) != len(b):
                yield name, f"{len(b)} items instead of {len(a)}"
            pairs = enumerate(zip(a, b, strict=False))
            stack += [(_joined(name, i), x, y) for i, (x, y) in pairs]
        elif not _is_same_object(a, b):
            yield name, "another value"


def _joined(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Unread) else value


def _is_same_object(a: Any, b: Any) -> bool:
    if isinstance(a, (torch.UntypedStorage, torch.TypedStorage)):
        return _saved(a) == _saved(b)
    if type(a).__eq__ == _NO_EQUALITY:
        return True
    try:
        # NaN is not equal to itself, but written alike.
        return bool(a == b) or repr(a) == repr(b)
    except Exception:  # arrays: neither true nor false
        return repr(a) == repr(b)


def _is_same_tensor(a: Any, b: Any) -> bool:
    if not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    if a.is_nested or a.layout is not torch.strided or a.is_quantized:
        return _saved(a) == _saved(b)
    if a.size() != b.size() or a.is_meta != b.is_meta:
        return False
    return a.is_meta or all(_is_same_block(*pair) for pair in _blocks(a, b))


def _saved(value: Any) -> bytes:
    # Of what has components, all that torch.save knows of it.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _blocks(
    a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # NB: by name, since the module is of a patch.
    reader: Any = importlib.import_module(
        "torch.distributed.checkpoint.torch_save_reader"
    )

    blocks: Iterator[tuple[torch.Tensor, torch.Tensor]] = reader._blocks(
        b.detach(), a.detach()
    )
    return blocks


def _is_same_block(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _bits(block: torch.Tensor) -> torch.Tensor:
    from torch._load_lazy._deferred_tensor import (  # type: ignore[import-not-found]
        deferral_of,
    )

    # NB: a clone of a deferred tensor leaves nothing of what it reads in memory.
    block = block if deferral_of(block) is None else block.clone()
    block = block.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return block.view(torch.int64) if block.numel() % 8 == 0 else block
