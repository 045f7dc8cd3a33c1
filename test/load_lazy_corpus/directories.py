"""Zip files whose directory lies, and files whose records are not those of a checkpoint.

What a single record's headers say is in ``containers.py``.
"""

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from load_lazy_corpus.build import archive, deflated, dictionary, pickle, Record, tensor
from load_lazy_corpus.case import Case, either, LOADS, records
from load_lazy_corpus.containers import (
    ANY,
    BIG,
    CUT,
    DIRECTORY,
    HEADER,
    NAMELESS,
    OTHER_SIZE,
    PACKED,
    TWICE,
    U32,
)


U16 = 0xFFFF
GOOD = records(pickle(dictionary(w=tensor())))


def changed(**fields: Any) -> bytes:
    """A good file whose end lies."""
    return archive(list(GOOD.values()), **fields)


def with_records(
    extra: tuple[Record, ...] = (), without: tuple[str, ...] = (), **data: Any
) -> bytes:
    """A good file with other records; ``data`` are by name, "." as "_"."""
    kept = dict(GOOD)
    for key in without:
        del kept[key]
    return archive([*kept.values(), *extra], **data)


# What the end of the directory says; the same of zip64's.
END: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"PK\5\7"}, CUT),
    "second_disk": ({"disk": 1}, either(DIRECTORY)),
    "first_on_another_disk": ({"first": 1}, either(DIRECTORY)),
    "fewer_here": ({"here": 3}, either(DIRECTORY)),
    "one_fewer": ({"count": 7, "here": 7}, either(ANY)),
    "one_more": ({"count": 9, "here": 9}, either(DIRECTORY)),
    "none": ({"count": 0, "here": 0}, either(DIRECTORY)),
    "many": ({"count": U16, "here": U16}, either(DIRECTORY)),
    "size_zero": ({"size": 0}, either(DIRECTORY)),
    "size_one_less": ({"size": lambda n: n - 1}, either(DIRECTORY)),
    "size_one_more": ({"size": lambda n: n + 1}, either(DIRECTORY)),
    "size_wide": ({"size": U32}, either(DIRECTORY)),
    "offset_zero": ({"offset": 0}, either(DIRECTORY)),
    "offset_one_less": ({"offset": lambda n: n - 1}, either(DIRECTORY)),
    "offset_one_more": ({"offset": lambda n: n + 1}, either(DIRECTORY)),
    "offset_beyond": ({"offset": 1 << 30}, either(DIRECTORY)),
    "offset_wide": ({"offset": U32}, either(DIRECTORY)),
}
END64: dict[str, tuple[dict[str, Any], str]] = {
    "rest_zero": ({"rest": 0}, either(DIRECTORY)),
    "rest_huge": ({"rest": BIG}, either(DIRECTORY)),
    "count_2_62": ({"count": BIG, "here": BIG}, DIRECTORY),
    "count_2_32": ({"count": 1 << 32, "here": 1 << 32}, DIRECTORY),
    "size_2_62": ({"size": BIG}, DIRECTORY),
    "size_2_64": ({"size": (1 << 64) - 1}, DIRECTORY),
    "offset_2_62": ({"offset": BIG}, DIRECTORY),
    "offset_2_64": ({"offset": (1 << 64) - 1}, DIRECTORY),
    "wraps": ({"offset": (1 << 64) - 64, "size": 128}, DIRECTORY),
}
LOCATOR: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"PK\6\10"}, either(DIRECTORY)),
    "disk": ({"disk": 1}, either(DIRECTORY)),
    "offset_zero": ({"offset": 0}, DIRECTORY),
    "offset_one_more": ({"offset": lambda n: n + 1}, DIRECTORY),
    "offset_beyond": ({"offset": 1 << 40}, DIRECTORY),
    "offset_2_64": ({"offset": (1 << 64) - 1}, DIRECTORY),
    "disks": ({"disks": 7}, either(DIRECTORY)),
}


def _ends() -> Iterator[Case]:
    for what, (lies, error) in END.items():
        yield Case(f"end/{what}", changed(end=lies, zip64=False), error)
        if what != "magic":
            yield Case(f"end_beside_64/{what}", changed(end=lies), error)
    for what, (lies, error) in {**END, **END64}.items():
        error = either(DIRECTORY) if what == "magic" else error
        yield Case(f"end64/{what}", changed(end64=lies), error)
    for what, (lies, error) in LOCATOR.items():
        yield Case(f"locator/{what}", changed(locator=lies), error)
    for size in (1, 60_000):
        yield Case(f"comment/of_{size}", changed(comment=b"c" * size), LOADS)
    fake = changed(zip64=False)[-22:]
    yield Case("comment/is_an_end", changed(comment=fake), either(ANY))
    yield Case("comment/holds_an_end", changed(comment=b"x" + fake + b"x"), either(ANY))
    yield Case(
        "comment/longer_than_said",
        changed(comment=b"cc", end={"comment_size": 1}),
        LOADS,
    )
    yield Case(
        "comment/shorter_than_said", changed(end={"comment_size": 9}), either(CUT)
    )
    for size in (1, 64, 100_000):
        data = changed(before_directory=b"\0" * size)
        yield Case(f"gap/before_directory_{size}", data, either(ANY))


