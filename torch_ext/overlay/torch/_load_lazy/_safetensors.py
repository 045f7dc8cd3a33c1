"""The safetensors format: a JSON header, and the tensors' bytes one after the other.

Law: the result is that of ``safetensors.torch.load_file``, by which ``torch.load`` opens such
files: the same tensors, in the order of their bytes. A header that safetensors would refuse,
or that names anything twice, is an error before anything is mapped or allocated.

safetensors itself is not needed. Unlike in torch.load, the file may have any name or be a
file object, ``map_location`` may be meta, and of empty tensors at one place, the order is the
header's (safetensors': at random).
"""

import json
import reprlib
import sys
from collections.abc import Iterable
from itertools import accumulate
from math import prod
from operator import itemgetter, mul
from typing import Any

import torch
from torch._load_lazy._deferred import DeferredStorage
from torch._load_lazy._open import OpenFile
from torch._load_lazy._places import Places
from torch._load_lazy._request import is_ordinary
from torch._load_lazy._zip import Extent


# What the format calls them, but for those that torch lacks.
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "BOOL": "bool",
        "U8": "uint8",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F4": "float4_e2m1fn_x2",
    }.items()
    if hasattr(torch, dtype)
}
_MAX_HEADER = 100_000_000  # safetensors' own limit
_INT64_MAX = (1 << 63) - 1

Tensor = tuple[str, torch.dtype, tuple[int, ...], Extent]


def is_safetensors(file: OpenFile, magic: bytes) -> bool:
    """Whether the file is to be read as this format, by its name or its first bytes."""
    if file.request.is_path and file.name.endswith(".safetensors"):
        return True
    size = int.from_bytes(magic[:8], "little")
    return magic[8:9] == b"{" and size <= min(file.size - 8, _MAX_HEADER)


def load(file: OpenFile) -> dict[str, torch.Tensor]:
    """Returns the tensors of the file by name."""
    map_location = file.request.map_location
    if isinstance(map_location, dict) or callable(map_location):
        kind = "dict" if isinstance(map_location, dict) else "callable"
        raise RuntimeError(
            f"Loading safetensors file with {kind} map_location is not supported. "
            "Use a device string or torch.device instead."
        )
    if not is_ordinary() and not torch.is_inference_mode_enabled():
        result: dict[str, torch.Tensor] = file.eager()
        return result
    tensors = _tensors(file)
    # NB: the format's byte order is little.
    places = Places(file.source, file.mapping, map_location, sys.byteorder == "big")
    with torch._C.DisableTorchFunction():
        if places.are_mapped("cpu"):
            result = _mapped(places, tensors)
        else:
            result = {tensor[0]: _placed(places, *tensor) for tensor in tensors}
    file.leave_at(file.size)
    return result


def _mapped(places: Places, tensors: Iterable[Tensor]) -> dict[str, torch.Tensor]:
    # NB: the inner loop of a load. Tensors are views, as safetensors' own are.
    assert places.mapping is not None
    frombuffer, parts, result = torch.frombuffer, [], {}
    for name, dtype, size, (start, nbytes) in tensors:
        if nbytes:
            part = places.mapping.buffer[start : start + nbytes]
            parts.append(part)
            result[name] = frombuffer(part, dtype=dtype).view(size)
        else:
            result[name] = _placed(places, name, dtype, size, (start, nbytes))
    places.mapping.use(parts)
    return result


