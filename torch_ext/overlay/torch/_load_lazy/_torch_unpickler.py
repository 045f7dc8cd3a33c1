"""torch's own unpickler over mapped records, for what the inert reader does not know.

``load`` gives torch.serialization a stand-in for its zip reader, so that everything
torch.load can do (subclasses, quantized and sparse tensors, user's classes) is done
by torch itself, with storages that are mapped instead of read. Law: the result, and
the error where torch refuses the pickle, are torch.load's.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import _weights_only_unpickler
from torch._load_lazy._map import Mapping
from torch._load_lazy._zip import Archive
from torch.serialization import _load, _serialization_tls


class Records:
    """What torch.serialization asks of a PyTorchFileReader, over a mapping."""

    def __init__(self, archive: Archive, mapping: Mapping) -> None:
        self._archive = archive
        self._mapping = mapping

    def has_record(self, name: str) -> bool:
        # NB: without a format version torch computes no offsets of its own.
        return name != ".format_version" and name in self._archive

    def get_record(self, name: str) -> bytes:
        return self._archive.read(name)

    def get_record_offset(self, name: str) -> int:
        return self._archive.extent(_key(name))[0]

    def get_storage_from_record(self, name: str, nbytes: int, _: Any) -> torch.Tensor:
        storage = self._mapping.storage(self._archive.extent(_key(name), nbytes))
        return torch.empty((0,), dtype=torch.uint8, device="cpu").set_(storage)

    def serialization_id(self) -> str:
        name = ".data/serialization_id"
        return self.get_record(name).decode() if self.has_record(name) else ""


def _key(name: str) -> str:
    return name.removeprefix("data/")


@contextmanager
def _kept_map_location() -> Iterator[None]:
    # NB: a load that raises leaves this set in torch.
    before = _serialization_tls.map_location
    try:
        yield
    finally:
        _serialization_tls.map_location = before


def load(
    archive: Archive,
    mapping: Mapping,
    map_location: Any,
    pickle_module: ModuleType | None,
    **pickle_load_args: Any,
) -> Any:
    """Loads as torch.load does, with storages over ``mapping``.

    Args:
        archive: the file's records
        mapping: the file's bytes
        map_location: as for torch.load
        pickle_module: as for torch.load; ``None`` for ``weights_only``
        pickle_load_args: as for torch.load
    """
    pickle_load_args.setdefault("encoding", "utf-8")
    # torch 2.14 on validates sparse tensors whenever weights_only is set.
    if "weights_only" in (_load.__kwdefaults__ or {}):
        pickle_load_args["weights_only"] = pickle_module is None
    module = pickle_module or _weights_only_unpickler
    with _kept_map_location():
        try:
            return _load(
                Records(archive, mapping), map_location, module, **pickle_load_args
            )
        except pickle.UnpicklingError:
            if pickle_module is None:
                # torch.load words the refusal; to meta, it does so without reading data.
                torch.load(archive.name, map_location="meta", weights_only=True)
            raise
