"""Zip files that lie: cut, patched and mended ones, and headers that contradict each other.

The lies are told of three records: the pickle, a storage that the reader looks at closely,
and one among so many that the reader takes its place from the directory.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from load_lazy_corpus.build import (
    archive,
    dictionary,
    pickle,
    Record,
    tensor,
)
from load_lazy_corpus.case import Case, either, LOADS, records, saved, WEIGHTS_ONLY


CUT = "the directory of a zip file, got none|the beginning of a file that torch.save wrote"
DIRECTORY = (
    "a directory of .* records before|a record in a folder|bytes from offset|"
    "more directory entries|one part, got|a zip64 directory end"
)
HEADER = "the local header of record|end before|data from offset"
TWICE = "records of different names, got .* twice"
NAMELESS = "a record '.*', got none of that name"
PACKED = "stored as it is, got (a compressed|an encrypted) one"
OTHER_SIZE = r"\d+ bytes in record 'data/\d+', got \d+ bytes"
ANY = "^RuntimeError: Expected"
FOLDER = "of bytes in this file"

U32 = 0xFFFFFFFF
BIG = 1 << 62


def many(count: int = 40) -> list[Record]:
    """A good file's records: a tensor a storage, of 64 bytes each."""
    tensors = {f"w{i}": tensor(key=str(i)) for i in range(count)}
    rest = records(pickle(dictionary(**tensors)))
    del rest["data/0"], rest["data/1"]
    data = [
        Record(f"archive/data/{i}", struct.pack("<16f", *range(i, i + 16)))
        for i in range(count)
    ]
    return [*rest.values(), *data]


def lie(target: str, change: Callable[[Record], Record], **fields: Any) -> bytes:
    """A file whose record ``target`` is changed."""
    all_records = many()
    for i, record in enumerate(all_records):
        if record.name == f"archive/{target}":
            all_records[i] = change(record)
    return archive(all_records, **fields)


def _cuts() -> Iterator[Case]:
    whole = archive([*records(pickle(dictionary(w=tensor()))).values()])
    stop = len(whole)
    marks = {0, 1, 2, 3, 4, 29, 30, stop - 1, stop - 2, stop - 21, stop - 22, stop - 23}
    for magic in (b"PK\3\4", b"PK\1\2", b"PK\7\10", b"PK\6\6", b"PK\6\7"):
        at = whole.find(magic)
        while at >= 0:
            marks |= {at, at + 4, at + 16}
            at = whole.find(magic, at + 1)
    for size in sorted(marks):
        yield Case(f"cut/to_{size}", whole[:size], CUT)
    for size in (1, 4, 64, 500):
        error = (
            f"{CUT}|{WEIGHTS_ONLY}"  # a file that starts with a pickle is a legacy one
        )
        yield Case(f"cut/first_{size}", whole[size:], error)
    for at in range(100, stop, 90):
        yield Case(f"hole/at_{at}", whole[:at] + whole[at + 7 :], ANY)
        yield Case(f"bulge/at_{at}", whole[:at] + b"\0" * 7 + whole[at:], ANY)
    for size in (1, 22, 60_000):
        yield Case(f"tail/{size}_bytes", whole + b"\0" * size, LOADS)
    yield Case("tail/70000_bytes", whole + b"\0" * 70_000, CUT)
    yield Case("tail/another_zip", whole + whole, either(ANY))
    yield Case("tail/end_of_another", whole + whole[-22:], either(ANY))
    yield Case("front/one_byte", b"\0" + whole, CUT)
    yield Case("front/another_zip", saved({}) + whole, ANY)
    blank = whole[: stop // 2] + bytes(stop // 4) + whole[stop // 2 + stop // 4 :]
    yield Case("blank/third_quarter", blank, ANY)
    yield Case("blank/end", whole[: stop - 100] + bytes(100), CUT)
    yield Case(
        "blank/all", bytes(stop), "512 zeros"
    )  # to torch.load, an empty tar file


# What the directory says of a record, and what is to come of it.
CENTRAL: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"PK\1\3"}, DIRECTORY),
    "encrypted": ({"flags": 0x809}, PACKED),
    "strongly_encrypted": ({"flags": 0x849}, PACKED),
    "no_descriptor": ({"flags": 0x800}, LOADS),
    "masked": ({"flags": 0x2808}, PACKED),
    "deflated": ({"method": 8}, PACKED + "|" + HEADER),
    "bzip2": ({"method": 12}, PACKED + "|" + HEADER),
    "unknown_method": ({"method": 0xFFFF}, PACKED + "|" + HEADER),
    "checksum": ({"crc": 1}, LOADS),
    "size_zero": ({"size": 0}, ANY),
    "size_one_less": ({"size": lambda n: n - 1}, ANY),
    "size_one_more": ({"size": lambda n: n + 1}, ANY),
    "size_2_31": ({"size": 1 << 31}, ANY),
    "size_wide": ({"size": U32}, ANY),
    "stored_zero": ({"stored": 0}, ANY),
    "stored_one_more": ({"stored": lambda n: n + 1}, ANY),
    "stored_wide": ({"stored": U32}, ANY),
    "both_zero": ({"size": 0, "stored": 0}, ANY),
    "both_one_less": ({"size": lambda n: n - 1, "stored": lambda n: n - 1}, ANY),
    "both_four_more": ({"size": lambda n: n + 4, "stored": lambda n: n + 4}, ANY),
    "both_2_31": ({"size": 1 << 31, "stored": 1 << 31}, ANY),
    "both_wide": ({"size": U32, "stored": U32}, ANY),
    "header_zero": ({"header": 0}, ANY),
    "header_one_more": ({"header": lambda n: n + 1}, ANY),
    "header_one_less": ({"header": lambda n: n - 1}, ANY),
    "header_beyond": ({"header": 1 << 30}, ANY),
    "header_wide": ({"header": U32}, ANY),
    "name_size_zero": ({"name_size": 0}, ANY),
    "name_size_one_less": ({"name_size": lambda n: n - 1}, ANY),
    "name_size_huge": ({"name_size": 0xFFFF}, ANY),
    "extra_size_huge": ({"extra_size": 0xFFFF}, ANY),
    "comment_size_huge": ({"comment_size": 0xFFFF}, ANY),
    "second_disk": ({"disk": 1}, LOADS),
    "third_disk": ({"disk": 2}, FOLDER),
    "last_disk": ({"disk": 0xFFFF}, FOLDER),
    "folder_attribute": ({"external": 0x10}, FOLDER),
}

