"""Looks a pickle over before torch's own ``weights_only`` unpickler is let at it.

That unpickler calls nothing that isn't allowed; but what is allowed may make as much
memory as an argument says, run as long, or overrun C's stack, as a hash of a tuple nested
deep does. Law: a pickle that passes makes torch's unpickler do no more than its length and
the file's records account for; what torch.save writes passes.

Not here: what a user has allowed (``torch.serialization.add_safe_globals``), and whether the
pickle makes sense otherwise: torch's unpickler says so.
"""

import io
import struct
from _codecs import encode
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import _utils, _weights_only_unpickler
from torch._load_lazy._inert import Build, INSTRUCTIONS, Reader, Unsupported
from torch.serialization import StorageType


_MAX_DEPTH = 500  # of tuples in tuples
_MAX_NAME = 1000
_SLACK = 1 << 20  # elements that a tensor may have beyond its storage's
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")


_NO_SENSE = (IndexError, KeyError, TypeError, ValueError, struct.error, Unsupported)


class Refused(Exception):
    """The pickle asks for more than it may."""


class _Left(Exception):
    """Here torch's own unpickler refuses the pickle, and reads no further."""


class _Global:
    """What a pickle names."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


class _Tuple(tuple[Any, ...]):
    """A tuple, how deep tuples nest in it, and how many items a hash of it looks at."""

    depth: int
    weight: int


class _Made:
    """What a call would make, or a persistent id stands for."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.depth = _depth(arguments)


def screen(data: bytes, size: int, count: int = 1) -> None:
    """Raises ``Refused`` if torch's unpickler is not to be let at pickles in a row.

    Args:
        data: the pickles, and perhaps what follows
        size: of the file, in bytes: no storage may have more
        count: of the pickles
    """
    try:
        at, keys = 0, set[Any]()
        for _ in range(count):
            pickle = _Screen(data, size, at)
            at, keys = pickle.follow(), keys | pickle.keys
        # NB: of a storage that the last pickle doesn't list, torch.load leaves the memory as
        # it was.
        if count > 1 and not keys.issubset(pickle.result):
            raise Refused("a storage that is not in the list of its storages")
    except _Left:
        pass
    except _NO_SENSE as error:
        raise Refused(
            f"what makes no sense ({type(error).__name__}: {error})"
        ) from error


