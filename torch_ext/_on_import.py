"""Tells when a module has been imported.

Some modules of torch take longer to import than all the rest (``torch.distributed.checkpoint``), and whoever does not
use them is not to wait for them.
"""

import sys
import types
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


class _Watch(MetaPathFinder):
    def __init__(self) -> None:
        self.wanted: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname not in self.wanted:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = (
                find(fullname, path, target) if find and finder is not self else None
            )
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            then = self.wanted.get(spec.name)
            if then is not None:
                then()
                self.wanted.pop(spec.name, None)

        # NB: on the loader itself, of which others ask more than this, and by its type.
        loader.exec_module = exec_module  # type: ignore[method-assign]


_watch = _Watch()


def on_import(wanted: dict[str, Callable[[], None]]) -> None:
    """From now on call what is ``wanted`` for a module, by name, once it has been imported; forget what was before."""
    _watch.wanted = dict(wanted)
    if wanted and _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)
    elif not wanted and _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
