"""What the bytes of a deferred tensor are: those of a record, or a conversion of such.

Law: a read gives what stock loading, followed by the conversion, would put there; it depends
on the file alone, never on what was written to memory since. So a conversion is
a snapshot, whenever it is read.

Limits: which of the NaNs a conversion to a smaller float makes is up to the kernel, as ever.
"""

import ctypes
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch._load_lazy._ranges import ranges_of
from torch._load_lazy._source import Source
from torch._load_lazy._zip import Extent


_AT_ONCE = 2 << 20  # bytes in a buffer between file and tensor; fits into a cache


class Layout(NamedTuple):
    """How a tensor lies in its storage, in elements."""

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


class Bytes(Protocol):
    """The contents of one storage.

    Attributes:
        name: what errors call them
        nbytes: how many bytes there are
        unit: reads start and end at multiples of this
    """

    @property
    def name(self) -> str: ...

    nbytes: int
    unit: int

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous bytes on any device, with those from ``start`` on."""


class FileBytes:
    """An extent of a file.

    Args:
        source: the file
        extent: where the bytes lie in it
        swap: size of the elements whose bytes are in the other order; 1 for none

    Attributes:
        source: the file
        start: where the bytes begin in it
    """

    def __init__(self, source: Source, extent: Extent, swap: int) -> None:
        self.source = source
        self.start, self.nbytes = extent
        self.unit = swap

    @property
    def name(self) -> str:
        """See ``Bytes``."""
        return f"{self.source.name} at offset {self.start}"

    def read(self, start: int, out: torch.Tensor) -> None:
        """See ``Bytes``."""
        if out.device.type == "cpu":
            self.source.read_into(self.start + start, memory_of(out))
            if self.unit > 1:
                for part in out.split(_AT_ONCE // self.unit * self.unit):
                    part.copy_(part.view(-1, self.unit).flip(1).view(-1))
            return
        buffer = _buffer(min(out.numel(), _AT_ONCE // self.unit * self.unit))
        for part in out.split(buffer.numel()):
            host = buffer[: part.numel()]
            self.read(start, host)
            part.copy_(host)
            start += part.numel()


class ConvertedBytes:
    """A tensor over other bytes, in another dtype or with other strides.

    Args:
        base: the other bytes
        layout: of the tensor in these
        dtype: to which it is converted
        stride: of the result, in elements; the result has no gaps
    """

    def __init__(
        self, base: Bytes, layout: Layout, dtype: torch.dtype, stride: tuple[int, ...]
    ) -> None:
        self.name = base.name
        self._base = base
        self._layout = layout
        self._dtype = dtype
        self._stride = stride
        self.nbytes = prod(layout.size) * dtype.itemsize
        self._ranges = ranges_of(*layout[1:], layout.dtype.itemsize)
        # Whether element by element comes from the same place, counted from the first one.
        needed = sum(end - start for start, end in self._ranges)
        self._linear = stride == layout.stride and layout.nbytes == needed
        self.unit = dtype.itemsize if self._linear else max(self.nbytes, 1)

    def read(self, start: int, out: torch.Tensor) -> None:
        """See ``Bytes``."""
        if not self._linear:
            self._read_all(out)
        elif not out.numel():
            return
        elif self._dtype is self._layout.dtype:
            _read(self._base, self._ranges[0][0] + start, out)
        else:
            self._convert(start // self.unit, out.view(self._dtype))

    def _convert(self, first: int, out: torch.Tensor) -> None:
        dtype = self._layout.dtype
        at = self._ranges[0][0] + first * dtype.itemsize
        values = _buffer(min(out.numel() * dtype.itemsize, _AT_ONCE)).view(dtype)
        for part in out.split(values.numel()):
            some = values[: part.numel()]
            _read(self._base, at, some.view(torch.uint8))
            part.copy_(some)
            at += some.nbytes

    def _read_all(self, out: torch.Tensor) -> None:
        if not self._ranges:
            return
        dtype, offset, size, stride = self._layout
        # Where the tensor begins, up to what it needs last; what it does not need is not
        # touched, and so costs nothing.
        first, end = offset * dtype.itemsize, self._ranges[-1][1]
        buffer = _buffer(end - first)
        for start, stop in self._ranges:
            _read(self._base, start, buffer[start - first : stop - first])
        values = buffer.view(dtype).as_strided(size, stride)
        out.view(self._dtype).as_strided(size, self._stride).copy_(values)


def _read(base: Bytes, start: int, out: torch.Tensor) -> None:
    """Reads from and to any byte."""
    end = start + out.numel()
    first, last = start // base.unit * base.unit, -(-end // base.unit) * base.unit
    if (first, last) == (start, end):
        base.read(start, out)
        return
    last = min(last, base.nbytes)
    buffer = _buffer(last - first)
    base.read(first, buffer)
    out.copy_(buffer[start - first : end - first])


def _buffer(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, which must outlive them."""
    pointer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(pointer).cast("B")
