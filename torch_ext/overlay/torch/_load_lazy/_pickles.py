"""Finds where pickles in a row end, without reading much more than them.

Law: a pickle that the inert reader knows is taken from its first byte to its STOP; one with
another instruction is ``Unsupported``. From a file object, at most as many bytes are read
as the pickles have, twice, and 64 KiB.
"""

import re
from typing import NoReturn

from torch._load_lazy._inert import Unsupported
from torch._load_lazy._open import OpenFile


_CHUNK = 1 << 16
_LONGEST = 9  # instruction of which the first byte tells the length
_LONGEST_GLOBAL = 1 << 12
_OPERANDS = b"\x80KhqMJrjG"

# The instructions of the inert reader, but for those whose length depends on a later byte.
# (A limited number at a time, since the match remembers each.)
_FIXED = re.compile(
    rb"(?:[()t\x85-\x87\]}aesuN\x88\x89RbQ]|[\x80Khq].|M..|[Jrj].{4}|G.{8}){0,99}",
    re.DOTALL,
)


class Pickles:
    """The pickles of a file from an offset on.

    Args:
        file: the file
        at: offset of the first one
        end: offset before which they end

    Attributes:
        at: offset of the next one
    """

    def __init__(self, file: OpenFile, at: int, end: int) -> None:
        self.at = at
        self._file = file
        self._end = end
        self._window = b""  # from `at` on

    def next(self) -> bytes:
        """Returns the next pickle."""
        end = self._find_stop() + 1
        pickle = self._window[:end]
        self.skip(end)
        return pickle

    def take(self, size: int) -> bytes:
        """Returns the next ``size`` bytes."""
        data = self._see(size)[:size]
        if len(data) < size:
            self._ends_early()
        self.skip(size)
        return data

    def skip(self, size: int) -> None:
        """Leaves out the next ``size`` bytes."""
        self.at += size
        self._window = self._window[size:]

    def _find_stop(self) -> int:
        window, at = self._window, 0
        while True:
            if len(window) < at + _LONGEST:
                window = self._see(at + _LONGEST)
                if len(window) <= at:
                    self._ends_early()
            match = _FIXED.match(window, at)
            at = match.end() if match else at
            if len(window) < at + _LONGEST and len(window) < self._end - self.at:
                continue  # for the rest of an instruction
            op = window[at] if at < len(window) else None
            if op == 0x58:  # BINUNICODE
                at += 5 + int.from_bytes(window[at + 1 : at + 5], "little")
            elif op == 0x2E:  # STOP
                return at
            elif op == 0x63:  # GLOBAL
                window = self._see(at + _LONGEST_GLOBAL)
                at = self._line_end(self._line_end(at + 1))
            elif op == 0x8A:  # LONG1
                at += 2 + int.from_bytes(window[at + 1 : at + 2], "little")
            elif op is None or (len(window) < at + _LONGEST and op in _OPERANDS):
                self._ends_early()
            else:
                raise Unsupported("instruction")

    def _line_end(self, start: int) -> int:
        end = self._window.find(b"\n", start)
        if end < 0:
            raise Unsupported("global")
        return end + 1

    def _see(self, size: int) -> bytes:
        """Returns the bytes from `at` on, ``size`` of them at least, if there are as many."""
        have, left = len(self._window), self._end - self.at
        if have < min(size, left):
            count = min(max(size, 2 * have, _CHUNK), left) - have
            self._window += self._file.read(self.at + have, count)
        return self._window

    def _ends_early(self) -> NoReturn:
        self._file.bad("the end of a pickle", "the end of the file", self._end)
