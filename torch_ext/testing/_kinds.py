"""The kinds of modules that recipes are made of: torch's own that load in a way of their own, and odd ones.

Add a constructor without arguments to :data:`KINDS` to have modules of your own among them. It must build under
``torch.device("meta")``.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, Tensor


class Odd(nn.Module):
    """Unusual tensors in a module that loads as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(()))
        self.column = nn.Parameter(torch.zeros(3, 2).t())
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.register_parameter("none", None)
        self.register_buffer("count", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("frequencies", torch.zeros(3), persistent=False)
        self.statistics = nn.Buffer(torch.zeros(2))


class Complex(nn.Module):
    """A buffer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


class Halves(nn.Module):
    """Saved as one tensor, kept as two: a pre-hook splits it into views."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        self.register_load_state_dict_pre_hook(self._split)
        self.register_state_dict_post_hook(self._merge)

    @staticmethod
    def _split(
        module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        both = state_dict.pop(prefix + "both", None)
        if isinstance(both, Tensor) and both.shape == (4,):
            state_dict[prefix + "left"], state_dict[prefix + "right"] = both.chunk(2)

    @staticmethod
    def _merge(
        module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        halves = [state_dict.pop(prefix + name) for name in ("left", "right")]
        # NB: a tie may have made them of other shapes, dtypes and devices.
        dtype = torch.promote_types(halves[0].dtype, halves[1].dtype)
        device = "meta" if any(half.is_meta for half in halves) else "cpu"
        flat = [half.reshape(-1).to(device, dtype) for half in halves]
        state_dict[prefix + "both"] = torch.cat(flat)


class Scaled(nn.Linear):
    """An override that writes before it loads, and afterwards computes with what it has loaded."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("total", torch.zeros(2))

    def _load_from_state_dict(self, *args: Any) -> None:
        self.weight.data.fill_(1)
        super()._load_from_state_dict(*args)
        self.weight.data *= 2
        with torch.no_grad():
            self.bias.view(-1)[:1] = 3
            self.total.copy_(self.bias.sum())


class Extra(nn.Linear):
    """Extra state, which ``set_extra_state`` writes into a list that it keeps."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.extra = [1]

    def get_extra_state(self) -> list[int]:
        return self.extra

    def set_extra_state(self, state: list[int]) -> None:
        self.extra[:] = state


class Slotted(nn.Linear):
    """A class with slots and an attribute in one."""

    __slots__ = ("note",)

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.note = "mine"


def _with_old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(2, 2))


#: Constructors by name.
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "embedding": lambda: nn.Embedding(4, 3, padding_idx=0),
    "convolution": lambda: nn.Conv1d(2, 2, 1),
    "norm": lambda: nn.BatchNorm1d(3),
    "lstm": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "list": lambda: nn.ParameterList([torch.zeros(2, 3), torch.zeros(2)]),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "weight_norm_old": _with_old_weight_norm,
    "odd": Odd,
    "complex": Complex,
    "halves": Halves,
    "scaled": Scaled,
    "extra": Extra,
    "slotted": Slotted,
}

#: Kinds that load as :class:`torch.nn.Module` does: without hooks, overrides or extra state.
PLAIN = ("attention", "embedding", "linear", "list", "lstm", "odd", "slotted")

#: Kinds that compute while they load, so that after an error or on meta their values mean nothing.
COMPUTING = ("scaled",)

__all__ = ["COMPUTING", "KINDS", "PLAIN"]
