"""Reads the pickle of a state dict, without ever doing what the pickle says.

``Reader`` knows the instructions that torch.save writes, and no others. It makes lists,
dicts, tuples, strings and numbers; a global is looked up in a table given by the caller,
and "call" means a function in another such table. Law: what it returns is what torch's own
unpickler returns for the same bytes; for what it does not know it raises
``Unsupported``, and the caller hands the file to torch's own unpickler.

Not here: what the calls make (``_globals.py``, ``_build.py``), and other protocols than 2.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

from torch import Size
from torch._load_lazy._rows import Kind, match_rows


# Note [Why a reader of its own]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# The pickle of a state dict is nine tenths tensors, and each of them is the same 30
# instructions with other numbers. A regular expression takes a run of them at once (Note
# [Rows]), which makes this reader faster than C's pickle.Unpickler with a find_class that
# hands out stand-ins, and it is easier to trust. The reviews, by instruction:
#
# - GLOBAL looks up a table of a few names; nothing is imported, no attribute is taken.
# - REDUCE calls what a table names for that very object, and each callee checks all its
#   arguments. NEWOBJ, OBJ, INST, EXT*, STACK_GLOBAL are not known here.
# - BUILD adds to the __dict__ of an OrderedDict made here, by string keys: it is how
#   torch.save writes a state dict's _metadata. No __setstate__ is called.
# - APPEND(S) and SETITEM(S) take an exact list, dict or OrderedDict, all made here. A key
#   is hashed only if it is a string, a number, None, or a short tuple of these: hashing a
#   tuple nested a million deep would overrun C's stack, as it does in pickle.
# - PUT takes the next free index and no other. C's Unpickler allocates as far as the index
#   says: 16 GiB for five bytes. GET takes an index that was put.
# - Lengths (BINUNICODE, LONG1) are checked against the bytes at hand before their use.
# - Nesting costs no recursion here or later, since nobody walks the result; a container
#   may hold itself.
# - Memory is linear in the pickle's length: an instruction makes at most one object, and
#   what calls copy (bytes of a string, a set of a list) is counted.


class Unsupported(Exception):
    """The pickle holds something that only torch's own unpickler may judge."""


class Row(NamedTuple):
    """What a call of _rebuild_tensor_v2 is given, but for the storage's key."""

    rebuild: Any
    tag: Any
    storage_type: Any
    location: Any
    numel: int
    rest: list[Any]  # of the persistent id
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: Any


class Build(Protocol):
    """Makes the objects that a pickle asks for, or raises ``Unsupported``."""

    @property
    def globals(self) -> Mapping[bytes, Any]: ...
    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any: ...
    def persistent(self, pid: Any) -> Any: ...
    def layout(self, row: Row) -> Any: ...
    def tensors(self, layouts: Sequence[Any], keys: list[str]) -> list[Any]: ...


_KEY_TYPES = frozenset({str, int, float, bool, bytes, type(None)})
_MAX_PARTS = 16  # of a tuple that is a key


