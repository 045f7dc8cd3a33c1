"""How ``FullyShardedDataParallel`` initializes what a module has on meta before it shards it.

Law: each module is initialized once, however wrappers are nested, and nothing is that has its values already, from a
checkpoint, a nested wrapper or the module that it is tied to (#90465, #104187). What ``deferred_init`` recorded gets
the values of eager construction; everything else ``param_init_fn``, or ``reset_parameters()``.

While ``param_init_fn`` runs, ``Module.to_empty`` gives memory only to what is on meta: called with the default
``recurse=True`` it would wipe the modules that wrappers further in initialized and sharded. If ``param_init_fn``
*initializes* the children of the module that it is called with, those are initialized twice, as its documentation says.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import Module
from torch.nn.modules._init_once import initialize, reset_parameters, Turns
from torch.nn.modules._to_empty import always_skip


def by_param_init_fn(
    modules: Sequence[Module], param_init_fn: Callable[[Module], None]
) -> None:
    """Call ``param_init_fn`` with each of ``modules``, but for those that only have what has its values already."""
    with always_skip():
        Turns(modules).take(param_init_fn, containers=True)


def by_default(modules: Sequence[Module], device: torch.device) -> None:
    """Give each of ``modules`` the values that were recorded, and else call its ``reset_parameters()``."""
    from torch.nn.utils._deferred_init import _materialize

    tensors = [t for module in modules for t in _materialize.tensors_of(module)]
    untouched = all(t.is_meta for t in tensors)
    slots, _ = _materialize.materialize(tensors, (device, None))
    _materialize.finish(slots, eager=untouched)
    initialize(modules, device, reset_parameters)
