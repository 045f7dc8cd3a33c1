"""The new files of the patches, and how a process finds them under the module names that they would have in torch.

They lie below ``overlay/`` at upstream's paths. What was imported stays imported when a patch is disabled, as any
module does; it only cannot be found any more.
"""

import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
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


class _Loader(SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        # NB: here, since it imports this module.
        from torch_ext._sent import wrap_reducers

        wrap_reducers(module.__name__, [*_finder.patches, *_finder.others])


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        # The new files of each patch that is on, and of those of which another process has sent something.
        self.patches: dict[str, dict[str, Path]] = {}
        self.others: dict[str, dict[str, Path]] = {}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname.startswith("torch."):
            stem = fullname.replace(".", "/")
            for files in (*self.patches.values(), *self.others.values()):
                for name in (f"{stem}.py", f"{stem}/__init__.py"):
                    if name in files:
                        file = files[name]
                        loader = _Loader(fullname, str(file))
                        return importlib.util.spec_from_file_location(
                            fullname, file, loader=loader
                        )
        return None


_finder = _Finder()


@contextmanager
def overlay_of(patches: Iterable[Patch]) -> Iterator[None]:
    """From now on find the new files of exactly ``patches``; back to before if the block raises."""
    before = _finder.patches
    _find({patch.name: new_files(patch) for patch in patches})
    try:
        yield
    except BaseException:
        _find(before)
        raise


def find_also(patches: Iterable[Patch]) -> None:
    """From now on find the new files of ``patches``, too, whether they are on or not."""
    _finder.others.update({patch.name: new_files(patch) for patch in patches})
    _find(_finder.patches)


def _find(patches: dict[str, dict[str, Path]]) -> None:
    _finder.patches = patches
    finds = bool(patches or _finder.others)
    # NB: behind the other finders, so that a file which torch has by now wins.
    if finds and _finder not in sys.meta_path:
        sys.meta_path.append(_finder)
    elif not finds and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
