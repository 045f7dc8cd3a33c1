"""Seams: how each patch changes functions that torch already has.

Below this package lies one file per changed upstream file, at upstream's path. A seam is a function decorated with
:func:`seam`, under the name (and inside a class of the name) of the function that it changes::

    class Module:
        @seam("to_empty_skip_materialized", base=("<fingerprint>",))
        def to_empty(self, *, device, recurse=True, skip_materialized: bool = False):
            \"""
            Args:
                skip_materialized: what upstream's ``Args:`` then say of it
            \"""
            if skip_materialized:
                return _to_empty.to_empty(self, device=device, recurse=recurse)
            ...

Parameters that the seam adds are annotated, and keyword-only; those that it needs of upstream's stand bare.

A class that is decorated itself holds new options of a config module's class::

    @seam("load_lazy", base=("<fingerprint>",))
    class load:
        lazy_mode: str = "map"
New public names of a module are no function's change: the file imports them, and says :func:`exports`.

The files are read as text by :mod:`torch_ext._splice` and never imported; :func:`seam` exists so that linters and
people can follow them.
"""

from collections.abc import Callable
from typing import TypeVar


F = TypeVar("F", bound=Callable[..., object])


def seam(patch: str, *, base: tuple[str, ...]) -> Callable[[F], F]:
    """Mark a function as ``patch``'s change to upstream's function of the same qualified name.

    Args:
        patch: name of the patch in the series.
        base: fingerprints (:func:`torch_ext._splice.fingerprint`) of the upstream functions that the seam was written
            for, one for each distinct text among the supported torch releases.
    """
    raise RuntimeError(f"Seams are read as text and never run, got a call for {patch}")


def exports(patch: str, *names: str) -> None:
    """Let the upstream module have ``names``, which the seam file imports, in its namespace and in an ``__all__``.

    Args:
        patch: name of the patch in the series.
        names: what of the seam file's imports is public.
    """
    raise RuntimeError(f"Seams are read as text and never run, got a call for {patch}")
