"""What can be observed of a module and of those who refer to it, as plain values that can be compared.

The law: two modules of one recipe are observed alike, if and only if no code that is written in terms of names,
values, identities and ties can tell them apart. Addresses are not observed, nor is which object of a twin an object is.
Values are compared bit by bit (-0.0 is not 0.0, and NaN is NaN).

Example::

    >>> a, b = (Recipe(("linear",)).build() for _ in range(2))
    >>> b.module[0].weight.requires_grad_(False)
    Parameter containing: ...
    >>> differences(observe(a), observe(b))
    ['0.weight, requires_grad: True, not False']
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn, Tensor

from torch_ext.testing._modules import named_tensors, Subject


Observation: TypeAlias = dict[tuple[str, str], object]


class Bits:
    """The content of a tensor: equal if each bit is, shown as numbers."""

    def __init__(self, tensor: Tensor) -> None:
        values = tensor.detach().resolve_conj()
        # NB: contiguous() would keep the odd strides that a tensor of one element may have.
        values = values.clone(memory_format=torch.contiguous_format)
        raw = values.view(-1).view(torch.uint8)
        self._key = (values.dtype, values.shape, raw.numpy().tobytes())
        self._values = values

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Bits) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._values.tolist())


def observe(
    subject: Subject | nn.Module, *, ignore_values: Collection[str] = ()
) -> Observation:
    """All that is observed of a module, under (name of a tensor or module, aspect).

    Args:
        subject: a module, or one with those who refer to it.
        ignore_values: names of tensors whose content and device are not looked at.
    """
    if isinstance(subject, nn.Module):
        subject = Subject(subject)
    module = subject.module
    seen: Observation = {}
    for name, tensor in named_tensors(module):
        for aspect, value in _tensor(tensor, name in ignore_values):
            seen[name, aspect] = value
        seen[name, "the object that it was"] = tensor is subject.held.get(name)
    for name, child in module.named_modules(remove_duplicate=False):
        for aspect, value in _module(child):
            seen[name, aspect] = value
    seen["", "state dict"] = list(module.state_dict())
    seen["", "ties"] = identities(module)
    seen["", "shared memory"] = overlaps(module)
    seen["", "calls"] = list(subject.calls)
    seen["", "weak references"] = [ref() is not None for ref in subject.weak]
    if subject.optimizer is not None:
        seen["", "optimizer"] = _optimizer(subject.optimizer, subject.held)
    return seen


def differences(expected: Observation, observed: Observation) -> list[str]:
    """In which aspects two observations differ, one line each."""
    keys = [*expected, *(key for key in observed if key not in expected)]
    lines = []
    for key in keys:
        a, b = (seen.get(key, "nothing") for seen in (expected, observed))
        if a != b:
            lines.append(f"{key[0] or 'as a whole'}, {key[1]}: {a!r}, not {b!r}")
    return lines


def identities(module: nn.Module) -> list[tuple[str, ...]]:
    """The groups of names, more than one each, that are one tensor.

    Example::

        >>> module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> module[1].bias = module[0].bias
        >>> identities(module)
        [('0.bias', '1.bias')]
    """
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def overlaps(module: nn.Module) -> list[tuple[str, str]]:
    """The pairs of names whose tensors have some byte in common; none of what is on meta.

    Example::

        >>> module = torch.nn.ParameterList([torch.zeros(2), torch.zeros(2)])
        >>> module[1] = torch.nn.Parameter(module[0].detach()[1:])
        >>> overlaps(module)
        [('0', '1')]
    """
    spans = sorted(
        (t.data_ptr(), _end(t), name)
        for name, t in named_tensors(module)
        if not t.is_meta and t.numel()
    )
    pairs = []
    for i, (_, end, name) in enumerate(spans):
        for start, _, other in spans[i + 1 :]:
            if start >= end:
                break
            pairs.append((min(name, other), max(name, other)))
    return sorted(pairs)


def observe_state_dict(state_dict: Mapping[str, Any]) -> Observation:
    """A state dict with the objects in it: equal before and after something that leaves it alone."""
    seen: Observation = {("", "keys"): list(state_dict)}
    for key, value in state_dict.items():
        seen[key, "object"] = id(value)
        if isinstance(value, Tensor):
            seen[key, "version"] = -1 if value.is_inference() else value._version
            for aspect, what in _tensor(value, False):
                seen[key, aspect] = what
        else:
            seen[key, "value"] = copy.deepcopy(value)
    metadata = getattr(state_dict, "_metadata", None)
    seen["", "metadata"] = copy.deepcopy(metadata)
    return seen


def _end(tensor: Tensor) -> int:
    last = sum(
        (n - 1) * stride
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensor(tensor: Tensor, ignore_values: bool) -> Iterator[tuple[str, object]]:
    yield "class", type(tensor)
    yield "is a Buffer", isinstance(tensor, nn.Buffer)
    yield "is lazy", nn.parameter.is_lazy(tensor)
    yield "attributes", vars(tensor).copy()
    for aspect in ("dtype", "layout", "requires_grad", "is_leaf"):
        yield aspect, getattr(tensor, aspect)
    yield (
        "hooks",
        [
            len(hooks or ())
            for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        ],
    )
    if nn.parameter.is_lazy(tensor):
        return
    yield "shape", tensor.shape
    yield "strides", tensor.stride()
    if not ignore_values:
        yield "device", tensor.device
        yield "values", None if tensor.is_meta else Bits(tensor)
    if tensor.is_leaf:
        grad = tensor.grad
        yield (
            "gradient",
            None if grad is None else "meta" if grad.is_meta else Bits(grad),
        )


def _module(module: nn.Module) -> Iterator[tuple[str, object]]:
    # NB: a parametrization makes a class for each module.
    yield "class", f"{type(module).__module__}.{type(module).__qualname__}"
    yield "training", module.training
    yield "parameters", list(module._parameters)
    yield "buffers", list(module._buffers)
    yield "not persistent", sorted(module._non_persistent_buffers_set)
    yield "children", list(module._modules)
    yield "other attributes", sorted(vars(module))
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        yield "extra state", copy.deepcopy(module.get_extra_state())


def _optimizer(optimizer: torch.optim.Optimizer, held: Mapping[str, Tensor]) -> object:
    """Its groups, and its state by the name of the tensor that it is for."""
    names = {id(tensor): name for name, tensor in held.items()}
    groups = [
        (
            [names.get(id(p)) for p in group["params"]],
            {k: v for k, v in group.items() if k != "params"},
        )
        for group in optimizer.param_groups
    ]
    state = {
        names.get(id(p), "unknown"): {
            k: Bits(v) if isinstance(v, Tensor) and not v.is_meta else str(v)
            for k, v in of.items()
        }
        for p, of in optimizer.state.items()
    }
    return groups, state
