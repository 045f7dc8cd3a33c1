"""What it means that one module is another, bit for bit: the law that the zoo and the property tests check."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn, Tensor


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds, by a name that tells where: parameters, buffers, plain attributes."""
    for prefix, m in module.named_modules():
        for kind in (m._parameters, m._buffers):
            for name, value in kind.items():
                if value is not None:
                    yield f"{prefix}.{name}", value
        for name, value in m.__dict__.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _inside(f"{prefix}.{name}", value, 0)


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth < 4 and isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _inside(f"{name}[{i}]", part, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for key, part in value.items():
            yield from _inside(f"{name}[{key!r}]", part, depth + 1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's values."""
    if tensor.layout is not torch.strided:
        return bits(tensor.to_dense())
    if tensor.is_quantized:
        return bits(tensor.dequantize())
    return (
        tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
    )


def facts(tensor: Tensor) -> tuple[Any, ...]:
    """All but the values."""
    if nn.parameter.is_lazy(tensor):
        return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad
    strided = tensor.layout is torch.strided
    return (
        type(tensor),
        tensor.shape,
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.requires_grad,
        (tensor.stride(), tensor.storage_offset()) if strided else None,
        sorted(k for k in tensor.__dict__),
    )


def groups(module: nn.Module) -> tuple[Any, Any]:
    """Which names are one object, and which share a storage."""
    objects, storages = defaultdict(list), defaultdict(list)
    for name, tensor in tensors(module):
        objects[id(tensor)].append(name)
        if (
            tensor.layout is torch.strided
            and not tensor.is_quantized
            and not tensor.is_meta
        ):
            storages[tensor.untyped_storage()._cdata].append(name)
    return sorted(objects.values()), sorted(storages.values())


def differences(expected: nn.Module, actual: nn.Module) -> list[str]:
    """Where ``actual`` is not ``expected``; empty if it is."""
    one, other = dict(tensors(expected)), dict(tensors(actual))
    if list(one) != list(other):
        return [f"names: {sorted(set(one) ^ set(other)) or 'order'}"]
    found = []
    for name, tensor in one.items():
        if facts(tensor) != facts(other[name]):
            found.append(f"{name}: {facts(tensor)} != {facts(other[name])}")
        elif nn.parameter.is_lazy(tensor) or tensor.is_meta:
            continue
        elif not torch.equal(bits(tensor), bits(other[name])):
            found.append(f"{name}: values")
    if groups(expected) != groups(actual):
        found.append("ties")
    for (name, m), n in zip(expected.named_modules(), actual.modules(), strict=True):
        # NB: parametrize makes a class for each module.
        if type(m).__mro__[-3:] != type(n).__mro__[-3:] or str(m) != str(n):
            found.append(f"{name}: module")
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
            if len(getattr(m, hooks)) != len(getattr(n, hooks)):
                found.append(f"{name}: {hooks}")
    return found
