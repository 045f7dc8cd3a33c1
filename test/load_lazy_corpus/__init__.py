"""Files that lie: a corpus of bad inputs for ``torch.load(f, lazy=True)``.

``cases()`` yields each of them with what is to come of it: the text of its error, or
``LOADS``. The files are made when they are asked for, byte for byte the same each time.
Each module below makes the bad files of one layer.
"""

from collections.abc import Iterator

from load_lazy_corpus import (
    calls,
    containers,
    directories,
    files,
    legacy,
    opcodes,
    safetensors,
    tensors,
)
from load_lazy_corpus.case import Case, LOADS


__all__ = ["LAYERS", "LOADS", "Case", "cases"]

_MODULES = (
    calls,
    containers,
    directories,
    files,
    legacy,
    opcodes,
    safetensors,
    tensors,
)
LAYERS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def cases() -> Iterator[Case]:
    """Yields the whole corpus."""
    for layer in LAYERS.values():
        yield from layer.cases()
