"""``Module.to(device)``, ``cpu()`` and ``cuda()`` of a module with deferred tensors: it is materialized there.

Law: the module is as if it had been constructed eagerly and then moved. Parameters and buffers get the device (and a
floating-point dtype); tensors in plain attributes, which ``Module.to`` does not move, get their values where the
constructor would have put them. A move without a device, or to meta, is none of this file's.
"""

from typing import Any

import torch
from torch.nn.modules._to_empty import own
from torch.nn.modules.module import Module
from torch.nn.utils._deferred_init._context import current
from torch.nn.utils._deferred_init._materialize import (
    is_recorded,
    materialize,
    tensors_of,
    Target,
)


def materialize_for_to(module: Module, args: Any, kwargs: Any) -> None:
    """Before ``module.to(*args, **kwargs)``."""
    device, dtype = None, None
    try:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return  # Module.to raises the same
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return
    floating = dtype if dtype is not None and dtype.is_floating_point else None
    if device is not None and device.type != "meta":
        _materialize_on(module, (device, floating))


def materialize_for_cuda(module: Module, device: Any) -> None:
    """Before ``module.cuda(device)``."""
    if device is None or isinstance(device, int):
        device = "cuda" if device is None else f"cuda:{device}"
    _materialize_on(module, (torch.device(device), None))


def materialize_for_cpu(module: Module) -> None:
    """Before ``module.cpu()``."""
    _materialize_on(module, (torch.device("cpu"), None))


def _materialize_on(module: Module, target: Target) -> None:
    # NB: inside of a context the move is recorded.
    if current() is not None:
        return
    moved = {id(t): t for m in module.modules() for t in own(m) if is_recorded(t)}
    if not moved:
        return
    materialize(moved.values(), target, eager=True)
    rest = [t for m in module.modules() for t in tensors_of(m) if is_recorded(t)]
    materialize(rest, (None, None), eager=False)
