"""Apply patches to a copy of torch on disk: a folder of symlinks to the installed torch in which only the patched and
the new files are real.

With the folder first on PYTHONPATH, a process and all its children import the patched torch with nothing to enable,
spawned DataLoader workers and ``torchrun`` included. The text is the one that graft compiles.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch_ext._drift import seams_of
from torch_ext._graft import by_file
from torch_ext._overlay import new_files
from torch_ext._series import Patch
from torch_ext._splice import splice
from torch_ext._upstream import TREE_RECORD, Upstream


def patched_files(patches: Iterable[Patch], upstream: Upstream) -> dict[str, str]:
    """Text of every file that ``patches`` change or add, by upstream path."""
    patches = list(patches)
    seams = by_file(seam for patch in patches for seam in seams_of(patch))
    files = {
        file: splice(upstream.source(file), group) for file, group in seams.items()
    }
    for patch in patches:
        for file, path in new_files(patch).items():
            files[file] = path.read_text(encoding="utf-8")
    return files


def make_tree(root: Path, patches: Sequence[Patch], upstream: Upstream) -> None:
    """Make the tree in the empty or missing folder ``root``."""
    files = patched_files(patches, upstream)
    (root / "torch").mkdir(parents=True)
    _link(upstream.root / "torch", root / "torch", "torch", set(files))
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    record = {
        "origin": str(upstream.root),
        "patches": [patch.name for patch in patches],
    }
    (root / TREE_RECORD).write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )


def cached_tree(patches: Sequence[Patch], upstream: Upstream) -> Path:
    """A tree in the user's cache, made anew only when torch or a patch has changed."""
    content = json.dumps(
        [str(upstream.root), upstream.version(), patched_files(patches, upstream)]
    )
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_ext"
    )
    tree = cache / f"tree-{key}"
    if not tree.exists():
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
        make_tree(new, patches, upstream)
        try:
            new.rename(tree)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return tree


def _link(source: Path, target: Path, prefix: str, real: set[str]) -> None:
    """Link what lies in ``source`` into ``target``; a folder that holds a ``real`` file is a folder of links again."""
    opened = {
        file[len(prefix) + 1 :].split("/")[0]
        for file in real
        if file.startswith(prefix + "/")
    }
    for entry in os.scandir(source):
        path = f"{prefix}/{entry.name}"
        # NB: the bytecode cache of a folder with a patched file would shadow that file.
        if path in real or entry.name == "__pycache__":
            continue
        if entry.name in opened and entry.is_dir():
            (target / entry.name).mkdir()
            _link(source / entry.name, target / entry.name, path, real)
        else:
            (target / entry.name).symlink_to(entry.path)
