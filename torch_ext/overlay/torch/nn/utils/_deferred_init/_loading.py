"""``load_state_dict`` of a module with deferred tensors, inside of ``deferred_init`` and after it.

Law: once materialized, the module is as if it had been constructed eagerly and then loaded.

A copying load is recorded, as any other op is. ``reuse_tensors=True`` and ``assign=True`` give the module real tensors
at once, so nothing of them is recorded. What they cannot exchange is materialized before: a tensor whose memory others
see, all below a module whose load runs code from elsewhere (a hook, an override), and a state dict's own deferred
tensors. Such tensors stay materialized, with the values that they would have had, if the load then raises.

What this does not do: a hook that draws random numbers in a load outside of ``deferred_init`` draws from the generator
as it is then.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._reuse_tensors._around import register
from torch.nn.modules._reuse_tensors._stock import runs_torchs_own
from torch.nn.modules._to_empty import own
from torch.nn.modules.module import Module
from torch.nn.utils._deferred_init import _context
from torch.nn.utils._deferred_init._materialize import (
    is_recorded,
    materialize,
    tensors_of,
)
from torch.nn.utils._deferred_init._tape import Tape
from torch.utils._sharded_meta import is_sharded
from torch.utils._swap_meta import is_unshared


@contextmanager
def around(
    module: Module, state_dict: Mapping[str, Any], replaces: bool
) -> Iterator[None]:
    """The context in which ``module.load_state_dict(state_dict)`` runs.

    Args:
        replaces: whether it is one with ``assign=True`` or ``reuse_tensors=True``.
    """
    recorder = _context.current()
    if replaces:
        _materialize_for(module, state_dict)
        if recorder is not None:
            for stream in recorder.tape.streams():
                stream.sync()  # hooks may draw, and nobody records that
        with suspended():
            yield
    elif recorder is None and any(map(is_recorded, _tensors(module))):
        with _context.Recorder(Tape(random=True)).recording():
            yield
    else:
        yield


register(around)


@contextmanager
def suspended() -> Iterator[None]:
    """No context overrides or records what this thread does."""
    thread = _context._thread
    recorder = _context.current()
    thread.recorder = None
    try:
        yield
    finally:
        thread.recorder = recorder


def _tensors(module: Module) -> Iterator[Tensor]:
    return (t for m in module.modules() for t in own(m))


def _materialize_for(module: Module, state_dict: Mapping[str, Any]) -> None:
    """Materialize what a load that replaces tensors cannot replace."""
    tensors: dict[int, Tensor] = {
        id(t): t for t in state_dict.values() if isinstance(t, Tensor)
    }
    seen: set[Module] = set()
    for m in module.modules():
        if not runs_torchs_own(m):
            for below in (b for b in m.modules() if b not in seen):
                seen.add(below)
                tensors.update((id(t), t) for t in tensors_of(below))
    with torch._C.DisableTorchFunction():
        for t in _tensors(module):
            if t.is_meta and not is_sharded(t) and _is_seen(t):
                tensors[id(t)] = t
        found = [t for t in tensors.values() if is_recorded(t)]
    if found:
        with suspended():
            materialize(found, (None, None), eager=False)


def _is_seen(tensor: Tensor) -> bool:
    """Whether another tensor has the memory of this one, or autograd its history."""
    return not (tensor.is_leaf and is_unshared(tensor))