class _Screen(Reader):
    """Follows a pickle with stand-ins for all that it would make."""

    def __init__(self, data: bytes, size: int, at: int) -> None:
        super().__init__(data, cast(Build, None))  # it makes nothing
        self._at = at
        self.keys: set[Any] = set()  # of the storages that it names
        self._size = size
        self._left = 4 * len(data) + _SLACK  # how much may be hashed and copied

    @property
    def result(self) -> Any:
        """What the pickle holds, once it was followed."""
        return self._stack[-1]

    def follow(self) -> int:
        """Returns where the pickle ends."""
        data = self._data
        while (op := data[self._at]) != 0x2E:  # STOP
            if op not in _INSTRUCTIONS:
                raise _Left
            self._at += 1
            _INSTRUCTIONS[op](self)
        return self._at + 1

    # Instructions that are followed in another way than they are read

    def _binunicode(self) -> None:
        text = self._operand(int.from_bytes(self._operand(4), "little"))
        self._stack.append(text.decode("utf-8", "surrogatepass"))

    def _skip_byte(self) -> None:
        self._operand(1)

    def _short_string(self) -> None:
        self._stack.append(self._operand(self._operand(1)[0]).decode("latin1"))

    def _put(self, size: int) -> None:
        self._memo[int.from_bytes(self._operand(size), "little")] = self._stack[-1]

    def _get(self, size: int) -> None:
        self._stack.append(self._memo[int.from_bytes(self._operand(size), "little")])

    def _tuple(self) -> None:
        self._push_tuple(self._pop_mark())

    def _tuple_of(self, count: int) -> None:
        items = self._stack[-count:]
        del self._stack[-count:]
        if len(items) != count:
            raise Unsupported("stack")
        self._push_tuple(items)

    def _push_tuple(self, items: list[Any]) -> None:
        made = _Tuple(items)
        made.depth = _depth(made)
        made.weight = 1 + sum(getattr(item, "weight", 1) for item in items)
        self._stack.append(made)

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise Unsupported("items")
        self._spend(items[::2])
        target = self._stack[-1]
        if type(target) is dict:  # how many there are is all that is asked later
            target.update(
                dict.fromkeys(range(len(target), len(target) + len(items) // 2))
            )

    def _spend(self, items: Any) -> None:
        """Takes account of the work that hashing or copying takes."""
        self._left -= len(items)
        if type(items) is not str:
            self._left -= sum(x.weight for x in items if type(x) is _Tuple)
        if self._left < 0:
            raise Refused("calls and keys that take more work than its length")

    def _global(self) -> None:
        line = io.BytesIO(self._data[self._at : self._at + 2 * _MAX_NAME])
        module, name = _weights_only_unpickler._read_global_instruction(line.readline)
        self._at += line.tell()
        if max(len(module), len(name)) > _MAX_NAME - 2:
            raise Refused(f"a global of over {_MAX_NAME - 2} characters")
        full = f"{module}.{name}"
        for known in (
            _weights_only_unpickler._get_allowed_globals(),
            _weights_only_unpickler._get_user_allowed_globals(),
        ):
            if full in known:
                self._stack.append(_Global(full, known[full]))
                return
        raise _Left

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _binpersid(self) -> None:
        pid = self._stack.pop()
        if type(pid) is _Tuple and len(pid) >= 5:
            self._check_storage(pid)
        self._stack.append(_Made(None, (pid,)))

    def _setstate(self) -> None:
        del self._stack[-1]
        target = self._stack[-1]
        function = target.function if type(target) is _Made else None
        if type(function) is _Global and _makes_tensors(function.value):
            raise Refused(f"a state for what {function.name} makes")

    # What is asked for

    def _check_storage(self, pid: tuple[Any, ...]) -> None:
        kind, numel = pid[1], pid[4]
        value = kind.value if type(kind) is _Global else None
        itemsize = value.dtype.itemsize if type(value) is StorageType else 1
        if type(numel) is not int or not 0 <= numel * itemsize <= self._size:
            raise Refused(f"a storage of {numel!r:.40} elements of {itemsize} bytes")
        self.keys.add(pid[2])

    def _call(self, function: Any, arguments: Any) -> _Made:
        if type(function) is not _Global or type(arguments) is not _Tuple:
            raise Refused("a call of what is no function, or not with a tuple")
        value = function.value
        known = _CALLS.get(value) if isinstance(value, Hashable) else None
        if value in torch._tensor_classes or value is torch.Tensor:
            known = _never
        if known is not None and not known(*arguments):
            raise Refused(f"a call of {function.name} that torch.save never writes")
        for argument in arguments:
            if type(argument) in (str, list, _Tuple, dict) and known is not None:
                self._spend(argument)
        if value is torch._tensor._rebuild_from_type_v2:
            self._call(arguments[0], arguments[2])
        return _Made(function, arguments)


def _depth(items: tuple[Any, ...]) -> int:
    depth = 1 + max([getattr(item, "depth", 0) for item in items], default=0)
    if depth > _MAX_DEPTH:
        raise Refused(f"tuples nested more than {_MAX_DEPTH} deep")
    return depth


def _makes_tensors(function: Any) -> bool:
    module = getattr(function, "__module__", "")
    return function is torch.nn.Parameter or module in ("torch._utils", "torch._tensor")


# Whether a call is as torch.save writes it, by function.


def _never(*arguments: Any) -> bool:
    return False


def _text(*arguments: Any) -> bool:
    if not arguments:
        return True
    value, encoding = arguments
    return type(value) is str and encoding in _ENCODINGS


def _bytes(*arguments: Any) -> bool:
    (made,) = arguments if len(arguments) == 1 else (None,)
    function = made.function if type(made) is _Made else None
    if type(function) is _Global:  # bytes come as text that is encoded
        return function.value is encode
    return _text(*arguments)


def _items(*arguments: Any) -> bool:
    return all(type(items) in (list, _Tuple) for items in arguments)


def _pairs(*arguments: Any) -> bool:
    return all(
        type(items) in (list, _Tuple)
        and all(type(pair) in (list, _Tuple) and len(pair) == 2 for pair in items)
        for items in arguments
    )


def _counts(*arguments: Any) -> bool:
    return all(type(items) is dict for items in arguments)


def _storage(storage: Any, offset: Any, size: Any, *rest: Any) -> bool:
    """Whether a tensor has few enough elements for its storage, as its arguments do."""
    if type(storage) is not _Made or storage.function or type(size) is not _Tuple:
        return False
    if not {int}.issuperset(map(type, size)):
        return False
    return 0 <= prod(size) <= storage.arguments[0][4] + _SLACK and _tensors(*rest)


def _tensors(*arguments: Any) -> bool:
    """Whether all tensors among the arguments have."""
    parts = [
        part
        for argument in arguments
        for part in (argument if type(argument) is _Tuple else (argument,))
        if type(part) is _Made and type(part.function) is _Global
    ]
    while parts:
        part = parts.pop()
        if part.function.value is _utils._rebuild_parameter:
            parts += [x for x in part.arguments[:1] if type(x) is _Made]
        elif part.function.value in _OF_STORAGES and not _storage(*part.arguments):
            return False
    return True


def _parameter(*arguments: Any) -> bool:
    return bool(arguments) and type(arguments[0]) is _Made


_OF_STORAGES = (_utils._rebuild_tensor_v2, _utils._rebuild_tensor_v3)

_CALLS: dict[Any, Callable[..., bool]] = {
    bytearray: _bytes,
    encode: _text,
    set: _items,
    torch.Size: _items,
    OrderedDict: _pairs,
    Counter: _counts,
    torch.nn.Parameter: _parameter,
    _utils._rebuild_qtensor: _storage,
    _utils._rebuild_sparse_tensor: _tensors,
    _utils._rebuild_device_tensor_from_cpu_tensor: _tensors,
}

_INSTRUCTIONS: dict[int, Callable[[_Screen], None]] = {
    **INSTRUCTIONS,
    0x80: _Screen._skip_byte,  # PROTO
    0x81: _Screen._reduce,  # NEWOBJ
    0x8F: lambda self: self._stack.append(_Made(None, ())),  # EMPTY_SET
    ord("U"): _Screen._short_string,
    ord("X"): _Screen._binunicode,
    ord("q"): partial(_Screen._put, size=1),
    ord("r"): partial(_Screen._put, size=4),
    ord("h"): partial(_Screen._get, size=1),
    ord("j"): partial(_Screen._get, size=4),
    ord("t"): _Screen._tuple,
    ord(")"): lambda self: self._push_tuple([]),
    0x85: partial(_Screen._tuple_of, count=1),
    0x86: partial(_Screen._tuple_of, count=2),
    0x87: partial(_Screen._tuple_of, count=3),
    ord("c"): _Screen._global,
    ord("R"): _Screen._reduce,
    ord("b"): _Screen._setstate,
    ord("Q"): _Screen._binpersid,
}
