"""Which patches are on: the public functions ``enable``, ``disable`` and ``enabled``.

Every :func:`enable` is one handle, and a patch is on while a live handle names it or a patch that needs it. What is in
force is always computed anew from the live handles, so they may be removed in any order.
"""

import difflib
import sys
import threading
from collections.abc import Iterable
from types import TracebackType

from typing_extensions import Self

from torch_ext import _drift, _graft
from torch_ext._error import PatchError
from torch_ext._overlay import overlay_of
from torch_ext._seam import Seam
from torch_ext._series import Patch, series
from torch_ext._upstream import tree_patches


_lock = threading.RLock()
_handles: list["Handle"] = []


class Handle:
    """What :func:`enable` returns: undoes that one call with :meth:`remove`, or at the end of a ``with`` block."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def remove(self) -> None:
        """Undo the :func:`enable` that made this handle; a second time does nothing."""
        with _lock:
            if self in _handles:
                _handles.remove(self)
                _apply()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<torch_ext.enable({', '.join(map(repr, self.names))})>"


def enable(*names: str, strict: bool = True) -> Handle:
    """Switch patches on in this process.

    Functions are changed in place, so names that were imported before (``from torch import load``) are patched too.
    Patches that a named one builds on are enabled with it. Enables are counted: a patch stays on until each of
    its enables is undone, in any order. Safe to call from several threads.

    Args:
        names: patches of :data:`torch_ext.series`; none means all.
        strict: refuse a patch of which an upstream function has changed. Default: ``True``

    Returns:
        A handle with ``.remove()``, which is also a context manager.

    Raises:
        PatchError: a name is unknown, a function is not the one that the patch was written for, or another library
            has replaced it. Nothing is changed then.

    Example::

        >>> with torch_ext.enable("load_lazy"):
        ...     sd = torch.load("model.pt", lazy=True)
    """
    wanted = _known(names)
    with _lock:
        if strict:
            _drift.check(select(*names))
        handle = Handle(wanted)
        _handles.append(handle)
        try:
            _apply()
        except BaseException:
            _handles.remove(handle)
            raise
    return handle


def disable(*names: str) -> None:
    """Undo the latest :func:`enable` of each named patch; none means each patch of the series.

    A patch that is not enabled is left as it is. A patch that another enabled one builds on stays on.

    Args:
        names: patches of :data:`torch_ext.series`.

    Raises:
        PatchError: a name is unknown.
    """
    wanted = _known(names)
    with _lock:
        for name in wanted:
            for handle in reversed(_handles):
                if name in handle.names:
                    handle.names.remove(name)
                    break
        _handles[:] = [handle for handle in _handles if handle.names]
        _apply()


def enabled() -> tuple[str, ...]:
    """Names of the patches that are on, in the series' order; those of a tree are always on."""
    with _lock:
        live = {name for handle in _handles for name in handle.names}
        on = {patch.name for patch in _closure(live)} | set(tree_patches())
    return tuple(patch.name for patch in series if patch.name in on)


def select(*names: str) -> list[Patch]:
    """The named patches (none means all) and those that they build on, less those that torch has by now."""
    patches = _closure(_known(names))
    return [patch for patch in patches if _drift.grade(patch).grade != "upstream"]


def _apply() -> None:
    """Bring torch to what the live handles ask for."""
    names = enabled()
    on = select(*names) if names else []
    tree = [patch for patch in on if patch.name in tree_patches()]
    with overlay_of([patch for patch in on if patch not in tree]):
        _graft.graft(_seams(on), _seams(tree))
    _end_what_runs([patch for patch in series if patch not in on])


def _end_what_runs(off: Iterable[Patch]) -> None:
    """End what new files of patches that are off have running, such as a thread: they say how by ``_at_disable()``."""
    files = [file for patch in off for file in patch.files]
    names = tuple(file.removesuffix(".py").replace("/", ".") + "." for file in files)
    for name in [name for name in sys.modules if f"{name}.".startswith(names)]:
        end = getattr(sys.modules[name], "_at_disable", None)
        if end is not None:
            end()


def _seams(patches: Iterable[Patch]) -> list[Seam]:
    return [seam for patch in patches for seam in _drift.seams_of(patch)]


def _known(names: Iterable[str]) -> list[str]:
    known = [patch.name for patch in series]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (Did you mean {close[0]!r}?)" if close else ""
            raise PatchError(
                f"Expected names of patches ({', '.join(known)}), got {name!r}.{hint}"
            )
    return list(dict.fromkeys(names)) or known


def _closure(names: Iterable[str]) -> list[Patch]:
    """The named patches and all that they build on, in the series' order."""
    wanted = set(names)
    for patch in reversed(series):  # a patch only requires earlier ones
        if patch.name in wanted:
            wanted.update(patch.requires)
    return [patch for patch in series if patch.name in wanted]
