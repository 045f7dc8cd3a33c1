"""Where the storages of a file go: into its mapping, on meta, to a device later, or elsewhere.

Law: a storage comes to the device to which ``torch.load`` brings it under the same
``map_location``, and where there is no such device, the error is torch.load's. A callable
is called once for each storage, with a mapped one, and what it returns is used; so is what
a user's deserializer returns (``torch.serialization.register_package``).

Unlike torch.load, which gives each tensor on meta a storage of its own, tensors on meta
share storages as the saved ones did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._load_lazy._deferred import DeferredStorage
from torch._load_lazy._inert import Unsupported
from torch._load_lazy._map import Mapping
from torch._load_lazy._source import Source
from torch._load_lazy._zip import Extent
from torch.serialization import (
    _get_restore_location,
    _is_meta_location,
    _package_registry,
)


class NotRestored(Exception):
    """Carries an error of ``map_location`` past those who take it for a bad pickle's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function``, but for its errors, which are carried."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise NotRestored(error) from error

    return call


@contextmanager
def _carried() -> Iterator[None]:
    try:
        # NB: what is called is the user's, and so are the torch function modes.
        with torch._C._EnableTorchFunction():
            yield
    except Exception as error:
        raise NotRestored(error) from error


class Places:
    """Makes the storages of one file.

    Args:
        source: the file's bytes
        mapping: the file, mapped; ``None`` if it can't be
        map_location: as for torch.load
        swapped: whether the file has another byte order than this machine
    """

    def __init__(
        self,
        source: Source,
        mapping: Mapping | None,
        map_location: Any,
        swapped: bool = False,
    ) -> None:
        self.mapping = mapping
        self._source = source
        self._map_location = map_location
        self._swapped = swapped
        self._restore = _get_restore_location(map_location)
        self._devices: dict[str, torch.device | None] = {}
        # What came of storages that went to a callable, by key.
        self.restored: dict[str, torch.UntypedStorage] = {}

    def are_mapped(self, location: str) -> bool:
        """Whether storages saved from ``location`` are extents of the mapping as they are."""
        if self._swapped or self.mapping is None:
            return False
        device = self._device(location)
        return device is not None and device.type == "cpu"

    def storage(
        self, key: str, extent: Extent, dtype: torch.dtype, location: str
    ) -> torch.UntypedStorage | DeferredStorage:
        """Returns the storage of one record.

        Args:
            key: names the storage in the file
            extent: where its bytes lie
            dtype: of its elements
            location: where it was saved from
        """
        device, (start, size) = self._device(location), extent
        if device is None:
            return self._restored(key, extent, dtype, location)
        if device.type == "meta":
            storage = torch.UntypedStorage(size, device="meta")
            if _is_meta_location(self._map_location):
                storage._checkpoint_offset = start
            return storage
        swap = _swap(dtype) if self._swapped else 1
        if device.type == "cpu" and not size:
            empty: torch.UntypedStorage = torch.UntypedStorage(0, device="cpu")[:0]
            return empty
        if device.type == "cpu" and self.mapping is not None and swap == 1:
            mapped: torch.UntypedStorage = self.mapping.storage(extent)
            return mapped
        return DeferredStorage(self._source, extent, device=device, swap=swap)

    def _restored(
        self, key: str, extent: Extent, dtype: torch.dtype, location: str
    ) -> torch.UntypedStorage:
        if self.mapping is None:
            if not callable(self._map_location):
                with _carried():  # raises if there is no such place
                    self._restore(torch.UntypedStorage(0, device="cpu"), location)
            raise Unsupported("location")
        storage = self.mapping.storage(extent)
        if self._swapped:
            storage.byteswap(dtype)
        with _carried():
            result: torch.UntypedStorage = self._restore(storage, location)
            # Raises what torch.load raises if this is no storage.
            torch.storage.TypedStorage(wrap_storage=result, dtype=dtype, _internal=True)
        self.restored[key] = result
        return result

    def _device(self, location: str) -> torch.device | None:
        """Returns where storages go; ``None`` if only a call with the storage tells."""
        if location not in self._devices:
            with _carried():
                self._devices[location] = _device(location, self._map_location)
        return self._devices[location]


def _device(location: str, map_location: Any) -> torch.device | None:
    # See _get_restore_location in torch/serialization.py.
    target: Any = location
    if _is_meta_location(map_location):
        return torch.device("meta")
    if isinstance(map_location, dict):
        target = map_location.get(location, location)
    elif isinstance(map_location, (str, torch.device)):
        target = str(map_location)
    elif map_location is not None:
        return None
    if type(target) is not str:
        return None
    for _, _, deserialize in _package_registry:
        if not _is_torchs(deserialize):
            return None
        # An empty storage shows the device, or the error if it is not to be had.
        storage = deserialize(torch.UntypedStorage(0, device="cpu"), target)
        if storage is not None:
            device: torch.device = storage.device
            return device
    return None


def _is_torchs(deserialize: Callable[..., Any]) -> bool:
    function = deserialize.func if isinstance(deserialize, partial) else deserialize
    return getattr(function, "__module__", None) == "torch.serialization"


def _swap(dtype: torch.dtype) -> int:
    # A complex number is two numbers, each swapped by itself.
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
