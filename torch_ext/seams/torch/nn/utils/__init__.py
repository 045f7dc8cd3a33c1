"""Public names that torch.nn.utils gets."""

from torch.nn.utils._deferred_init import (
    deferred_init,
    is_deferred,
    materialize_module,
    materialize_tensor,
    meta_init,
)

from torch_ext.seams import exports


exports(
    "deferred_init",
    "deferred_init",
    "is_deferred",
    "materialize_module",
    "materialize_tensor",
    "meta_init",
)