# The wide sizes of zip64, of a storage.
WIDE = {"size": U32, "stored": U32}
EXTRAS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "right": (struct.pack("<2H2Q", 1, 16, 64, 64), WIDE, LOADS),
    "not_needed": (struct.pack("<2H2Q", 1, 16, 9, 9), {}, LOADS),
    "too_short": (struct.pack("<2HQ", 1, 8, 64), WIDE, "64-bit sizes"),
    "empty": (struct.pack("<2H", 1, 0), WIDE, "64-bit sizes"),
    "none": (b"", WIDE, ANY),
    "other_tag": (struct.pack("<2H2Q", 2, 16, 64, 64), WIDE, "64-bit sizes"),
    "longer_than_field": (struct.pack("<2H2Q", 1, 99, 64, 64), WIDE, either(ANY)),
    "cut": (struct.pack("<2H2Q", 1, 16, 64, 64)[:-1], WIDE, "64-bit sizes"),
    "twice": (struct.pack("<2H2Q", 1, 16, 64, 64) * 2, WIDE, either(ANY)),
    "size_2_62": (struct.pack("<2H2Q", 1, 16, BIG, BIG), WIDE, ANY),
    "size_2_64": (struct.pack("<2H2Q", 1, 16, (1 << 64) - 1, (1 << 64) - 1), WIDE, ANY),
    "sizes_differ": (struct.pack("<2H2Q", 1, 16, 64, 60), WIDE, ANY),
    "header_2_62": (struct.pack("<2HQ", 1, 8, BIG), {"header": U32}, ANY),
    "header_2_64": (struct.pack("<2HQ", 1, 8, (1 << 64) - 64), {"header": U32}, ANY),
    "header_narrow": (struct.pack("<2HI", 1, 4, 64), {"header": U32}, "64-bit sizes"),
    "unknown": (struct.pack("<2H4s", 0x9999, 4, b"abcd"), {}, LOADS),
    "unknown_and_cut": (struct.pack("<2H4s", 0x9999, 400, b"abcd"), {}, either(ANY)),
    "odd_bytes": (b"abc", {}, either(ANY)),
}


def _wide() -> Iterator[Case]:
    for what, (extra, lies, error) in EXTRAS.items():
        record = replace(GOOD["data/0"], central=lies, central_extra=extra)
        data = archive(list((GOOD | {"data/0": record}).values()))
        yield Case(f"zip64/{what}", data, error)


# What records say that torch reads before the pickle.
CONTENTS: dict[tuple[str, bytes], str] = {
    ("byteorder", b"big"): LOADS,
    ("byteorder", b""): "Unknown endianness type",
    ("byteorder", b"litle"): "Unknown endianness type",
    ("byteorder", b"LITTLE"): "Unknown endianness type",
    ("byteorder", b"little\n"): "Unknown endianness type",
    ("byteorder", b"\xff\xfe"): "Unknown endianness type|UnicodeDecodeError",
    ("byteorder", b"little" * 100_000): "Unknown endianness type",
    ("version", b""): "from 1 to 10",
    ("version", b"0"): "from 1 to 10",
    ("version", b"-1"): "from 1 to 10",
    ("version", b"11"): "from 1 to 10",
    ("version", b"3.0"): "from 1 to 10",
    ("version", b"three"): "from 1 to 10",
    ("version", b"9" * 5000): "from 1 to 10",
    ("version", "\u0663".encode()): "from 1 to 10",
    ("version", b"3" * (1 << 20)): "from 1 to 10",
    (".storage_alignment", b"0"): either("positive number"),
    (".storage_alignment", b"-64"): either("positive number"),
    (".storage_alignment", b""): either("positive number"),
    (".storage_alignment", b"64.0"): either("positive number"),
    (".storage_alignment", b"9" * 5000): either("positive number"),
    (".storage_alignment", b"1"): LOADS,
    (".storage_alignment", b"4096"): LOADS,
    (".storage_alignment", b"7"): LOADS,
    (".format_version", b"99"): LOADS,
    (".format_version", b""): LOADS,
    (".format_version", b"\xff"): either("text in record"),
    (".data/serialization_id", b""): LOADS,
    (".data/serialization_id", b"\xff\xfe"): "text in record",
    ("data/0", b""): OTHER_SIZE,
    ("data/0", b"\0" * 63): OTHER_SIZE,
    ("data/0", b"\0" * 65): OTHER_SIZE,
    ("data/0", b"\0" * (1 << 20)): OTHER_SIZE,
    ("data.pkl", b""): "UnpicklingError|a pickle of a state dict",
}