def _placed(
    places: Places, name: str, dtype: torch.dtype, size: tuple[int, ...], extent: Extent
) -> torch.Tensor:
    storage = places.storage(name, extent, dtype, "cpu")
    if isinstance(storage, DeferredStorage):
        return storage.tensor(dtype, 0, size, _contiguous(size))
    if storage.device.type != "meta":
        data = torch.asarray(storage, dtype=torch.uint8, device=storage.device)
        return data.view(dtype).view(size)
    flat = torch.empty((0,), dtype=dtype, device="meta")
    return flat.set_(storage, 0, (extent[1] // dtype.itemsize,), (1,)).view(size)


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    # NB: linear in the number of dimensions, of which a header may name millions.
    return tuple(accumulate(size[:0:-1], mul, initial=1))[::-1] if size else ()


# The header


def _tensors(file: OpenFile) -> list[Tensor]:
    """Returns what the header says of each tensor, in the order of their bytes."""
    header, end = _header(file)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        type(metadata) is dict and {str}.issuperset(map(type, metadata.values()))
    ):
        file.bad("strings as its __metadata__", reprlib.repr(metadata), 8)
    tensors = [_tensor(file, name, info, end) for name, info in header.items()]
    tensors.sort(key=itemgetter(3))
    for name, _, _, (start, nbytes) in tensors:
        if start != end:
            what = "an overlap" if start < end else "a gap"
            expected = (
                f"the bytes of tensor {reprlib.repr(name)} right after those before"
            )
            file.bad(expected, f"{what} of {abs(start - end)} bytes", start)
        end = start + nbytes
    if end != file.size:
        file.bad(f"{end} bytes", f"{file.size} bytes", min(end, file.size))
    return tensors


def _header(file: OpenFile) -> tuple[dict[str, Any], int]:
    """Returns the header, and the offset at which it ends."""
    size = int.from_bytes(file.read(0, min(8, file.size)), "little")
    limit = min(file.size - 8, _MAX_HEADER)
    if size > limit:
        file.bad(f"a header of at most {max(0, limit)} bytes", f"one of {size}", 0)
    data = file.read(8, size)
    try:
        header = _parse(data)
    except (ValueError, RecursionError) as error:
        file.bad("a header in JSON", f"{type(error).__name__} ({error})", 8)
    if type(header) is not dict:
        file.bad("a header that is a JSON object", reprlib.repr(header), 8)
    return header, 8 + size


def _parse(data: bytes) -> Any:
    text = data.decode()
    header = json.loads(text, parse_constant=_refuse)
    # NB: json keeps the last one of what is named twice, and takes three times as long if
    # asked for all. What is written without escapes can be counted instead.
    if type(header) is dict:
        count = len(header) - ("__metadata__" in header)
        fields = (b'"dtype"', b'"shape"', b'"data_offsets"')
        if b"\\" in data or any(data.count(field) != count for field in fields):
            header = json.loads(text, object_pairs_hook=_without_repeats)
    return header


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        name.encode()  # raises ValueError if it is no text
        if name in result:
            raise ValueError(f"{name[:80]!r} is there twice")
        result[name] = value
    return result


def _tensor(file: OpenFile, name: str, info: Any, data: int) -> Tensor:
    """Returns what the header says of a tensor, where ``data`` is the end of the header."""
    try:
        kind, shape = info["dtype"], info["shape"]
        start, end = info["data_offsets"]
        dtype = _DTYPES[kind]
        numbers = (start, end, *shape)
    except (KeyError, TypeError, ValueError):
        numbers = (-1,)
    if (
        {int}.issuperset(map(type, numbers))
        and 0 <= min(numbers) <= max(numbers) <= _INT64_MAX
        and type(shape) is list
    ):
        size = _size(kind, shape)
        if _numel(size) * dtype.itemsize == end - start:
            return name, dtype, size, (data + start, end - start)
    file.bad(
        f"dtype, shape and data_offsets of tensor {reprlib.repr(name)} that fit each other",
        reprlib.repr(info),
        8,
        f"Is it a dtype that torch {torch.__version__} lacks, or is the file damaged?",
    )


def _size(kind: str, shape: list[int]) -> tuple[int, ...]:
    if kind != "F4":
        return tuple(shape)
    # Two elements are one byte, and one of torch's.
    return (*shape[:-1], shape[-1] // 2) if shape and shape[-1] % 2 == 0 else (-1,)


def _numel(size: tuple[int, ...]) -> int:
    # NB: a product of a million large numbers takes forever.
    if 0 in size:  # torch multiplies those before it all the same
        return 0 if 0 < _numel(size[: size.index(0)]) <= _INT64_MAX else -1
    factors = [n for n in size if n != 1]
    return prod(factors) if len(factors) < 64 else -1
