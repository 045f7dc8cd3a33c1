"""Which files are lazily open: those that some tensor still needs.

Whoever takes bytes from a file later than at load adds itself, and is forgotten when it
dies. Files are told apart by device and inode, so that no other name of a file hides it.

Not here: what other processes have open.
"""

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple


class _Entry(NamedTuple):
    owner: weakref.ref[Any]
    file: tuple[int, int]
    detach: Callable[[Any], None] | None
    keep: Callable[[Any], None] | None


# NB: no lock, since an owner may die, and its entry go, at any moment of any thread. Each
# access below is a single operation of a dict.
_entries: dict[int, _Entry] = {}
_tickets = itertools.count()


def add(
    owner: Any,
    status: os.stat_result,
    *,
    detach: Callable[[Any], None] | None = None,
    keep: Callable[[Any], None] | None = None,
) -> None:
    """Notes that ``owner`` needs a file for as long as it lives.

    Args:
        owner: any object that can be weakly referenced
        status: of the file
        detach: makes the owner need the file no more; ``None`` if nothing can
        keep: makes the owner need the file's name no more; ``None`` if it does not
    """
    ticket = next(_tickets)
    forget = lambda _: _entries.pop(ticket, None)
    file = status.st_dev, status.st_ino
    _entries[ticket] = _Entry(weakref.ref(owner, forget), file, detach, keep)


def is_live(status: os.stat_result) -> bool:
    """Whether someone needs the file."""
    return bool(_of(status))


def is_any() -> bool:
    """Whether any file is lazily open."""
    return bool(_entries)


def keep(status: os.stat_result) -> None:
    """Makes everyone need the file's name no more: it is about to go to another file."""
    for entry in _of(status).values():
        owner = entry.owner()
        if owner is not None and entry.keep is not None:
            entry.keep(owner)


def detach(status: os.stat_result) -> bool:
    """Makes everyone need the file no more; ``False``, and nothing, if that cannot be."""
    entries = _of(status)
    if any(entry.detach is None for entry in entries.values()):
        return False
    for ticket, entry in entries.items():
        owner = entry.owner()
        if owner is not None and entry.detach is not None:
            entry.detach(owner)
        _entries.pop(ticket, None)
    return True


def move(file: tuple[int, int]) -> None:
    """Makes all that can be detached need the file no more, given by its device and inode."""
    for ticket, entry in _entries.copy().items():
        owner = entry.owner()
        if entry.file == file and entry.detach is not None and owner is not None:
            entry.detach(owner)
            _entries.pop(ticket, None)


def _of(status: os.stat_result) -> dict[int, _Entry]:
    file = status.st_dev, status.st_ino
    return {k: entry for k, entry in _entries.copy().items() if entry.file == file}
