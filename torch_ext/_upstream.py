"""The installed torch as it came: where its files are, their source text, and which patches it already carries.

A process may import torch from a tree (see ``_tree.py``), whose files are patched already. Then the pristine text lies
where the tree was made from, and the tree's patches are always on.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path

from torch_ext._error import PatchError
from torch_ext._source import Source


TREE_RECORD = (
    "torch_ext_tree.json"  # beside a tree's torch/: {"origin": ..., "patches": [...]}
)


class Upstream:
    """A folder that holds a pristine ``torch`` package, such as site-packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: dict[str, Source] = {}

    def source(self, file: str) -> Source:
        """Source of ``file`` (``"torch/serialization.py"``)."""
        if file not in self._sources:
            path = self.root / file
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as e:
                raise PatchError(f"Expected torch to have {file}: {e}") from e
            self._sources[file] = Source(text, str(path))
        return self._sources[file]

    def version(self) -> str:
        """Version of that torch, without importing it."""
        text = (self.root / "torch/version.py").read_text(encoding="utf-8")
        found: dict[str, str] = {}
        exec(text, found)
        return found["__version__"]


def _import_root() -> Path:
    """The folder from which this process imports torch; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError("Expected torch to be installed, but it cannot be found.")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _tree_record() -> dict[str, object] | None:
    path = _import_root() / TREE_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@cache
def installed() -> Upstream:
    """The torch of this process, pristine."""
    record = _tree_record()
    return Upstream(Path(str(record["origin"])) if record else _import_root())


@cache
def tree_patches() -> tuple[str, ...]:
    """Names of the patches in the tree from which this process imports torch."""
    record = _tree_record()
    patches = record["patches"] if record else []
    assert isinstance(patches, list)
    return tuple(patches)
