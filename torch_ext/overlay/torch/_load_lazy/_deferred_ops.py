"""What the functions of torch need of a deferred tensor.

``VIEWS`` and ``MAYBE_VIEWS`` return tensors over the same storage, ``METADATA`` and ``SHARED``
are about everything but data, ``OF_DEVICE`` about where these are, and ``STORAGE`` sees more of
the storage than the tensor. What is not named here needs the tensor's own bytes.

Law: all but ``STORAGE`` never touch data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _functions(names: str) -> set[Callable[..., Any]]:
    """Returns what is named so in Tensor and, but for special methods, in torch."""
    found = [getattr(Tensor, name, None) for name in names.split()]
    found += [getattr(torch, name, None) for name in names.split() if name[:2] != "__"]
    return {function for function in found if callable(function)}


def getters(names: str) -> set[Callable[..., Any]]:
    """Returns what __torch_function__ is given where properties of Tensor are read."""
    found: list[Any] = [getattr(Tensor, name, None) for name in names.split()]
    return {prop.__get__ for prop in found if prop is not None}


def setters(names: str) -> set[Callable[..., Any]]:
    """Returns what __torch_function__ is given where properties of Tensor are set."""
    found: list[Any] = [getattr(Tensor, name) for name in names.split()]
    return {prop.__set__ for prop in found}


VIEWS = _functions(
    """adjoint as_strided chunk conj detach diagonal dsplit expand expand_as hsplit imag
    moveaxis movedim narrow permute real select split split_with_sizes squeeze swapaxes
    swapdims t tensor_split transpose unbind unflatten unfold unsqueeze view
    view_as view_as_complex view_as_real vsplit broadcast_to"""
) | getters("H T mH mT data imag real")

# A view where that can be, else a copy.
MAYBE_VIEWS = _functions(
    "contiguous flatten ravel reshape reshape_as resolve_conj resolve_neg"
)

METADATA = (
    _functions(
        """__dir__ __hash__ __len__ _is_view dim element_size is_complex is_conj
        is_contiguous is_floating_point is_inference is_neg is_signed ndimension nelement
        numel size storage_offset stride"""
    )
    | getters(
        """_backward_hooks _post_accumulate_grad_hooks dtype is_mkldnn is_nested
        is_quantized is_sparse is_sparse_csr itemsize layout names nbytes ndim shape"""
    )
    | setters("_backward_hooks")
)

# What others that share memory or a graph with the tensor may have changed.
SHARED = getters("_version grad is_leaf output_nr requires_grad retains_grad")

OF_DEVICE = _functions("__dlpack_device__ get_device is_pinned is_shared") | getters(
    """device is_cpu is_cuda is_ipu is_maia is_meta is_mps is_mtia is_vulkan is_xla
    is_xpu"""
)

STORAGE = _functions(
    """__setstate__ _reduce_ex_internal _typed_storage
    as_strided_ as_subclass detach_ is_set_to module_load pin_memory resize resize_
    resize_as resize_as_ set_ share_memory_ squeeze_ storage storage_type swapaxes_
    swapdims_ t_ transpose_ unsqueeze_ untyped_storage"""
) | setters("data")

# Methods that convert, and what to.
CASTS: dict[Callable[..., Any], torch.dtype] = {
    getattr(Tensor, name): dtype
    for name, dtype in {
        "bfloat16": torch.bfloat16,
        "bool": torch.bool,
        "byte": torch.uint8,
        "cdouble": torch.complex128,
        "cfloat": torch.complex64,
        "chalf": torch.complex32,
        "char": torch.int8,
        "double": torch.float64,
        "float": torch.float32,
        "half": torch.float16,
        "int": torch.int32,
        "long": torch.int64,
        "short": torch.int16,
    }.items()
}


def is_basic(index: Any) -> bool:
    """Whether indexing with ``index`` gives a view."""
    parts = index if type(index) is tuple else (index,)
    return all(map(_is_basic_part, parts))


def _is_basic_part(part: Any) -> bool:
    if type(part) is slice:
        return {int, type(None)}.issuperset(
            map(type, (part.start, part.stop, part.step))
        )
    return part is None or part is Ellipsis or type(part) is int
