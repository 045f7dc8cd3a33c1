"""``torch.load(f, lazy=True)``: what ``torch.load(f)`` returns, without reading its data.

The index is read at once. Of a local file, the tensors are made over a private mapping, so
that the system reads what is used, when it is used; what can't be mapped (a file object,
another device, the other byte order) becomes deferred tensors, which read at their first use.
Law: the result equals that of ``torch.load(f)`` in everything but how it came to memory,
and a bad file is an error that names file, record and offset.

Below: one file for each format (``_zip``, ``_legacy``, ``_tar``, ``_safetensors``,
``_sharded``), ``_inert`` and ``_rows`` read pickles, ``_build`` makes their objects,
``_places`` decides where storages go, ``_map`` and ``_source`` get at bytes, and
``_torch_unpickler`` does what the others leave.
"""

import os
import stat
import sys
from dataclasses import replace
from typing import Any, BinaryIO

import torch
from torch._load_lazy import _legacy, _safetensors, _sharded, _tar, _torch_unpickler
from torch._load_lazy._build import Builder
from torch._load_lazy._gc import paused_gc
from torch._load_lazy._inert import Reader, Unsupported
from torch._load_lazy._map import Mapping
from torch._load_lazy._open import OpenFile
from torch._load_lazy._places import NotRestored, Places
from torch._load_lazy._request import (
    check_path,
    is_ordinary,
    NotLazy,
    Request,
    request,
)
from torch._load_lazy._sniff import BEGINNING, describe
from torch._load_lazy._source import FileSource, object_source
from torch._load_lazy._zip import Archive
from torch.serialization import (
    _check_seekable,
    get_default_load_endianness,
    LoadEndianness,
)


def check_flag(lazy: Any) -> None:
    """Raises if ``lazy`` is no bool: what is true of others is likely a slip."""
    if not isinstance(lazy, bool):
        raise TypeError(f"Expected lazy to be True or False, got {lazy!r}.")


def load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    **pickle_load_args: Any,
) -> Any:
    """Loads ``f`` as :func:`torch.load` does, without reading its tensors' data.

    Args:
        f: path of a file of ``torch.save`` or safetensors, of a sharded checkpoint's index,
            or of a folder with an index, ``model.safetensors`` or ``pytorch_model.bin``; or
            a seekable binary file object
        map_location: as for torch.load
        pickle_module: as for torch.load
        weights_only: as for torch.load
        mmap: ``True`` maps a local file whatever ``config.load.lazy_mode`` says, ``False``
            defers its tensors instead
        pickle_load_args: as for torch.load

    Returns:
        What ``torch.load`` returns, with tensors that are mapped from the file or deferred.

    Raises:
        ValueError: if an argument asks for what is not lazy, or ``f`` is a URL or the contents of a file
        RuntimeError: if the file is damaged, or in no format that is known
        pickle.UnpicklingError: if ``weights_only`` forbids what the file holds
    """
    check_path(f)
    made = request(f, map_location, pickle_module, weights_only, mmap, pickle_load_args)
    try:
        with paused_gc():
            if made.is_path:
                return _load_path(os.fsdecode(f), made)
            _check_seekable(f)
            return _load_file(OpenFile(made, f, object_source(f), None))
    except NotRestored as carrier:
        _tell_other_ranks(carrier.error)
        raise carrier.error from None
    except Exception as error:
        _tell_other_ranks(error)
        raise


