"""Writes zip files and pickles by hand, so that every field of them can lie.

Without a lie, ``archive`` writes what ``torch.save`` writes, byte for byte but for the
padding's letters. A lie is a field's name and value: ``Record(..., central={"size": 0})``.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


DEFLATED = 8
ENCRYPTED = 0x1

_LOCAL = "<4sHHHHHIIIHH"
_LOCAL_FIELDS = (
    *("magic", "version", "flags", "method", "time", "date"),
    *("crc", "stored", "size", "name_size", "extra_size"),
)
_CENTRAL = "<4sHHHHHHIIIHHHHHII"
_CENTRAL_FIELDS = (
    *("magic", "made", "version", "flags", "method", "time", "date"),
    *("crc", "stored", "size", "name_size", "extra_size", "comment_size"),
    *("disk", "internal", "external", "header"),
)
_END64 = "<4sQHHIIQQQQ"
_END64_FIELDS = (
    *("magic", "rest", "made", "version", "disk", "first"),
    *("here", "count", "size", "offset"),
)
_LOCATOR = "<4sIQI"
_LOCATOR_FIELDS = ("magic", "disk", "offset", "disks")
_END = "<4sHHHHIIH"
_END_FIELDS = (
    *("magic", "disk", "first", "here", "count", "size", "offset", "comment_size"),
)

Lies = Mapping[str, Any]


def _pack(form: str, names: Sequence[str], values: Lies, lies: Lies) -> bytes:
    numbers = []
    for name in names:
        value = values.get(name, 0)
        if name in lies:
            lie = lies[name]
            value = lie(value) if callable(lie) else lie
        if name != "magic":
            code = form.removeprefix("<4s")[len(numbers) - 1]
            value &= (1 << 8 * struct.calcsize(f"<{code}")) - 1
        numbers.append(value)
    return struct.pack(form, *numbers)


@dataclass(frozen=True)
class Record:
    """A record of an archive, and what its two headers say of it instead of the truth."""

    name: str | bytes
    data: bytes
    local: Lies = field(default_factory=dict)
    central: Lies = field(default_factory=dict)
    local_name: bytes | None = None
    central_extra: bytes = b""
    central_comment: bytes = b""
    descriptor: bytes | None = None
    pad: bytes | None = None  # the local header's extra field
    hidden: bool = False  # not in the directory

    @property
    def raw_name(self) -> bytes:
        return self.name if isinstance(self.name, bytes) else self.name.encode()

    def header(self, at: int) -> bytes:
        """Returns the local header for offset ``at``."""
        name = self.raw_name if self.local_name is None else self.local_name
        pad = self.pad
        if pad is None:
            room = -(at + struct.calcsize(_LOCAL) + len(name) + 4) % 64
            pad = struct.pack("<2sH", b"FB", room) + b"Z" * room
        truth = {"magic": b"PK\3\4", "flags": 0x808}
        truth |= {"name_size": len(name), "extra_size": len(pad)}
        return _pack(_LOCAL, _LOCAL_FIELDS, truth, self.local) + name + pad

    def entry(self, at: int) -> bytes:
        """Returns the directory's entry, for a header at ``at``."""
        name, extra, comment = self.raw_name, self.central_extra, self.central_comment
        truth: dict[str, Any] = {"magic": b"PK\1\2", "flags": 0x808, "header": at}
        truth |= {"crc": zlib.crc32(self.data)}
        truth |= {"size": len(self.data), "stored": len(self.data)}
        truth |= {"name_size": len(name), "extra_size": len(extra)}
        truth |= {"comment_size": len(comment)}
        fixed = _pack(_CENTRAL, _CENTRAL_FIELDS, truth, self.central)
        return fixed + name + extra + comment

    def end(self) -> bytes:
        """Returns the descriptor that follows the data."""
        if self.descriptor is not None:
            return self.descriptor
        size = len(self.data)
        return struct.pack("<4s3I", b"PK\7\10", zlib.crc32(self.data), size, size)


