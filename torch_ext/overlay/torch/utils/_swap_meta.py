"""Give a tensor on the meta device real memory while it stays the same Python object.

``param.data = real`` refuses a change of device, and a new Parameter loses whoever
holds the old one: optimizers, ties, plain references, ``weakref``. Here the object
keeps its identity, class, ``__dict__`` and slots, and only the ``TensorImpl`` below it
is exchanged (Note [What lives on the TensorImpl]).

What this does not do: a graph recorded while the tensor was on meta, and a view taken
of it then, stay on meta; so does a gradient, which is dropped. A tensor that C++ refers
to weakly is refused by ``torch._C._swap_tensor_impl`` before anything changes.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes


__all__ = [
    "PLAIN_KEYS",
    "PLAIN_KEYS_ON_META",
    "USERS_OF_UNSHARED",
    "has_plain_keys",
    "impls_for",
    "is_on_meta",
    "is_unshared",
    "meta_ties",
    "storage_like",
    "swap_all",
    "swap_back_all",
    "swap_meta",
    "undisturbed",
    "unseen_tensor",
    "users_of",
]

# Note [What lives on the TensorImpl]
# The Python object holds the class, __dict__, the dicts of tensor hooks and the
# weakrefs. The impl holds sizes, storage, requires_grad, .grad, the AccumulateGrad
# node and a pointer to the dicts of hooks. So after an exchange of impls requires_grad
# is carried over, and the dicts are announced to the new impl by setting the attribute
# to itself; the handles that users hold point to the very same dicts and go on working.
# torch.utils.swap_tensors exchanges both halves, which is why it refuses weakrefs and
# why hooks stop firing after it.


def swap_meta(tensor: Tensor, data: Tensor) -> Tensor:
    """Let ``tensor``, a leaf on meta, have the memory, sizes and dtype of ``data``.

    Returns:
        Tensor: what :func:`swap_all` exchanges ``tensor`` with to undo it.
    """
    (impl,) = impls = impls_for([tensor], [data])
    swap_all([tensor], impls)
    return impl


def impls_for(tensors: list[Tensor], data: Iterable[Tensor]) -> list[Tensor]:
    """What :func:`swap_all` exchanges ``tensors`` with, for each to have its ``data``."""
    # NB: unlike detach(), .data does not share the version counter.
    impls = [values.data for values in data]
    for impl in compress(impls, map(_get_requires_grad, tensors)):
        impl.requires_grad = True
    return impls


_get_requires_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def swap_all(tensors: list[Tensor], impls: list[Tensor]) -> None:
    """Exchange impls; should that raise, :func:`swap_back_all` undoes what was done."""
    deque(map(torch._C._swap_tensor_impl, tensors, impls), maxlen=0)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        get_hooks = getattr(Tensor, hooks).__get__
        for tensor in compress(tensors, map(get_hooks, tensors)):
            setattr(tensor, hooks, getattr(tensor, hooks))


def swap_back_all(tensors: list[Tensor], impls: list[Tensor]) -> None:
    """Undo :func:`swap_all`, all of it or as far as it came."""
    done = [i for i, impl in enumerate(impls) if impl.is_meta]
    swap_all([tensors[i] for i in done], [impls[i] for i in done])


@contextmanager
def undisturbed() -> Iterator[None]:
    """No grad mode, inference mode, default device or ``__torch_function__`` interferes."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def is_on_meta(value: object) -> bool:
    """``value.is_meta`` of a tensor, asked so that modes, subclasses and tensor-likes see nothing of it elsewhere."""
    # NB: inside of a deferred_init, which is a mode, what is on meta may say that it is not.
    return (
        issubclass(type(value), Tensor)
        and _dispatch_keys(value).has(torch._C.DispatchKey.Meta)  # type: ignore[arg-type]
        and value.is_meta  # type: ignore[attr-defined]
    )


# What has_plain_keys found so far; for who cannot afford the call.
PLAIN_KEYS: set[int] = set()
PLAIN_KEYS_ON_META: set[int] = set()
_dispatch_keys = torch._C._dispatch_keys


def has_plain_keys(tensor: Tensor) -> bool:
    """Whether this is strided memory (or meta) as ``torch.empty`` gives it.

    Not so for what is sparse, quantized, lazily conjugated, an inference tensor, or
    wrapped by a subclass with ``__torch_dispatch__``.
    """
    keys = _dispatch_keys(tensor).raw_repr()
    if keys in PLAIN_KEYS or keys in PLAIN_KEYS_ON_META:
        return True
    with undisturbed(), _disable_current_modes():
        plain = _dispatch_keys(torch.empty(0, device=tensor.device))
    if plain.raw_repr() == keys:
        (PLAIN_KEYS_ON_META if tensor.is_meta else PLAIN_KEYS).add(keys)
    return plain.raw_repr() == keys


def users_of(tensor: Tensor) -> int:
    """How many tensors (and others) hold the storage of ``tensor``; see ``USERS_OF_UNSHARED``."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def unseen_tensor() -> Tensor:
    """A tensor that no mode sees: this module may be imported, by the first load, within one that refuses factories."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return torch.empty(1, device="cpu")


USERS_OF_UNSHARED = users_of(unseen_tensor())


def is_unshared(tensor: Tensor) -> bool:
    """Whether no other tensor holds the storage of ``tensor``."""
    # NB: untyped_storage() makes a Python object that lives as long as the storage.
    storage: int = torch._C._storage_id(tensor)  # type: ignore[attr-defined]
    if torch._C._storage_Use_Count(storage) == 1:
        return True
    return users_of(tensor) == USERS_OF_UNSHARED


def meta_ties(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Find which of ``tensors``, all plain and on meta, are tied by their storage.

    Uninitialized (lazy) ones are tied to none.

    Returns:
        dict: for the ``id`` of each tensor that shares its storage with others of
        ``tensors``, the list of all that do.
    """
    by_storage: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if not is_lazy(tensor) and not is_unshared(tensor):
            key = tensor.untyped_storage()._cdata
            by_storage.setdefault(key, {})[id(tensor)] = tensor
    ties = (list(group.values()) for group in by_storage.values() if len(group) > 1)
    return {id(tensor): group for group in ties for tensor in group}


def storage_like(group: list[Tensor], device: torch.device) -> list[Tensor]:
    """Zeros on ``device`` for each of a group of :func:`meta_ties`, tied as they are."""
    nbytes = group[0].untyped_storage().nbytes()
    storage = torch.zeros(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    return [
        torch.empty(0, dtype=t.dtype, device=device).set_(
            storage,
            t.storage_offset(),
            t.size(),
            t.stride(),
        )
        for t in group
    ]
