"""What a format cannot hold, or not so that it can be read back; each such value is named before anything is written.

A ``.pt`` file holds what ``torch.load`` gave. A DCP checkpoint holds the numbers of plain tensors, and pickles of what
is no tensor; safetensors holds plain tensors of its dtypes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torch_ext._tools.unread import Unread


NAMES = {"dcp": "a DCP checkpoint", "safetensors": "a safetensors file", "pt": "a file"}
_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
# DCP asks for the size of their elements, which torch does not know.
_NO_SIZE = (torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2)
_SHOWN = 10


def check(values: Mapping[str, Any], target: str) -> None:
    """Raise ValueError if ``target``, of ``NAMES``, cannot hold ``values``.

    Args:
        values: by name, tensors as they are or :class:`Unread`
        target: what is to be written
    """
    found = list(_obstacles(values, target))
    if not found:
        return
    listed = ", ".join(found[:_SHOWN])
    more = f", ... ({len(found)} of them)" if len(found) > _SHOWN else ""
    remedy = "(Did you mean to write a .pt file?)"
    if target == "pt":
        remedy = "A DCP checkpoint does not have the scales of quantized tensors."
    raise ValueError(
        f"Expected values that {NAMES[target]} can hold, got {listed}{more}. {remedy}"
    )


def _obstacles(values: Mapping[str, Any], target: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Unread):
            what = _of_dtype(value.dtype, target)
        elif isinstance(value, torch.Tensor):
            what = None if target == "pt" else _of_tensor(value, target)
        else:
            what = type(value).__name__ if target == "safetensors" else None
        if what is None and target == "safetensors":
            what = _of_name(name)
        if what is not None:
            yield f"{name!r} ({what})"


def _of_tensor(tensor: torch.Tensor, target: str) -> str | None:
    # NB: in this order: a nested tensor of either layout raises where it is asked for more.
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.is_meta:
        return "a tensor on meta, which has no data"
    if not _is_plain(tensor):
        return f"a tensor of the class {type(tensor).__name__}"
    return _of_dtype(tensor.dtype, target)


def _is_plain(tensor: torch.Tensor) -> bool:
    from torch._load_lazy._deferred_tensor import (  # type: ignore[import-not-found]
        deferral_of,
    )

    known = torch.Tensor, torch.nn.Parameter, torch.nn.Buffer
    return type(tensor) in known or deferral_of(tensor) is not None


def _of_dtype(dtype: torch.dtype, target: str) -> str | None:
    # NB: also as they come from a DCP checkpoint, which has lost the scales.
    if dtype in _QUANTIZED:
        return f"a quantized tensor, {dtype}"
    if target == "dcp" and dtype in _NO_SIZE:
        return f"a tensor of {dtype}"
    if target == "safetensors":
        from torch._load_lazy._safetensors import (  # type: ignore[import-not-found]
            _DTYPES,
        )

        # F4 has two numbers an element, which torch counts as one.
        if dtype not in [known for name, known in _DTYPES.items() if name != "F4"]:
            return f"a tensor of {dtype}"
    return None


def _of_name(name: str) -> str | None:
    if name == "__metadata__":
        return "a name that the format keeps for itself"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "a name that is no UTF-8"
    return None
