"""What a case of the corpus is, and the good file that the bad ones are made from."""

import collections
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from load_lazy_corpus.build import archive, Record


LOADS = ""  # as an expected error: the case loads, and equals what torch.load loads

# Texts of errors that many cases end in.
WEIGHTS_ONLY = "^UnpicklingError: Weights only load failed"
UNREADABLE = "^RuntimeError: .* a pickle of a state dict in record 'data.pkl'"


class Case(NamedTuple):
    """One bad file.

    Attributes:
        name: by which a failure is found again
        content: the file's bytes, or a function that makes the file at a path and returns what
            is given to torch.load
        error: a pattern that the error's type and text match, or ``LOADS``; see ``either``
        stock: whether torch.load itself may be tried: False if it crashes, hangs or eats memory
        weights_only: as for torch.load
        original: the good file that damage has made this one of: even if torch.load refuses it,
            its data may be loaded
    """

    name: str
    content: bytes | Callable[[Path], object]
    error: str
    stock: bool = True
    weights_only: bool = True
    original: bytes | None = None

    def accepts(self, outcome: str, loaded: bool) -> bool:
        """Whether this may come of it: it was loaded, or ``outcome`` is its error's text."""
        if loaded:
            return self.error == LOADS or self.error.startswith("|")
        error = self.error.removeprefix("|")
        return self.error != LOADS and bool(re.search(error, outcome, re.DOTALL))

    def write(self, folder: Path) -> object:
        """Makes the file below ``folder``, and returns what is given to torch.load."""
        path = folder / "bad.pt"
        if callable(self.content):
            return self.content(path)
        path.write_bytes(self.content)
        return str(path)


def either(error: str) -> str:
    """The expectation that a case loads, or else ends in an error."""
    return f"|{error}"


def state() -> dict[str, object]:
    """The state dict in good.pt."""
    base = torch.arange(16.0).view(4, 4)
    values: dict[str, object] = collections.OrderedDict(a=base, n=torch.arange(8))
    values |= {"t": base.t(), "step": 7, "names": ["x", 1.5, None]}
    return values


def saved(value: object, **kwargs: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)  # type: ignore[arg-type]
    return buffer.getvalue()


def records(pickle: bytes | None = None, floats: int = 16) -> dict[str, Record]:
    """The records of a file in which data/0 has 16 floats, and data/1 8 integers."""
    values = torch.arange(float(floats)).numpy().tobytes()
    contents = {
        "data.pkl": b"\x80\x02}." if pickle is None else pickle,
        ".format_version": b"1",
        ".storage_alignment": b"64",
        "byteorder": b"little",
        "data/0": values,
        "data/1": torch.arange(8).numpy().tobytes(),
        "version": b"3\n",
        ".data/serialization_id": b"0" * 40,
    }
    return {k: Record(f"archive/{k}", v) for k, v in contents.items()}


def zipped(pickle: bytes) -> bytes:
    """A good zip file around a pickle."""
    return archive(list(records(pickle).values()))
