"""The globals that the inert reader knows, and what a call of one of them makes.

Each is allowed by torch's ``weights_only`` unpickler, too. Law: a call checks every argument,
and takes the ones that ``torch.save`` writes; for the rest it raises ``Unsupported``.

Not here: tensors over storages (``_build.py``).
"""

from _codecs import encode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._load_lazy._deferred import DeferredTensor
from torch._load_lazy._inert import check_keys, Unsupported
from torch._utils import (
    _rebuild_parameter,
    _rebuild_tensor_v2,
    _rebuild_tensor_v3,
)
from torch.serialization import StorageType
from torch.storage import _dtype_to_storage_type_map, _new_dtypes


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments:
        raise Unsupported("OrderedDict")
    return OrderedDict()


def _size(*arguments: Any) -> torch.Size:
    (size,) = arguments
    if type(size) is not tuple or not {int}.issuperset(map(type, size)):
        raise Unsupported("Size")
    if not all(-(1 << 63) <= n < 1 << 63 for n in size):
        raise Unsupported("Size")
    return torch.Size(size)


def _device(*arguments: Any) -> torch.device:
    if tuple(map(type, arguments)) not in ((str,), (str, int)):
        raise Unsupported("device")
    try:
        return torch.device(*arguments)
    except RuntimeError as error:
        raise Unsupported("device") from error


def _parameter(*arguments: Any) -> torch.nn.Parameter:
    data, requires_grad, hooks = arguments
    if type(data) not in (torch.Tensor, DeferredTensor):
        raise Unsupported("Parameter")
    if type(requires_grad) is not bool:
        raise Unsupported("Parameter")
    if type(hooks) is not OrderedDict or hooks:
        raise Unsupported("Parameter")
    if requires_grad and not (data.is_floating_point() or data.is_complex()):
        raise Unsupported("Parameter")
    # NB: a deferred tensor knows itself by its torch function.
    with torch._C._EnableTorchFunction():
        parameter: torch.nn.Parameter = _rebuild_parameter(data, requires_grad, hooks)
    return parameter


def _bytes(*arguments: Any) -> bytes:
    text, encoding = arguments
    if type(text) is not str or encoding != "latin1":
        raise Unsupported("encode")
    return text.encode("latin1")


def _bytearray(*arguments: Any) -> bytearray:
    # NB: bytearray(10**12) is a call that weights_only allows, too.
    if tuple(map(type, arguments)) not in ((), (bytes,)):
        raise Unsupported("bytearray")
    return bytearray(*arguments)


def _set(*arguments: Any) -> set[Any]:
    (items,) = arguments
    if type(items) is not list:
        raise Unsupported("set")
    check_keys(items)
    return set(items)


def _complex(*arguments: Any) -> complex:
    if tuple(map(type, arguments)) != (float, float):
        raise Unsupported("complex")
    return complex(*arguments)


def _by_name(dtypes: Iterable[torch.dtype]) -> dict[bytes, torch.dtype]:
    return {str(dtype).replace(".", "\n").encode(): dtype for dtype in dtypes}


def _storage_types() -> dict[bytes, StorageType]:
    # NB: not those of quantized dtypes, whose tensors have a rebuild function of their own.
    return {
        f"torch\n{name}".encode(): StorageType(name)
        for dtype, name in _dtype_to_storage_type_map().items()
        if not name.startswith("Q")
    }


GLOBALS: dict[bytes, Any] = {
    b"collections\nOrderedDict": OrderedDict,
    b"torch\nSize": torch.Size,
    b"torch\ndevice": torch.device,
    b"torch.storage\nUntypedStorage": torch.UntypedStorage,
    b"torch._utils\n_rebuild_tensor_v2": _rebuild_tensor_v2,
    b"torch._utils\n_rebuild_tensor_v3": _rebuild_tensor_v3,
    b"torch._utils\n_rebuild_parameter": _rebuild_parameter,
    b"_codecs\nencode": encode,
    b"__builtin__\nset": set,
    b"__builtin__\nbytearray": bytearray,
    b"__builtin__\ncomplex": complex,
    **_by_name(_new_dtypes()),
    **_by_name(d for d, s in _dtype_to_storage_type_map().items() if s[0] != "Q"),
    **_storage_types(),
}

CALLS: dict[int, Callable[..., Any]] = {
    id(OrderedDict): _ordered_dict,
    id(torch.Size): _size,
    id(torch.device): _device,
    id(_rebuild_parameter): _parameter,
    id(encode): _bytes,
    id(set): _set,
    id(bytearray): _bytearray,
    id(complex): _complex,
}