def _tell_other_ranks(error: BaseException) -> None:
    """Those that load a sharded module may be waiting for this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            from torch.distributed import errors
        except ImportError:
            return
        errors.note(error)


def load_deferred(path: str, *, weights_only: bool | None = None) -> Any:
    """Loads a file to the CPU as :func:`load` does, for who reads parts of it once.

    Its tensors are deferred, so that the parts are read straight to where they go; of a file
    of which only torch's own unpickler makes sense, they are mapped.

    Args:
        path: as ``f`` of :func:`load`
        weights_only: as for torch.load
    """
    check_path(path)
    made = request(path, "cpu", None, weights_only, False, {})
    try:
        with paused_gc():
            return _load_path(path, replace(made, lazy_only=True))
    except NotLazy:
        return load(path, "cpu", weights_only=made.weights_only)


def _load_path(path: str, made: Request) -> Any:
    if os.path.isdir(path):
        path = _sharded.find_checkpoint(path)
    if path.endswith(".index.json"):
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            index = file.read(min(size, _sharded.MAX_INDEX) + 1)
        return _sharded.load(path, index, lambda p: _load_file_of(p, made.of(p)))
    return _load_file_of(path, made)


def _load_file_of(path: str, made: Request) -> Any:
    with _open(path) as file:
        source = FileSource(path, os.fstat(file.fileno()))
        mode = "map" if made.mmap else None
        mapping = None if made.mmap is False else Mapping(file, source.size, mode)
        return _load_file(OpenFile(made, file, source, mapping))


def _open(path: str) -> BinaryIO:
    # NB: opening a named pipe would wait for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise RuntimeError(
            f"Expected {path} to be a regular file with lazy=True, got another kind of "
            "file. (Did you mean to load without lazy=True?)"
        )
    return open(path, "rb", buffering=0)


def _load_file(file: OpenFile) -> Any:
    magic = file.read(0, min(16, file.size))
    if not magic and file.mapping is None:
        # As torch.load says it, for those who load until there is no more.
        raise EOFError("Ran out of input")
    if _safetensors.is_safetensors(file, magic):
        if magic[8:9] != b"{":
            _refuse_others(file, "the beginning of a safetensors file")
        return _safetensors.load(file)
    if magic.startswith(b"PK\3\4"):
        return _load_zip(file)
    if file.request.mmap:
        _refuse_others(file, _BEGINNING)
        name = f"{file.request.f}, " if isinstance(file.request.f, str) else ""
        raise RuntimeError(
            "mmap can only be used with files saved with "
            f"`torch.save({name}_use_new_zipfile_serialization=True), "
            "please torch.save your checkpoint with this option in order to use mmap."
        )
    if not (file.request.is_plain and is_ordinary()):
        return file.eager()
    if magic.startswith(b"\x80"):
        return _legacy.load(file)
    _refuse_others(file, _BEGINNING)  # NB: before tar, of which zeros are an empty one
    if _tar.is_tar(file):
        return _tar.load(file)
    file.bad(_BEGINNING, f"{magic!r}", 0)


_BEGINNING = "the beginning of a file that torch.save wrote"


def _refuse_others(file: OpenFile, expected: str) -> None:
    """Raises if the file is known to be something else than a checkpoint."""
    found = describe(file.read(0, min(BEGINNING, file.size)))
    if found is not None:
        file.bad(expected, found.kind, 0, found.remedy)


# The zip format


def _load_zip(file: OpenFile) -> Any:
    archive = Archive(file.rewound(), file.name)
    archive.check_version()
    if "constants.pkl" in archive:  # TorchScript: torch.load knows where to send it
        return file.eager()
    asked = file.request
    if asked.mmap and not asked.is_path:
        raise ValueError("f must be a file path in order to use the mmap argument")
    if file.mapping is not None:
        archive.check_starts(file.file.fileno())
    places = Places(file.source, file.mapping, asked.map_location, _is_swapped(archive))
    if asked.is_plain and is_ordinary():
        try:
            result = _read(archive, places)
            file.leave_at(file.size)
            return result
        except Unsupported:
            pass
    if asked.pickle_module is None:
        _torch_unpickler.check(archive)
    if file.mapping is None:
        return file.eager()
    return _torch_unpickler.load(
        archive,
        file.mapping,
        asked.map_location,
        asked.pickle_module,
        places.restored,
        **asked.pickle_load_args,
    )


def _read(archive: Archive, places: Places) -> Any:
    # NB: torch function modes are off: under a device context, too, torch.load makes
    # its tensors where the file says.
    with torch._C.DisableTorchFunction():
        build = Builder(archive, places)
        result = Reader(archive.read("data.pkl"), build).read()
    if build.pending:  # a storage that is no tensor's, in the result itself
        raise Unsupported("storage")
    return result


def _is_swapped(archive: Archive) -> bool:
    """Whether the file has another byte order than this machine."""
    default = get_default_load_endianness()
    if "byteorder" in archive:
        order = archive.read("byteorder").decode(errors="replace")
        if order not in ("little", "big"):
            raise ValueError(f"Unknown endianness type: {order[:20]}")
    elif default is LoadEndianness.NATIVE:
        order = sys.byteorder
    else:
        order = "big" if default is LoadEndianness.BIG else "little"
    return order != sys.byteorder
