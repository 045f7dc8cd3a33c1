"""Whether a patch still fits the installed torch.

``clean``: each touched function is, up to its docstring, one of those that the seam was written for. ``stale``: one is
not, and applying the seam anyway could break it. ``upstream``: torch has the patch by now, and enabling it is a no-op.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch_ext._error import PatchError
from torch_ext._seam import read_seams, Seam
from torch_ext._series import Patch
from torch_ext._signature import Signature
from torch_ext._source import assigned, Source
from torch_ext._upstream import installed, Upstream


@dataclass(frozen=True)
class Drift:
    """Grade of one patch: ``clean``, ``stale`` or ``upstream``, and the changed functions of a stale one."""

    grade: str
    changed: tuple[Seam, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(seam.qualname for seam in self.changed)
        return f"{self.grade}: {names}" if names else self.grade


def seams_of(patch: Patch) -> list[Seam]:
    """The seams that carry the patch's name."""
    seams = read_seams(patch.root / "seams")
    return [seam for seam in seams if seam.patch == patch.name]


def grade(patch: Patch, upstream: Upstream | None = None) -> Drift:
    """Grade ``patch`` against ``upstream`` (default: the torch of this process)."""
    upstream = upstream or installed()
    seams = seams_of(patch)
    if _has_landed(patch, seams, upstream):
        return Drift("upstream")
    changed = tuple(seam for seam in seams if not _fits(seam, upstream))
    return Drift("stale", changed) if changed else Drift("clean")


def _fits(seam: Seam, upstream: Upstream) -> bool:
    source = upstream.source(seam.file)
    if seam.is_exports:
        return source.exports is not None or not source.has_all
    return source.fingerprint(seam.qualname) in seam.base


def check(patches: Sequence[Patch]) -> None:
    """Raise a :class:`PatchError` that names every function which is not as a seam expects it."""
    stale = [(patch, grade(patch).changed) for patch in patches]
    if not any(changed for _, changed in stale):
        return
    functions = "\n\t".join(
        f"{patch.name}: {seam}" for patch, changed in stale for seam in changed
    )
    raise PatchError(
        f"Expected these functions to be as in a supported torch (2.11 to 2.15), but torch {installed().version()} "
        f"has others:\n\t{functions}\n"
        "(Did you mean to install a supported torch? To try the patch on these functions as they are, "
        "pass strict=False.)"
    )


def _has_landed(patch: Patch, seams: Sequence[Seam], upstream: Upstream) -> bool:
    """Torch knows every parameter, option and name that the patch adds or, where it adds none, every new file."""
    adds = [seam for seam in seams if seam.adds]
    if not adds:
        files = [upstream.root / file for file in patch.files]
        return bool(files) and all(file.exists() for file in files)
    return all(
        seam.adds.keys() <= _names_in(upstream.source(seam.file), seam) for seam in adds
    )


def _names_in(source: Source, seam: Seam) -> set[str]:
    """The parameters or options that the function or class of ``seam`` has, or the public names of its module."""
    if seam.is_class:
        class_node = source.classes.get(seam.qualname)
        return set(assigned(class_node)) if class_node else set()
    if seam.is_exports:
        return source.public
    node = source.functions.get(seam.qualname)
    return set(Signature(source, node).params) if node else set()
