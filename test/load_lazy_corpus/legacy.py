"""Files in the formats of torch.save before zip files that lie.

Since PyTorch 0.1.10 these are pickles in a row and then the storages, each after its number
of elements; before, a tar file of three members.
"""

import io
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from load_lazy_corpus.build import (
    call,
    dictionary,
    integer,
    name,
    pickle,
    push,
    STORAGE,
    tensor,
    text,
)
from load_lazy_corpus.case import Case, either, LOADS, WEIGHTS_ONLY
from load_lazy_corpus.tensors import LIES


ANY = "^RuntimeError: Expected"
SYSTEM = dictionary(
    protocol_version=integer(1001), little_endian=b"\x88", type_sizes=b"}"
)
FLOATS = struct.pack("<16f", *range(16))
BIG = 1 << 62


def storage(view: Any = None, **lies: Any) -> bytes:
    """Instructions that push a storage of the legacy format."""
    return push((*(STORAGE | lies).values(), view)) + b"Q"


def file_of(
    body: bytes | None = None,
    *,
    magic: bytes = push(MAGIC_NUMBER),
    version: bytes = push(PROTOCOL_VERSION),
    system: bytes = SYSTEM,
    keys: bytes = push(("0",)).replace(b"(", b"](", 1)[:-1] + b"e",
    numel: int = 16,
    data: bytes = FLOATS,
) -> bytes:
    """A legacy file of one storage."""
    body = dictionary(w=tensor(storage())) if body is None else body
    parts = map(pickle, (magic, version, system, body, keys))
    return b"".join(parts) + struct.pack("<q", numel) + data


def keys_of(*keys: Any) -> bytes:
    return b"](" + b"".join(map(push, keys)) + b"e"


BAD = (
    f"{ANY}|{WEIGHTS_ONLY}|Invalid magic number|Invalid protocol|EOFError|RuntimeError"
)

FILES: dict[str, tuple[bytes, str]] = {
    "no_lie": (file_of(), LOADS),
    "magic_other": (file_of(magic=integer(1 << 70)), BAD),
    "magic_text": (file_of(magic=text("x")), BAD),
    "magic_list": (file_of(magic=b"]"), BAD),
    "version_other": (file_of(version=integer(1002)), BAD),
    "version_text": (file_of(version=text("1001")), BAD),
    "version_float": (file_of(version=push(1001.0)), either(BAD)),
    "system_nothing": (file_of(system=b"N"), either(BAD)),
    "system_big_endian": (
        file_of(system=dictionary(little_endian=b"\x89")),
        either(BAD),
    ),
    "system_command": (
        file_of(system=call("os.system", text("touch was_here"))),
        f"{WEIGHTS_ONLY}|{ANY}",
    ),
    "keys_none": (file_of(keys=b"N"), BAD),
    "keys_text": (file_of(keys=text("0")), either(BAD)),
    "keys_empty": (file_of(keys=b"]"), BAD),
    "keys_tuple": (file_of(keys=push(("0",))), either(BAD)),
    "keys_other": (file_of(keys=keys_of("1")), BAD),
    "keys_unlisted_unread": (
        file_of(dictionary(w=tensor(storage(key="1"))) + b"q\7", keys=b"]"),
        BAD,
    ),
    "keys_number": (file_of(keys=keys_of(0)), BAD),
    "keys_twice": (file_of(keys=keys_of("0", "0"), data=FLOATS * 3), BAD),
    "keys_more": (file_of(keys=keys_of("0", "1"), data=FLOATS * 3), BAD),
    "keys_nested": (file_of(keys=keys_of((("0",),))), BAD),
    "keys_command": (
        file_of(keys=call("os.system", text("touch was_here"))),
        f"{WEIGHTS_ONLY}|{ANY}",
    ),
    "numel_zero": (file_of(numel=0), BAD),
    "numel_one_less": (file_of(numel=15), BAD),
    "numel_one_more": (file_of(numel=17), BAD),
    "numel_negative": (file_of(numel=-1), BAD),
    "numel_2_40": (file_of(numel=1 << 40), BAD),
    "numel_2_62": (file_of(numel=BIG), BAD),
    "data_short": (file_of(data=FLOATS[:-1]), BAD),
    "data_none": (file_of(data=b""), BAD),
    "data_long": (file_of(data=FLOATS + b"x"), LOADS),
    "another_after": (file_of() + file_of(), LOADS),
    "not_zipped_system": (file_of() + b"PK\3\4", LOADS),
    "view": (
        file_of(dictionary(w=tensor(storage(view=("1", 0, 16))))),
        either(BAD),
    ),
    "view_beyond": (
        file_of(dictionary(w=tensor(storage(view=("1", 8, 16))))),
        either(BAD),
    ),
    "view_negative": (
        file_of(dictionary(w=tensor(storage(view=("1", -8, 16))))),
        either(BAD),
    ),
    "view_2_62": (
        file_of(dictionary(w=tensor(storage(view=("1", BIG, BIG))))),
        BAD,
    ),
    "two_sizes_of_one": (
        file_of(dictionary(w=tensor(storage()), v=tensor(storage(numel=32)))),
        either(BAD),
    ),
    "two_types_of_one": (
        file_of(
            dictionary(
                w=tensor(storage()), v=tensor(storage(kind=name("torch.IntStorage")))
            )
        ),
        either(BAD),
    ),
    "module": (
        file_of(
            dictionary(
                w=push(("module", name("collections.OrderedDict"), "x", "y")) + b"Q"
            )
        ),
        BAD,
    ),
    "bytearray": (
        file_of(
            dictionary(
                w=tensor(storage()), x=call("__builtin__.bytearray", integer(1 << 40))
            )
        ),
        BAD,
    ),
    "deep_key": (
        file_of(b"})" + b"\x85" * 200_000 + b"Ns"),
        BAD,
    ),
    "command": (
        file_of(
            dictionary(w=tensor(storage()), x=call("os.system", text("touch was_here")))
        ),
        WEIGHTS_ONLY,
    ),
}

