"""Functions of torch that the contexts know, as they are when torch is imported.

Libraries replace functions for a while by assigning to their names: transformers and accelerate wrap factories and
``torch.nn.init``. Law: a table of functions is never filled from a name that somebody may have replaced. So builtin
functions are looked up in ``torch._C``, and those that are written in Python here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import init


Function = Callable[..., Any]


def builtins(names: str) -> list[Function]:
    """The functions of the module ``torch`` of these names; without those that this release does not have."""
    found = (getattr(torch._C._VariableFunctions, name, None) for name in names.split())
    return [f for f in found if f is not None]


def methods(names: str) -> list[Function]:
    """The methods of ``torch.Tensor`` of these names."""
    return [METHODS[name] for name in names.split() if name in METHODS]


METHODS: dict[str, Function] = {
    **{name: getattr(torch._C.TensorBase, name) for name in dir(torch._C.TensorBase)},
    **{name: value for name, value in vars(Tensor).items() if callable(value)},
}
INITS = {
    name: getattr(init, name)
    for name in (
        *("constant_", "kaiming_uniform_", "normal_", "uniform_"),
        "_no_grad_trunc_normal_",
    )
}
FREQUENCIES = [torch._C._fft.fft_fftfreq, torch._C._fft.fft_rfftfreq]
NESTED_TENSOR: Function = torch.nested.nested_tensor
