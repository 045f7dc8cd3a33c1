"""Checks the indices of sparse tensors and the metadata of nested ones that torch's own unpickler has made.

Their first use trusts them, and reads and writes where they say. Law: after ``check`` no sparse or nested tensor in a
result leads outside of its memory; each that torch's own invariants allow passes, and compressed ones whose indices are
unsorted or repeated, which stock loads, too. Work is linear in the objects of the result and in the indices.

Not here: plain and quantized tensors, which torch checks when it makes them. What an object holds other than in its
``__dict__`` is not found, and what a class does with a tensor while it is unpickled is done unchecked.
"""

import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import _utils
from torch._load_lazy._modes import has_dispatch_modes
from torch.serialization import _serialization_tls


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_BLOCKED = (torch.sparse_bsr, torch.sparse_bsc)
_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_LEAVES = (*_PLAIN, type, types.ModuleType, types.FunctionType)
_MAX_PATH = 200  # characters
_REBUILDS = {
    function.__code__
    for function in (
        _utils._rebuild_qtensor,
        _utils._rebuild_sparse_tensor,
        _utils._rebuild_nested_tensor,
        _utils._validate_loaded_sparse_tensors,  # if the user has switched it on
    )
}


class _Invalid(Exception):
    """A tensor is not what its parts say."""


def check(result: Any, bad: Callable[[str, str], NoReturn]) -> None:
    """Calls ``bad`` for a tensor in ``result`` whose parts are impossible.

    Args:
        result: what was loaded
        bad: called with what was expected and what was got
    """
    if (
        _serialization_tls.skip_data
        or has_dispatch_modes()
        or torch._guards.detect_fake_mode(None) is not None
    ):
        return  # there are no data that could be checked
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for tensor, place in _tensors(result):
            try:
                _check(tensor)
                continue
            except _Invalid as error:
                got = str(error)
            except RuntimeError as error:
                got = f"one of which torch says: {str(error).splitlines()[0]}"
            kind = "nested" if tensor.is_nested else str(tensor.layout)[6:]
            bad(f"a valid {kind} tensor{_path(place)}", got)


def is_of_rebuild(error: BaseException) -> bool:
    """Whether torch has found that a tensor of which a pickle tells is impossible."""
    if isinstance(error, NotImplementedError):  # not on this device
        return False
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in _REBUILDS:
            return True
        traceback = traceback.tb_next
    return False


class _Place(NamedTuple):
    """Where an object is: as ``text``, formatted with ``key``, of what is at ``of``."""

    of: "_Place | None"
    text: str
    key: Any


def _path(place: _Place | None) -> str:
    parts: list[str] = []
    while place is not None:
        parts.append(place.text.format(place.key))
        place = place.of
    return f" at {''.join(reversed(parts))[:_MAX_PATH]}" if parts else ""


def _tensors(result: Any) -> Iterator[tuple[torch.Tensor, _Place | None]]:
    """Yields the sparse and nested tensors in ``result``, and where each is."""
    seen = set[int]()
    waiting: list[tuple[Any, _Place | None]] = [(result, None)]
    while waiting:
        value, place = waiting.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_nested:
                yield value, place
        elif isinstance(value, dict):
            items = _others(dict.items(value))
            waiting += [(v, _Place(place, *_item(k))) for k, v in items]
            waiting += [(k, place) for k in dict.keys(value) if type(k) not in _PLAIN]
        elif isinstance(value, (list, tuple)):
            items = _others(enumerate(value))
            waiting += [(v, _Place(place, "[{}]", i)) for i, v in items]
        elif isinstance(value, (set, frozenset)):
            waiting += [(v, place) for v in value]
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            items = _others(attributes.items())
            waiting += [(v, _Place(place, ".{}", k)) for k, v in items]


def _others(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    # NB: a state may have a list of a million numbers.
    return [item for item in items if type(item[1]) not in _PLAIN]


def _item(key: Any) -> tuple[str, Any]:
    return ("[{!r:.80}]", key) if type(key) in (str, int) else ("[...]", None)


def _check(tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        return
    if tensor.layout is torch.sparse_coo:
        torch._validate_sparse_coo_tensor_args(
            tensor._indices(),
            tensor._values(),
            tensor.size(),
            tensor.is_coalesced(),
            check_pinning=False,
        )
    elif tensor.layout in _COMPRESSED:
        _check_compressed(tensor)
    elif tensor.layout is torch.jagged:
        _check_jagged(tensor)
    elif tensor.is_nested:
        _check_nested(tensor)


def _check_compressed(tensor: torch.Tensor) -> None:
    by_rows = tensor.layout in _BY_ROWS
    lines = tensor.crow_indices() if by_rows else tensor.ccol_indices()
    places = tensor.col_indices() if by_rows else tensor.row_indices()
    values, size = tensor.values(), tensor.size()
    if lines.dim() and lines.size(-1) and places.dim():
        # NB: before torch's own check, which reads what they lead to.
        first, last = lines[..., 0], lines[..., -1]
        are_ranges = (first == 0).all() & (last == places.size(-1)).all()
        if not are_ranges & (lines[..., :-1] <= lines[..., 1:]).all():
            raise _Invalid(
                "one with compressed indices that are no ranges of the plain ones"
            )
    try:
        torch._validate_sparse_compressed_tensor_args(
            lines, places, values, size, tensor.layout, check_pinning=False
        )
    except RuntimeError as error:
        if "is not satisfied" not in str(error):  # but by a shape or dtype
            raise
        # Other libraries write indices in any order, and more than once; they lead nowhere else.
        batch = lines.dim() - 1
        bound = size[batch + by_rows]
        if tensor.layout in _BLOCKED:
            bound //= values.size(batch + 1 + by_rows)
        if not ((places >= 0) & (places < bound)).all():
            raise


def _check_jagged(tensor: Any) -> None:
    values, offsets, lengths = tensor._values, tensor._offsets, tensor._lengths
    if offsets.is_meta or values.is_meta:
        return
    total = values.size(tensor._ragged_idx - 1)
    starts = offsets[:-1]
    if lengths is None:
        lengths = offsets.diff()
    if bool(((starts < 0) | (lengths < 0) | (lengths > total - starts)).any()):
        raise _Invalid(f"one with offsets or lengths outside of {total} rows")


def _check_nested(tensor: torch.Tensor) -> None:
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    metadata = (
        tensor._nested_tensor_size().tolist(),
        tensor._nested_tensor_strides().tolist(),
        tensor._nested_tensor_storage_offsets().tolist(),
    )
    for size, stride, offset in zip(*metadata, strict=True):
        if min((offset, *size, *stride)) >= 0:
            last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if 0 in size or offset + last < count:
                continue
        raise _Invalid(
            f"one with a part of size {tuple(size)}, stride {tuple(stride)} and offset {offset} in {count} elements"
        )