class Reader:
    """Reads one pickle of protocol 2.

    Args:
        data: the pickle
        build: what makes its objects
    """

    def __init__(self, data: bytes, build: Build) -> None:
        self._data = data
        self._at = 0
        self._build = build
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._next = 0  # index of the next PUT
        self._copied = 0  # items and bytes that calls have copied
        self._kinds: dict[Kind, tuple[int, Any]] = {}
        # What rows put into the memo, yielded when it is asked for.
        self._late: list[Iterable[tuple[int, Any]]] = []

    def read(self) -> Any:
        """Returns the object that the pickle holds.

        Raises:
            Unsupported: if the pickle is for torch's own unpickler to judge
        """
        data, instructions = self._data, INSTRUCTIONS
        if not data.startswith(b"\x80\x02"):
            raise Unsupported("protocol")
        self._at = 2
        try:
            while (op := data[self._at]) != 0x2E:  # STOP
                self._at += 1
                instructions[op](self)
            (result,) = self._stack
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise Unsupported(str(error)) from error
        if self._marks:
            raise Unsupported("mark")
        return result

    def _operand(self, size: int) -> bytes:
        start = self._at
        self._at = end = start + size
        if end > len(self._data):
            raise Unsupported("truncated")
        return self._data[start:end]

    # Numbers and strings

    def _integer(self, size: int, signed: bool = False) -> None:
        value = int.from_bytes(self._operand(size), "little", signed=signed)
        self._stack.append(value)

    def _long1(self) -> None:
        self._integer(self._operand(1)[0], signed=True)

    def _binfloat(self) -> None:
        self._stack.append(struct.unpack(">d", self._operand(8))[0])

    def _binunicode(self) -> None:
        if not self._rows():
            text = self._operand(int.from_bytes(self._operand(4), "little"))
            self._stack.append(text.decode("utf-8", "surrogatepass"))

    # The memo

    def _put(self, size: int) -> None:
        if int.from_bytes(self._operand(size), "little") != self._next:
            raise Unsupported("memo")
        self._memo[self._next] = self._stack[-1]
        self._next += 1

    def _get(self, size: int) -> None:
        in_row = self._data.startswith(b"((", self._at + size)
        if not (in_row and self._rows()):
            self._stack.append(self._recall(self._operand(size)))

    def _recall(self, index: bytes) -> Any:
        place = int.from_bytes(index, "little")
        while place not in self._memo and self._late:
            self._memo.update(self._late.pop())
        return self._memo[place]

    # Containers

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _tuple_of(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) != count:
            raise Unsupported("stack")
        self._stack[-count:] = [tuple(items)]

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Unsupported("append")
        target.extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        target, keys, values = self._stack[-1], items[::2], items[1::2]
        if type(target) not in (dict, OrderedDict):
            raise Unsupported("setitem")
        check_keys(keys)
        target.update(zip(keys, values, strict=True))

    # Objects

    def _global(self) -> None:
        end = self._data.index(b"\n", self._data.index(b"\n", self._at) + 1)
        self._stack.append(self._build.globals[self._operand(end - self._at)])
        self._at += 1

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        if type(arguments) is not tuple:
            raise Unsupported("call")
        self._stack[-1] = made = self._build.call(self._stack[-1], arguments)
        if type(made) in (bytes, bytearray, set, Size):
            self._copied += len(made)
            # NB: torch.save writes what it copies from once for each copy.
            if self._copied > len(self._data):
                raise Unsupported("copies")

    def _setstate(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is not OrderedDict or type(state) is not dict:
            raise Unsupported("build")
        if not {str}.issuperset(map(type, state)):
            raise Unsupported("build")
        target.__dict__.update(state)

    def _binpersid(self) -> None:
        self._stack[-1] = self._build.persistent(self._stack[-1])

    # Rows

    def _rows(self) -> bool:
        """Reads the tensors from the present instruction on, if it starts some."""
        rows = match_rows(self._data, self._at - 1)
        if rows is None:
            return False
        known = list(map(self._kinds.get, rows.kinds))
        if None in known:
            for kind in set(rows.kinds).difference(self._kinds):
                self._kinds[kind] = self._read_kind(kind)
            known = list(map(self._kinds.get, rows.kinds))
        unnamed, layouts = zip(*known, strict=True)
        puts = [n + (name != "") for n, name in zip(unnamed, rows.names, strict=True)]
        if rows.indices != list(accumulate(puts, initial=self._next - 1))[1:]:
            raise Unsupported("memo")
        tensors = self._build.tensors(layouts, rows.keys)
        pairs = zip(rows.names, tensors, strict=True)
        if all(rows.names):
            self._stack.extend(chain.from_iterable(pairs))
        else:
            self._stack.extend(
                x for name, t in pairs for x in ([name, t] if name else [t])
            )
        self._late.append(_row_memo(self._next, puts, rows.names, rows.keys, tensors))
        self._next = rows.indices[-1] + 1
        self._at = rows.end
        return True

    def _read_kind(self, kind: Kind) -> tuple[int, Any]:
        """Returns how many PUTs a row of this kind has, but for the name's; its layout."""
        prefix, storage, place, stride, flags = map(self._operands, kind)
        location, numel, *rest = storage
        offset, *size = place
        where = location, numel, rest, offset, tuple(size), tuple(stride)
        row = Row._make([*prefix, *where, *flags])
        # NB: a PUT follows each tuple but the empty one.
        return 5 + bool(size) + bool(stride), self._build.layout(row)

    def _operands(self, text: bytes) -> list[Any]:
        """Returns what the instructions of a part of a row leave on the stack."""
        values: list[Any] = []
        at = 0
        while at < len(text):
            op, size = text[at], _OPERAND_SIZES.get(text[at], 0)
            operand = text[at + 1 : at + 1 + size]
            if op in b"hj":
                values.append(self._recall(operand))
            elif size:
                values.append(int.from_bytes(operand, "little", signed=op == ord("J")))
            elif op in b"\x88\x89":
                values.append(op == 0x88)
            elif op == ord("N"):
                values.append(None)
            at += 1 + size
        return values


def _row_memo(
    start: int,
    puts: list[int],
    names: list[str],
    keys: list[str],
    tensors: list[Any],
) -> Iterator[tuple[int, Any]]:
    """Yields what rows put into the memo, where the first one puts at ``start``."""
    for count, name, key, tensor in zip(puts, names, keys, tensors, strict=True):
        if name:
            yield start, name
        yield start + (name != ""), key
        start += count
        yield start - 1, tensor


def check_keys(keys: Iterable[Any]) -> None:
    """Raises unless all keys are plain, and safe to be hashed."""
    if _KEY_TYPES.issuperset(map(type, keys)):
        return
    for key in keys:
        parts = key if type(key) is tuple else (key,)
        # NB: the same long tuple may be a key, and be hashed, very often.
        if len(parts) > _MAX_PARTS or not _KEY_TYPES.issuperset(map(type, parts)):
            raise Unsupported("key")


_OPERAND_SIZES = {ord("h"): 1, ord("j"): 4, ord("K"): 1, ord("M"): 2, ord("J"): 4}

INSTRUCTIONS: dict[int, Callable[[Reader], None]] = {
    ord("("): Reader._mark,
    ord("t"): Reader._tuple,
    ord(")"): lambda self: self._stack.append(()),
    0x85: partial(Reader._tuple_of, count=1),
    0x86: partial(Reader._tuple_of, count=2),
    0x87: partial(Reader._tuple_of, count=3),
    ord("]"): lambda self: self._stack.append([]),
    ord("}"): lambda self: self._stack.append({}),
    ord("a"): Reader._append,
    ord("e"): Reader._appends,
    ord("s"): Reader._setitem,
    ord("u"): Reader._setitems,
    ord("N"): lambda self: self._stack.append(None),
    0x88: lambda self: self._stack.append(True),
    0x89: lambda self: self._stack.append(False),
    ord("K"): partial(Reader._integer, size=1),
    ord("M"): partial(Reader._integer, size=2),
    ord("J"): partial(Reader._integer, size=4, signed=True),
    0x8A: Reader._long1,
    ord("G"): Reader._binfloat,
    ord("X"): Reader._binunicode,
    ord("q"): partial(Reader._put, size=1),
    ord("r"): partial(Reader._put, size=4),
    ord("h"): partial(Reader._get, size=1),
    ord("j"): partial(Reader._get, size=4),
    ord("c"): Reader._global,
    ord("R"): Reader._reduce,
    ord("b"): Reader._setstate,
    ord("Q"): Reader._binpersid,
}
