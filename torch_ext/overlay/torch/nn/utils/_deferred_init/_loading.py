"""``load_state_dict`` of a module with deferred tensors, inside of ``deferred_init`` or a meta block and after it.

Law: once materialized, the module is as if it had been constructed eagerly and then loaded.

A load that copies or assigns is recorded, as any other op is; what ``assign=True`` has put into a module outside of the
contexts is materialized at the end of the load. ``reuse_tensors=True`` exchanges tensors instead, and its plan has to
see which are on meta, so no context answers meanwhile. What it cannot exchange is materialized before:
tensors that see memory that others see, too, where a key loads one of them; all below a module whose load runs code
from elsewhere (a hook, an override); and a state dict's own deferred tensors. If the load raises, they are deferred
again.

What this does not do: a hook that draws random numbers in a load outside of ``deferred_init`` draws from the generator
as it is then. With ``reuse_tensors=True`` a hook does not see the values of deferred tensors of other modules.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import _around_load
from torch.nn.modules._load_state_dict import runs_torchs_own
from torch.nn.modules._to_empty import own
from torch.nn.modules.module import Module
from torch.nn.utils._deferred_init import _context
from torch.nn.utils._deferred_init._materialize import (
    finish,
    is_deferred,
    materialize,
    tensors_of,
)
from torch.nn.utils._deferred_init._slot import mark_of, Unknown
from torch.nn.utils._deferred_init._tape import Tape
from torch.utils._sharded_meta import is_sharded
from torch.utils._swap_meta import is_unshared


@contextmanager
def around_load(
    module: Module, state_dict: Mapping[str, Any], reuses: bool
) -> Iterator[None]:
    """The context in which ``module.load_state_dict(state_dict)`` runs; ``reuses``: with ``reuse_tensors=True``."""
    if reuses:
        with _context.suspended(), _materialized(module, state_dict):
            yield
    elif _context.current() is None and _is_recorded(module):
        recorder = _context.Recorder(Tape(random=True))
        recorder.ops.follows_blocks = recorder.tape.is_load = True
        try:
            with recorder.recording():
                yield
        finally:  # a load that raises for its keys has assigned the others
            _materialize_assigned(module)
    else:
        yield


_around_load.around_load = around_load


def _tensors(module: Module) -> Iterator[Tensor]:
    return (t for m in module.modules() for t in own(m))


def _is_recorded(module: Module) -> bool:
    """Whether a load into ``module`` is recorded; one into a sharded module is not, whose ranks communicate."""
    tensors = list(_tensors(module))
    with torch._C.DisableTorchFunction():  # nobody else is to see that this asks
        return any(map(_has_record, tensors)) and not any(map(is_sharded, tensors))


def _has_record(tensor: Tensor) -> bool:
    """Whether what is copied to ``tensor`` can be recorded; nothing is, yet, of an uninitialized parameter."""
    if not tensor.is_meta or is_sharded(tensor):
        return False
    mark = mark_of(tensor)
    return not (mark is None or isinstance(mark, Unknown)) and mark.tape.is_remembered


def _materialize_assigned(module: Module) -> None:
    """What ``assign=True`` has put into the module is there at once, as in stock, in the memory of the state dict."""
    with torch._C.DisableTorchFunction():
        on_meta = [t for t in _tensors(module) if t.is_meta and not is_sharded(t)]
        found = [t for t in on_meta if getattr(mark_of(t), "real", None) is not None]
    if found:
        finish(materialize(found, (None, None))[0])


@contextmanager
def _materialized(module: Module, state_dict: Mapping[str, Any]) -> Iterator[None]:
    """What a load that exchanges tensors cannot exchange is materialized, unless that load raises."""
    tensors = {id(t): t for t in state_dict.values() if isinstance(t, Tensor)}
    odd = [m for m in module.modules() if not runs_torchs_own(m)]
    below = {b for m in odd for b in m.modules()}
    tensors.update((id(t), t) for m in below for t in tensors_of(m))
    tensors.update((id(t), t) for t in _seen_and_loaded(module, state_dict))
    found = [t for t in tensors.values() if is_deferred(t)]
    slots, undo = materialize(found, (None, None))
    recorder = _context.innermost()
    if odd and recorder is not None:
        for stream in recorder.tape.streams():
            stream.sync()  # hooks may draw, and nobody records that
    try:
        yield
    except BaseException:
        undo()
        raise
    finish(slots)


def _seen_and_loaded(module: Module, state_dict: Mapping[str, Any]) -> list[Tensor]:
    """Tensors on meta that see memory that others see, too, where a key of the state dict loads one of them."""
    on_meta = (t for t in _tensors(module) if t.is_meta and not is_sharded(t))
    seen = [t for t in on_meta if _is_seen(t)]
    if not seen:
        return []
    loaded = {_storage(t) for name, t in _named(module) if name in state_dict}
    return [t for t in seen if _storage(t) in loaded]


def _named(module: Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0


def _is_seen(tensor: Tensor) -> bool:
    """Whether another tensor has the memory of this one, or autograd its history."""
    return not (tensor.is_leaf and is_unshared(tensor))