# What torch.load would crash on, or answer with all of memory.
_NO_STOCK = ("bytearray", "deep_key", "numel_2_40", "numel_2_62", "view_2_62")
_GREEDY = ("numel_2_31", "numel_2_32", "numel_2_40", "numel_2_62", "numel_wraps_to_16")


def _lies() -> Iterator[Case]:
    for what, (lies, _) in LIES.items():
        of_storage = {k: v for k, v in lies.items() if k in STORAGE}
        of_place = {k: v for k, v in lies.items() if k not in STORAGE}
        body = dictionary(w=tensor(storage(**of_storage), **of_place))
        stock = what not in _GREEDY and not what.startswith("numel_2")
        yield Case(f"legacy_tensor/{what}", file_of(body), either(BAD), stock)


def tar_of(
    storages: bytes = b"",
    tensors: bytes = b"",
    body: bytes = b"",
    names: tuple[str, str, str] = ("storages", "tensors", "pickle"),
    kind: bytes = tarfile.REGTYPE,
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member_name, data in zip(names, (storages, tensors, body), strict=True):
            member = tarfile.TarInfo(member_name)
            member.size, member.type = len(data), kind
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_storages(
    count: int = 1,
    numel: int = 16,
    data: bytes = FLOATS,
    views: bytes = b"]",
    key: Any = 7,
) -> bytes:
    first = pickle(integer(count)) + pickle(
        push((key, "cpu", name("torch.FloatStorage")))
    )
    return first + struct.pack("<q", numel) + data + pickle(views)


def tar_tensors(
    count: int = 1,
    ndim: int = 2,
    numbers: tuple[int, ...] = (4, 4, 4, 1, 0),
    key: Any = 9,
    root: Any = 7,
) -> bytes:
    first = pickle(integer(count)) + pickle(
        push((key, root, name("torch.FloatTensor")))
    )
    return first + struct.pack(f"<2i{len(numbers)}q", ndim, 0, *numbers)


TENSOR = pickle(dictionary(w=integer(9) + b"Q"))
# The others are torch.load's own, for what it alone can judge.
TAR_BAD = "^RuntimeError|^UnpicklingError|^EOFError|^KeyError|^TypeError"


def _tar_of_size(kind: bytes, size: bytes) -> bytes:
    """A tar file of one header, which names a size."""
    header = bytearray(tar_of(b"", kind=kind)[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(2048)


def _tar_sizes() -> Iterator[Case]:
    sizes = {
        "2_33": b"7" * 11 + b"\0",
        "2_62": b"\x80" + BIG.to_bytes(11, "big"),
        "2_87": b"\x80" + b"\xff" * 11,
        "negative": b"\xff" * 11 + b"\1",
    }
    for kind in (b"0", b"x", b"g", b"L", b"K", b"S"):
        for what, size in sizes.items():
            data, name = _tar_of_size(kind, size), f"{kind.decode()}_{what}"
            error = f"{BAD}|beginning|legacy .tar format"
            yield Case(f"tar_size/{name}", data, error, stock=False)
            yield Case(f"tar_size_trusted/{name}", data, error, False, False)


def _tars() -> Iterator[Case]:
    good = (tar_storages(), tar_tensors(), TENSOR)
    files: dict[str, tuple[bytes, str]] = {
        "no_lie": (tar_of(*good), LOADS),
        "no_storages": (tar_of(b"", *good[1:]), TAR_BAD),
        "no_tensors": (tar_of(good[0], b"", good[2]), TAR_BAD),
        "no_pickle": (tar_of(*good[:2], b""), TAR_BAD),
        "other_names": (tar_of(*good, names=("storages", "tensor", "pickle")), TAR_BAD),
        "links": (tar_of(*good, kind=tarfile.SYMTYPE), TAR_BAD),
        "folders": (tar_of(*good, kind=tarfile.DIRTYPE), TAR_BAD),
        "devices": (tar_of(*good, kind=tarfile.CHRTYPE), TAR_BAD),
        "cut": (tar_of(*good)[:1000], TAR_BAD),
        "half": (tar_of(*good)[:2500], either(TAR_BAD)),
        "numel_one_more": (tar_of(tar_storages(numel=17), *good[1:]), TAR_BAD),
        "numel_one_less": (tar_of(tar_storages(numel=15), *good[1:]), TAR_BAD),
        "numel_negative": (tar_of(tar_storages(numel=-1), *good[1:]), TAR_BAD),
        "numel_2_40": (tar_of(tar_storages(numel=1 << 40), *good[1:]), TAR_BAD),
        "numel_2_62": (tar_of(tar_storages(numel=BIG), *good[1:]), TAR_BAD),
        "count_none": (tar_of(tar_storages(count=0), *good[1:]), either(TAR_BAD)),
        "count_more": (tar_of(tar_storages(count=2), *good[1:]), TAR_BAD),
        "count_2_62": (tar_of(tar_storages(count=BIG), *good[1:]), TAR_BAD),
        "count_negative": (tar_of(tar_storages(count=-1), *good[1:]), TAR_BAD),
        "key_text": (tar_of(tar_storages(key="x"), *good[1:]), TAR_BAD),
        "ndim_negative": (tar_of(good[0], tar_tensors(ndim=-1), good[2]), TAR_BAD),
        "ndim_2_31": (
            tar_of(good[0], tar_tensors(ndim=(1 << 31) - 1), good[2]),
            TAR_BAD,
        ),
        "ndim_65": (tar_of(good[0], tar_tensors(ndim=65), good[2]), TAR_BAD),
        "size_more": (
            tar_of(good[0], tar_tensors(numbers=(5, 4, 4, 1, 0)), good[2]),
            TAR_BAD,
        ),
        "size_2_62": (
            tar_of(good[0], tar_tensors(numbers=(BIG, 4, 4, 1, 0)), good[2]),
            TAR_BAD,
        ),
        "stride_negative": (
            tar_of(good[0], tar_tensors(numbers=(4, 4, -4, 1, 0)), good[2]),
            TAR_BAD,
        ),
        "offset_one": (
            tar_of(good[0], tar_tensors(numbers=(4, 4, 4, 1, 1)), good[2]),
            TAR_BAD,
        ),
        "offset_negative": (
            tar_of(good[0], tar_tensors(numbers=(4, 4, 4, 1, -1)), good[2]),
            TAR_BAD,
        ),
        "root_missing": (tar_of(good[0], tar_tensors(root=8), good[2]), TAR_BAD),
        "root_list": (tar_of(good[0], tar_tensors(root=b"]"), good[2]), TAR_BAD),
        "tensor_missing": (tar_of(*good[:2], pickle(integer(8) + b"Q")), TAR_BAD),
        "tensor_text": (tar_of(*good[:2], pickle(text("9") + b"Q")), either(TAR_BAD)),
        "view": (
            tar_of(tar_storages(views=keys_of((8, 7, 8, 8))), tar_tensors(), TENSOR),
            either(TAR_BAD),
        ),
        "view_beyond": (
            tar_of(
                tar_storages(views=keys_of((8, 7, 8, 16))), tar_tensors(root=8), TENSOR
            ),
            TAR_BAD,
        ),
        "view_negative": (
            tar_of(
                tar_storages(views=keys_of((8, 7, -8, 16))), tar_tensors(root=8), TENSOR
            ),
            TAR_BAD,
        ),
        "view_2_62": (
            tar_of(
                tar_storages(views=keys_of((8, 7, BIG, BIG))),
                tar_tensors(root=8),
                TENSOR,
            ),
            TAR_BAD,
        ),
        "views_number": (tar_of(tar_storages(views=integer(5)), *good[1:]), TAR_BAD),
        "view_short": (tar_of(tar_storages(views=keys_of((8, 7))), *good[1:]), TAR_BAD),
        "view_of_nothing": (
            tar_of(
                tar_storages(views=keys_of((8, 6, 0, 16))), tar_tensors(root=8), TENSOR
            ),
            TAR_BAD,
        ),
    }
    # NB: torch.load unpacks a tar file into a folder: where the file says, in old Pythons.
    for what, (data, error) in files.items():
        stock = what in ("no_lie", "numel_one_less", "size_more", "view")
        yield Case(f"tar/{what}", data, "legacy .tar format|" + BAD)
        yield Case(f"tar_trusted/{what}", data, error, stock, weights_only=False)


def cases() -> Iterator[Case]:
    """Yields files of the legacy formats."""
    for what, (data, error) in FILES.items():
        yield Case(f"legacy/{what}", data, error, what not in _NO_STOCK)
    whole = file_of()
    for size in range(0, len(whole), 17):
        yield Case(f"legacy/cut_to_{size}", whole[:size], f"{BAD}|beginning of a file")
    for at in range(0, len(whole), 40):
        yield Case(
            f"legacy/hole_at_{at}", whole[:at] + whole[at + 3 :], f"{BAD}|beginning"
        )
    yield from _lies()
    yield from _tars()
    yield from _tar_sizes()