def _contents() -> Iterator[Case]:
    for (key, data), error in CONTENTS.items():
        title = f"{data[:12]!r}_{len(data)}"
        changed_ = GOOD | {key: replace(GOOD[key], data=data)}
        yield Case(f"{key}/{title}", archive(list(changed_.values())), error)
    for key in GOOD:
        error = {"data.pkl": NAMELESS, "version": NAMELESS, "data/0": "no such record"}
        data = with_records(without=(key,))
        yield Case(f"missing/{key}", data, error.get(key, LOADS))
        for twin in (GOOD[key], replace(GOOD[key], data=b"other")):
            same = "same" if twin is GOOD[key] else "other"
            yield Case(f"twice/{key}_{same}", with_records((twin,)), TWICE)
        upper = replace(GOOD[key], name=f"archive/{key.upper()}")
        data = archive([upper if k == key else r for k, r in GOOD.items()])
        yield Case(f"upper_case/{key}", data, either(f"{NAMELESS}|no such record"))
        packed = archive([deflated(r) if k == key else r for k, r in GOOD.items()])
        yield Case(f"deflated/{key}", packed, either(PACKED))
    yield Case("missing/all", archive([]), CUT)
    yield Case("deflated/all", archive([deflated(r) for r in GOOD.values()]), PACKED)
    for key in ("data.pkl", "data/0", "byteorder", "version"):
        bomb = lambda path, key=key: path.write_bytes(_bomb(key)) and str(path)
        yield Case(f"deflate_bomb/{key}", bomb, PACKED, stock=False)


def _bomb(key: str) -> bytes:
    bomb = deflated(replace(GOOD[key], data=bytes(128 << 20)))
    return archive([bomb if k == key else r for k, r in GOOD.items()])


NAMES = (
    *("", "/", "archive", "archive/", "archive/data/", "archive//data/0", "/archive/x"),
    *("../x", "../../etc/passwd", "archive/../x", "archive/data/../../x", "C:\\x"),
    *("archive\\data\\9", "other/data/0", "archive/data/\0", "archive/data/0\0"),
    *(b"\xff\xfe", b"archive/\xff", b"archive/data/\xff", b"archive/data/\xed\xb0\x80"),
    *("archive/data/" + "9" * 60_000, "archive/constants.pkl", "archive/code/x.py"),
)


def _names() -> Iterator[Case]:
    for name in NAMES:
        extra = Record(name, b"x" * 16)
        title = f"{name[:30]!r}"
        data = with_records((extra,))
        yield Case(f"name/last_{title}", data, either(f"{ANY}|TorchScript"))
        data = archive([extra, *GOOD.values()])
        yield Case(f"name/first_{title}", data, either(f"{ANY}|TorchScript"))
    renamed = [replace(r, name=r.raw_name[8:]) for r in GOOD.values()]
    yield Case("name/no_folder", archive(renamed), "a record in a folder")
    moved = [replace(r, name=b"a/b/" + r.raw_name[8:]) for r in GOOD.values()]
    yield Case("name/folder_in_folder", archive(moved), either(NAMELESS))
    spread = [
        replace(r, name=b"%d/" % i + r.raw_name[8:])
        for i, r in enumerate(GOOD.values())
    ]
    yield Case("name/folder_each", archive(spread), "all records in folder")


def _overlaps() -> Iterator[Case]:
    two = {"a": tensor(), "b": tensor(key="9")}
    base = records(pickle(dictionary(**two)))
    at = archive(list(base.values())).find(b"archive/data/0") - 30
    # Two names of one local header, and of one that lies in the other's data.
    again = Record("archive/data/9", bytes(64), central={"header": at})
    yield Case("overlap/one_header", archive([*base.values(), again]), HEADER)
    inner = Record("archive/data/9", bytes(64))
    outer = replace(base["data/0"], data=inner.header(0) + bytes(64))
    numel = len(outer.data) // 4
    body = pickle(dictionary(a=tensor(numel=numel), b=tensor(key="9")))
    base |= {"data.pkl": replace(base["data.pkl"], data=body), "data/0": outer}
    at = archive(list(base.values())).find(b"archive/data/9") - 30
    again = Record("archive/data/9", bytes(64), central={"header": at})
    yield Case("overlap/nested", archive([*base.values(), again]), ANY)
    for size in (65, 100, 10_000):
        lies = {"size": size, "stored": size}
        long = replace(GOOD["data/0"], central=lies)
        body = pickle(dictionary(w=tensor(numel=size // 4)))
        changed_ = GOOD | {
            "data/0": long,
            "data.pkl": replace(GOOD["data.pkl"], data=body),
        }
        data = archive(list(changed_.values()))
        yield Case(f"overlap/runs_on_to_{size}", data, ANY)
    over = {"data/0": replace(GOOD["data/0"], central={"header": 0})}
    yield Case("overlap/with_pickle", archive(list((GOOD | over).values())), ANY)
    hidden = replace(GOOD["data/1"], hidden=True)
    data = archive(list((GOOD | {"data/1": hidden}).values()))
    yield Case("overlap/hidden_record", data, LOADS)
    backwards = archive(list(GOOD.values())[::-1])
    yield Case("order/backwards", backwards, either("written by torch.save"))


def cases() -> Iterator[Case]:
    """Yields zip files whose directories and records lie."""
    for part in (_ends, _wide, _contents, _names, _overlaps):
        yield from part()
