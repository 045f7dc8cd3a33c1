"""Where sharded modules come in: what the loader asks of whoever knows how a module is sharded.

That is :mod:`torch.distributed._load_sharded`, which is asked only if DTensors or FSDP are in use.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module


class Shard(NamedTuple):
    """What of a full tensor goes where.

    Attributes:
        whole: stands for the full tensor in the module
        local: the memory of this rank
        source: what of the state dict's tensor goes there
        device: where that memory is to be, if it is on meta
    """

    whole: Tensor
    local: Tensor
    source: Tensor
    device: torch.device


class Sharding(Protocol):
    """How the tensors of one module are sharded."""

    def prepared(self) -> AbstractContextManager[None]:
        """Context in which the module has its sharded tensors under the names and with the shapes of the full ones."""

    def shard_of(self, whole: Tensor, source: Any) -> Shard | None:
        """Which part of ``source`` goes into ``whole``; ``None`` if that has to copy by itself."""

    def check(self, whole: Tensor, source: Any) -> None:
        """Raise if ``whole`` cannot copy ``source`` by itself."""

    def local_of(self, tensor: Tensor) -> Tensor:
        """The memory that this rank has of ``tensor``; that itself, if it is not sharded."""

    def over(self, whole: Tensor, local: Tensor) -> Tensor | None:
        """What ``whole`` is to be like, now that its memory is where ``local`` is; ``None`` if it stays as it is."""

    def rename(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Give the keys the names that they have below a wrapper."""

    def clean(self, key: str) -> str:
        """The name of a tensor without those of wrappers."""

    def agree(self, error: BaseException | None = None) -> None:
        """Raise if another rank has an error."""

    def finish(self) -> None:
        """Bring up to date what others know of the module's memory."""


def sharding_of(module: Module) -> Sharding | None:
    """How ``module`` is sharded; ``None`` if it is not."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    try:
        from torch.distributed import _load_sharded
    except ImportError:
        return None
    return _load_sharded.sharding_of(module)
