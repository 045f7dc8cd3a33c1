"""``torch.save`` onto a file that is lazily open.

To open such a file for writing is to empty it, and with it the tensors that are to be saved.
So a new file is written beside it, and takes its name when complete. Laws: whatever happens
while it is written, to the process or to the machine, the name leads to the old file or to the
new one, whole; the new one has the old one's mode, owner and extended attributes; symbolic
links stay; tensors of the old one keep their values.

A file that has other hard links, or cannot be replaced (its folder is read-only, it is a
mount point, its owner is someone else) is written over in place, as ever, after what
is mapped of it was copied to memory.

Not here: file objects, of which the file is empty before torch.save is called.
"""

import os
import stat
import tempfile
from contextlib import suppress
from typing import Any

from torch import serialization
from torch._load_lazy import _live


def is_open(f: Any) -> bool:
    """Whether ``f`` is the path of a file that is lazily open, and that can be written to."""
    if not _live.is_any() or not isinstance(f, (str, os.PathLike)):
        return False
    if not isinstance(os.fspath(f), str):  # torch.save doesn't take bytes
        return False
    try:
        return _live.is_live(os.stat(f)) and os.access(f, os.W_OK)
    except (OSError, ValueError):
        return False


def save(obj: Any, f: Any, *arguments: Any) -> None:
    """Saves ``obj`` to the path ``f`` as :func:`torch.save` does, where that is open.

    Args:
        obj: as for torch.save
        f: a path for which :func:`is_open`
        arguments: the others of torch.save

    Raises:
        RuntimeError: if the file can neither be replaced nor be written over
    """
    target = os.path.realpath(f)
    status = os.stat(target)
    new = _make_beside(target, os.path.basename(f), status)
    if new is None or not _replace(obj, new, target, arguments):
        _save_in_place(obj, f, status, arguments)


def _make_beside(target: str, name: str, status: os.stat_result) -> str | None:
    """Makes an empty file that can take the place of ``target``; returns its path."""
    if status.st_nlink > 1:
        return None
    # NB: up to its last dot a file's name is the name of the folder in its zip archive.
    stem = name[: name.rfind(".")] if "." in name else name
    try:
        file, new = tempfile.mkstemp(prefix=f"{stem}.", dir=os.path.dirname(target))
    except OSError:
        return None
    try:
        made = os.fstat(file)
        if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(file, status.st_uid, status.st_gid)
        os.fchmod(file, stat.S_IMODE(status.st_mode))
        _copy_attributes(target, new)
    except OSError:
        os.unlink(new)
        return None
    finally:
        os.close(file)
    return new


def _copy_attributes(old: str, new: str) -> None:
    """Copies extended attributes, such as an access control list, as far as possible."""
    if not hasattr(os, "listxattr"):
        return
    with suppress(OSError):
        for name in os.listxattr(old):
            os.setxattr(new, name, os.getxattr(old, name))


def _replace(obj: Any, new: str, target: str, arguments: tuple[Any, ...]) -> bool:
    """Writes ``new`` and gives it the name of ``target``; ``False`` if it cannot have it."""
    try:
        serialization.save(obj, new, *arguments)
        # NB: else, after a loss of power, the name may lead to a file without contents.
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        _live.keep(os.stat(target))
        try:
            os.replace(new, target)
        except OSError:
            os.unlink(new)
            return False
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    return True


def _save_in_place(
    obj: Any, f: Any, status: os.stat_result, arguments: tuple[Any, ...]
) -> None:
    if not _live.detach(status):
        raise RuntimeError(
            f"Expected {os.fspath(f)} to be a file that can be replaced, since tensors of it "
            f"are lazily loaded, got {_obstacle(status)}. (Did you mean to save to "
            "another file?)"
        )
    serialization.save(obj, f, *arguments)


def _obstacle(status: os.stat_result) -> str:
    if status.st_nlink > 1:
        return f"one with {status.st_nlink} hard links"
    return "one whose folder, owner or mount does not allow it"