# The same of a record's own header.
LOCAL: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"PK\3\5"}, HEADER),
    "encrypted": ({"flags": 0x809}, either(HEADER)),
    "deflated": ({"method": 8}, either(HEADER)),
    "sizes": ({"size": 5, "stored": 5}, LOADS),
    "sizes_wide": ({"size": U32, "stored": U32}, LOADS),
    "name_size_zero": ({"name_size": 0}, HEADER),
    "name_size_one_less": ({"name_size": lambda n: n - 1}, HEADER),
    "name_size_huge": ({"name_size": 0xFFFF}, HEADER + "|bytes from offset"),
    "extra_size_zero": ({"extra_size": 0}, HEADER),
    "extra_size_one_more": ({"extra_size": lambda n: n + 1}, HEADER),
    "extra_size_huge": ({"extra_size": 0xFFFF}, HEADER),
}


PACK = {"method": 8}

# Bytes that are no storage's may turn out to be right, or are judged when they are read.
MEANING = "from 1 to 10|UnpicklingError|a pickle of a state dict"


def _headers() -> Iterator[Case]:
    for target in ("data.pkl", "version", "data/0", "data/3"):
        title, data_ = target.replace("/", "_"), target.startswith("data/")
        for fields, table in ("central", CENTRAL), ("local", LOCAL):
            for what, (lies, error) in table.items():
                if error not in (LOADS, PACKED, FOLDER) and not data_:
                    error = either(f"{error}|{MEANING}|{CUT}")
                data = lie(target, lambda r, f=fields, v=lies: replace(r, **{f: v}))
                yield Case(f"{fields}_{title}/{what}", data, error)
        data = lie(target, lambda r: replace(r, central=PACK, local=PACK))
        yield Case(f"headers_{title}/deflated_in_name", data, PACKED)
        data = lie(target, lambda r: replace(r, local_name=b"archive/else"))
        # Of some files not all names are looked at; nor does torch.load.
        yield Case(f"headers_{title}/other_name", data, either(HEADER))


def cases() -> Iterator[Case]:
    """Yields zip files that lie."""
    yield Case("zip/no_lie", archive(many()), LOADS)
    yield from _cuts()
    yield from _headers()
