"""``torch.load(f, lazy=True)``: what ``torch.load(f)`` returns, without reading its data.

The pickle is read at once; the tensors are made over a private mapping of the file, so that
the system reads what is used, when it is used. Law: the result equals that of
``torch.load(f)`` in everything but how it came to memory, and a bad file is an error that names
file, record and offset.

Not yet: file objects, other devices than the CPU, the legacy formats and safetensors.
Below: ``_zip`` finds the records, ``_inert`` reads the pickle, ``_build`` makes the
objects, ``_map`` makes memory of extents, ``_torch_unpickler`` does what the others leave.
"""

import os
import pickle
import stat
import sys
import warnings
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch._load_lazy import _torch_unpickler
from torch._load_lazy._build import Builder
from torch._load_lazy._gc import paused_gc
from torch._load_lazy._inert import Reader, Unsupported
from torch._load_lazy._map import Mapping
from torch._load_lazy._zip import Archive
from torch.serialization import (
    _check_dill_version,
    _default_to_weights_only,
    _is_path,
    _package_registry,
    _serialization_tls,
    get_default_load_endianness,
    get_default_mmap_options,
    LoadEndianness,
)


_MAP_PRIVATE = 2  # as in torch.utils.serialization.config, on any system
_UNUSED = "pickle_load_args only works if `weights_only=False`."
_WITHOUT = "Did you mean to load without lazy=True?"


def load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    **pickle_load_args: Any,
) -> Any:
    """What :func:`torch.load` does with ``lazy=True``; its arguments are described there.

    Raises:
        ValueError: if an argument asks for what is not lazy
        RuntimeError: if the file is damaged, or in another format
        pickle.UnpicklingError: if ``weights_only`` forbids what the file holds
    """
    weights_only = _resolve_weights_only(weights_only, pickle_module)
    _check_dill_version(pickle_module)
    _check_arguments(f, map_location, mmap)
    if weights_only and pickle_load_args:
        warnings.warn(_UNUSED, stacklevel=3)
    path, cpu = os.fsdecode(f), map_location is not None
    if not weights_only and pickle_module is None:
        pickle_module = pickle
    inert = pickle_module in (None, pickle) and not pickle_load_args and _is_ordinary()
    with _open(path) as file:
        with paused_gc():
            archive = _archive(file, path)
            mapping = Mapping(file, archive.size)
            if inert and "constants.pkl" not in archive:
                try:
                    return _read(archive, mapping, cpu)
                except Unsupported:
                    pass
        if "constants.pkl" in archive:  # TorchScript: torch.load knows where to send it
            where = path, map_location, pickle_module
            return torch.load(*where, weights_only=weights_only)
        return _torch_unpickler.load(
            archive, mapping, map_location, pickle_module, **pickle_load_args
        )


def _read(archive: Archive, mapping: Mapping, cpu: bool) -> Any:
    # NB: torch function modes are off: under a device context, too, torch.load makes
    # its tensors where the file says.
    with torch._C.DisableTorchFunction():
        build = Builder(archive, mapping, cpu)
        result = Reader(archive.read("data.pkl"), build).read()
    if build.pending:  # a storage that is no tensor's, in the result itself
        raise Unsupported("storage")
    return result


def _is_ordinary() -> bool:
    """Whether nothing in force asks torch for other tensors than plain ones."""
    return not (
        torch.is_inference_mode_enabled()
        or _serialization_tls.skip_data
        or torch._C._len_torch_dispatch_stack()
        or torch._guards.detect_fake_mode(None) is not None
        or _package_registry[0][0] < 10  # a device registered before the CPU
    )


# Arguments


def _resolve_weights_only(
    weights_only: bool | None, pickle_module: ModuleType | None
) -> bool:
    """Returns what torch.load makes of its arguments and the environment."""
    given = weights_only is not None
    chosen = bool(weights_only) if given else _default_to_weights_only(pickle_module)
    force, force_no = (
        os.getenv(name, "0").lower() in ("1", "y", "yes", "true")
        for name in (
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
        )
    )
    if force and force_no:
        raise RuntimeError(
            "Only one of `TORCH_FORCE_WEIGHTS_ONLY_LOAD` or "
            "`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` should be set, but both were set."
        )
    if force:
        chosen = True
    elif force_no and not given:
        warnings.warn(
            "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected, since the"
            "`weights_only` argument was not explicitly passed to `torch.load`, "
            "forcing weights_only=False.",
            stacklevel=4,
        )
        chosen = False
    if chosen and pickle_module is not None:
        raise RuntimeError(
            "Can not safely load weights when explicit pickle_module is specified"
        )
    return chosen


def _check_arguments(f: Any, map_location: Any, mmap: bool | None) -> None:
    if not (_is_path(f) or isinstance(f, bytes)):
        raise ValueError(
            f"Expected f to be a path with lazy=True, got {type(f).__name__}. ({_WITHOUT})"
        )
    if not (
        map_location is None
        or (isinstance(map_location, str) and map_location == "cpu")
        or (isinstance(map_location, torch.device) and str(map_location) == "cpu")
    ):
        raise ValueError(
            "Expected map_location to be None or 'cpu' with lazy=True, "
            f"got {map_location!r}. ({_WITHOUT})"
        )
    if mmap is False:
        raise ValueError(
            f"Expected mmap to be None or True with lazy=True, got False. ({_WITHOUT})"
        )
    if mmap and get_default_mmap_options() not in (None, _MAP_PRIVATE):
        raise ValueError(
            "Expected set_default_mmap_options to be MAP_PRIVATE with lazy=True, got "
            f"MAP_SHARED. ({_WITHOUT})"
        )


# The file


def _open(path: str) -> BinaryIO:
    # NB: opening a named pipe would wait for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise RuntimeError(
            f"Expected {path} to be a regular file with lazy=True, got another kind of "
            f"file. ({_WITHOUT})"
        )
    return open(path, "rb", buffering=0)


def _archive(file: BinaryIO, path: str) -> Archive:
    magic = file.read(4)
    if magic != b"PK\3\4":
        raise RuntimeError(
            f"Expected {path} to be a zip file written by torch.save with lazy=True, got "
            f"{magic!r} at offset 0: a damaged file, or one of another format. ({_WITHOUT})"
        )
    archive = Archive(file, path)
    archive.check_version()
    if "constants.pkl" not in archive:
        _check_byteorder(archive)
    return archive


def _check_byteorder(archive: Archive) -> None:
    default = get_default_load_endianness()
    if "byteorder" in archive:
        order = archive.read("byteorder").decode(errors="replace")
        if order not in ("little", "big"):
            raise ValueError(f"Unknown endianness type: {order[:20]}")
    elif default is LoadEndianness.NATIVE:
        order = sys.byteorder
    else:
        order = "big" if default is LoadEndianness.BIG else "little"
    if order != sys.byteorder:
        archive.bad_record(
            "byteorder", f"{sys.byteorder!r}", f"{order!r}", remedy=_WITHOUT
        )
