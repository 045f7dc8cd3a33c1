"""The new files of the patches, and how a process finds them under the module names that they would have in torch.

They lie below ``overlay/`` at upstream's paths. What was imported stays imported when a patch is disabled, as any
module does; it only cannot be found any more.
"""

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

from torch_ext._series import Patch


def new_files(patch: Patch) -> dict[str, Path]:
    """Where the patch's new files lie, by upstream path; those of its folders one by one."""
    root = patch.root / "overlay"
    files = {}
    for name in patch.files:
        path = root / name
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        files.update({file.relative_to(root).as_posix(): file for file in found})
    return files


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.files: dict[str, Path] = {}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname.startswith("torch."):
            stem = fullname.replace(".", "/")
            for file in (f"{stem}.py", f"{stem}/__init__.py"):
                if file in self.files:
                    return importlib.util.spec_from_file_location(
                        fullname, self.files[file]
                    )
        return None


_finder = _Finder()


@contextmanager
def overlay_of(patches: Iterable[Patch]) -> Iterator[None]:
    """From now on find the new files of exactly ``patches``; back to before if the block raises."""
    # NB: behind the other finders, so that a file which torch has by now wins.
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)
    before = _finder.files
    _finder.files = {k: v for patch in patches for k, v in new_files(patch).items()}
    try:
        yield
    except BaseException:
        _finder.files = before
        raise
