"""Each operator of ``op_db`` with meta inputs inside of ``with torch.device("meta"):``, forward and backward.

What is compared is shape inference: types, shapes, dtypes, strides and whether it raises.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map_only
from upstream_case import Case, some


def cases(limit: int) -> Iterator[Case]:
    for op in op_db:
        if not op.dtypes:  # only other devices have it
            continue
        dtype = _dtype(op)
        grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
        try:
            samples = some(op.sample_inputs("cpu", dtype, requires_grad=grad), limit)
        except IndexError:  # no backend of this machine has it
            samples = []
        for i, sample in enumerate(samples):
            name = f"{op.name} {op.variant_test_name} {i}".replace("  ", " ")
            if sample.kwargs.get("device") is not None:
                name += " names a device"
            yield name, partial(_forward_and_backward, op, sample, grad)


def _dtype(op: Any) -> torch.dtype:
    if torch.float32 in op.dtypes:
        return torch.float32
    found: torch.dtype = min(op.dtypes, key=str)
    return found


def to_meta(value: Any) -> Any:
    """``value`` with each tensor in it on meta, a leaf that wants gradients as before."""

    def convert(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to("meta").requires_grad_(t.requires_grad)

    return tree_map_only(torch.Tensor, convert, value)


def backward(out: Any, inputs: Any) -> list[Any]:
    """The gradients of ``inputs`` from those of ``out`` that have any."""
    out = [o for o in tree_leaves(out) if _has_grad(o)]
    wrt = [i for i in tree_leaves(inputs) if _has_grad(i)]
    if not (out and wrt):
        return []
    ones = [torch.ones_like(o) for o in out]
    return list(torch.autograd.grad(out, wrt, ones, allow_unused=True))


def _has_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _forward_and_backward(op: Any, sample: Any, grad: bool) -> Any:
    inputs = to_meta((sample.input, sample.args, sample.kwargs))
    with torch.device("meta"):
        out = op(inputs[0], *inputs[1], **inputs[2])
        return [out, backward(out, inputs) if grad else None]