def archive(
    records: Sequence[Record],
    *,
    end: Lies | None = None,
    end64: Lies | None = None,
    locator: Lies | None = None,
    zip64: bool = True,
    comment: bytes = b"",
    before_directory: bytes = b"",
) -> bytes:
    """Returns a zip file."""
    data, directory, count = b"", b"", 0
    for record in records:
        entry = record.entry(len(data))
        data += record.header(len(data)) + record.data + record.end()
        if not record.hidden:
            directory, count = directory + entry, count + 1
    data += before_directory
    truth: dict[str, Any] = {"here": count, "count": count}
    truth |= {"size": len(directory), "offset": len(data)}
    data += directory
    if zip64:
        values = truth | {"magic": b"PK\6\6", "rest": 44, "made": 0x31E, "version": 45}
        place = {"magic": b"PK\6\7", "offset": len(data), "disks": 1}
        data += _pack(_END64, _END64_FIELDS, values, end64 or {})
        data += _pack(_LOCATOR, _LOCATOR_FIELDS, place, locator or {})
    truth |= {"magic": b"PK\5\6", "comment_size": len(comment)}
    return data + _pack(_END, _END_FIELDS, truth, end or {}) + comment


def deflated(record: Record, **fields: Any) -> Record:
    """Returns the record compressed; its sizes are right."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    data = packer.compress(record.data) + packer.flush()
    central = {"method": DEFLATED, "size": len(record.data), "stored": len(data)}
    central |= {"crc": zlib.crc32(record.data)} | dict(record.central)
    return Record(
        record.name,
        data,
        local={"method": DEFLATED} | dict(record.local),
        central=central,
        **fields,
    )


# Instructions of a pickle


def integer(n: int) -> bytes:
    """Instructions that push an integer."""
    if 0 <= n < 256:
        return b"K" + bytes([n])
    if -(1 << 31) <= n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    size = n.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + n.to_bytes(size, "little", signed=True)


def text(value: str | bytes) -> bytes:
    """Instructions that push a string."""
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def items(parts: Sequence[bytes]) -> bytes:
    """Instructions that push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def name(dotted: str) -> bytes:
    """Instructions that push a global."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function: str, *arguments: bytes) -> bytes:
    """Instructions that push what a function makes of arguments."""
    return name(function) + items(arguments) + b"R"


ORDERED_DICT = call("collections.OrderedDict")


def push(value: Any) -> bytes:
    """Instructions that push a value; bytes are instructions already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return items([push(v) for v in value])
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    constants = {None: b"N", True: b"\x88", False: b"\x89"}
    return integer(value) if type(value) is int else constants[value]


STORAGE = {"tag": "storage", "kind": name("torch.FloatStorage"), "key": "0"}
STORAGE |= {"location": "cpu", "numel": 16}
PLACE = {"offset": 0, "size": (4, 4), "stride": (4, 1)}
PLACE |= {"requires_grad": False, "hooks": ORDERED_DICT}


def storage(**lies: Any) -> bytes:
    """Instructions that push a storage."""
    return push(tuple((STORAGE | lies).values())) + b"Q"


def tensor(
    source: bytes | None = None,
    *more: Any,
    rebuild: str = "torch._utils._rebuild_tensor_v2",
    **lies: Any,
) -> bytes:
    """Instructions that push a tensor, over ``source`` or a storage."""
    of_storage = {k: v for k, v in lies.items() if k in STORAGE}
    of_place = {k: v for k, v in lies.items() if k not in STORAGE}
    source = storage(**of_storage) if source is None else source
    arguments = (source, *(PLACE | of_place).values(), *more)
    return call(rebuild, *map(push, arguments))


def dictionary(**values: bytes) -> bytes:
    """Instructions that push a dict."""
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def pickle(body: bytes, protocol: int = 2) -> bytes:
    """Returns a whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."
