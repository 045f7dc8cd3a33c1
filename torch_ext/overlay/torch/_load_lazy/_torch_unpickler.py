"""torch's own unpickler over mapped records, for what the inert reader does not know.

``load`` gives torch.serialization a stand-in for its zip reader, so that everything
torch.load can do (subclasses, quantized and sparse tensors, user's classes) is done
by torch itself, with storages that are mapped instead of read. Law: the result, and
the error where torch refuses the pickle, are torch.load's.
"""

import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import _weights_only_unpickler
from torch._load_lazy import _invariants
from torch._load_lazy._map import Mapping
from torch._load_lazy._open import forgotten_if_failed, SIGNS_OF_DAMAGE
from torch._load_lazy._places import carrying
from torch._load_lazy._screen import Refused, screen
from torch._load_lazy._zip import Archive
from torch.serialization import _load


class Records:
    """What torch.serialization asks of a PyTorchFileReader, over a mapping."""

    def __init__(self, archive: Archive, mapping: Mapping) -> None:
        self._archive = archive
        self._mapping = mapping
        self.key = ""  # of the storage asked for last

    def has_record(self, name: str) -> bool:
        # NB: without a format version torch computes no offsets of its own.
        return name != ".format_version" and name in self._archive

    def get_record(self, name: str) -> bytes:
        return self._archive.read(name)

    def get_record_offset(self, name: str) -> int:
        return self._archive.extent(_key(name))[0]

    def get_storage_from_record(self, name: str, nbytes: int, _: Any) -> torch.Tensor:
        if type(nbytes) is not int:
            raise TypeError(f"expected an int of bytes, got {type(nbytes).__name__}")
        self.key = _key(name)
        storage = self._mapping.storage(self._archive.extent(self.key, nbytes))
        return torch.empty((0,), dtype=torch.uint8, device="cpu").set_(storage)

    def serialization_id(self) -> str:
        name = ".data/serialization_id"
        return self.get_record(name).decode() if self.has_record(name) else ""


def _key(name: str) -> str:
    return name.removeprefix("data/")


def _recalled(
    records: Records,
    restored: dict[str, torch.UntypedStorage],
    map_location: Callable[..., Any],
) -> Callable[..., Any]:
    """Returns ``map_location``, not called again for storages that it was called for."""

    def recall(storage: Any, location: str) -> Any:
        known = restored.get(records.key)
        if known is not None:
            return known
        return carrying(map_location)(storage, location)

    return recall


def check(archive: Archive) -> None:
    """Raises if the file's pickle asks more of torch's unpickler than it may."""
    try:
        screen(archive.read("data.pkl"), archive.size)
    except Refused as refusal:
        archive.bad_record("data.pkl", "a pickle of a state dict", str(refusal))


def load(
    archive: Archive,
    mapping: Mapping,
    map_location: Any,
    pickle_module: ModuleType | None,
    restored: dict[str, torch.UntypedStorage],
    **pickle_load_args: Any,
) -> Any:
    """Loads as torch.load does, with storages over ``mapping``.

    Args:
        archive: the file's records
        mapping: the file's bytes
        map_location: as for torch.load
        pickle_module: as for torch.load; ``None`` for ``weights_only``
        restored: what a callable ``map_location`` has made of storages already, by key
        pickle_load_args: as for torch.load
    """
    pickle_load_args.setdefault("encoding", "utf-8")
    # torch 2.14 on validates sparse tensors whenever weights_only is set.
    if "weights_only" in (_load.__kwdefaults__ or {}):
        pickle_load_args["weights_only"] = pickle_module is None
    module = pickle_module or _weights_only_unpickler
    records = Records(archive, mapping)
    if callable(map_location):
        map_location = _recalled(records, restored, map_location)
    try:
        with forgotten_if_failed():
            try:
                result = _load(records, map_location, module, **pickle_load_args)
            except pickle.UnpicklingError:
                if pickle_module is None:
                    _refuse(archive.name)
                raise
    except SIGNS_OF_DAMAGE as error:
        # NB: quantized and nested tensors are not implemented on the meta device.
        is_known = pickle_module is None and not isinstance(error, NotImplementedError)
        is_known = is_known or _invariants.is_of_rebuild(error)
        if not is_known or archive.name in str(error):
            raise
        got = f"one on which torch's unpickler raised {type(error).__name__}: {error}"
        archive.bad_record("data.pkl", "a pickle of a state dict", got)
    _invariants.check(result, partial(archive.bad_record, "data.pkl"))
    return result


def _refuse(path: str) -> None:
    """Raises what torch.load raises for a file that weights_only forbids, and reads no data."""
    with suppress(NotImplementedError):  # not all tensors can be on meta
        torch.load(path, map_location="meta", weights_only=True)
    torch.load(path, mmap=True, weights_only=True)
