"""Safetensors files that lie, and indices of sharded checkpoints that do."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from load_lazy_corpus.case import Case, LOADS


MISFIT = "dtype, shape and data_offsets of tensor .* that fit each other"
PLACES = "right after those before, got (a gap|an overlap)|bytes, got"
NO_JSON = "a header in JSON, got|a header that is a JSON object"
TOO_LONG = "a header of at most"
BIG = 1 << 62


def info(start: int = 0, end: int = 64, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [start, end]} | fields


def file_of(header: Any, data: bytes = bytes(64), size: int | None = None) -> bytes:
    """A file with a header, which is JSON or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


GOOD = {"w": info()}
RAW = json.dumps(GOOD).encode()

HEADERS: dict[str, tuple[bytes, str]] = {
    "no_lie": (file_of(GOOD), LOADS),
    "spaces_after": (file_of(RAW + b"  "), LOADS),
    "nothing": (b"", f"{TOO_LONG}|beginning of a file"),
    "seven_bytes": (bytes(7), f"{TOO_LONG}|{NO_JSON}"),
    "eight_bytes": (bytes(8), NO_JSON),
    "size_one_more": (file_of(GOOD, size=len(RAW) + 1), NO_JSON),
    "size_one_less": (file_of(GOOD, size=len(RAW) - 1), NO_JSON),
    "size_zero": (file_of(GOOD, size=0), NO_JSON),
    "size_past_end": (file_of(GOOD, size=1000), TOO_LONG),
    "size_100_mb": (file_of(GOOD, size=100_000_001), TOO_LONG),
    "size_2_63": (file_of(GOOD, size=1 << 63), TOO_LONG),
    "size_2_64": (file_of(GOOD, size=(1 << 64) - 1), TOO_LONG),
    "size_2_64_minus_8": (file_of(GOOD, size=(1 << 64) - 8), TOO_LONG),
    "not_json": (file_of(b"{hello}"), NO_JSON),
    "cut_json": (file_of(RAW[:-3]), NO_JSON),
    "two_jsons": (file_of(RAW + RAW), NO_JSON),
    "bad_utf8": (file_of(b'{"\xff": 1}'), NO_JSON),
    "utf16": (file_of(json.dumps(GOOD).encode("utf-16")), NO_JSON),
    "bom": (file_of(b"\xef\xbb\xbf" + RAW), NO_JSON),
    "zeros_after": (file_of(RAW + b"\0\0"), NO_JSON),
    "list": (file_of([GOOD]), NO_JSON),
    "number": (file_of(3), NO_JSON),
    "null": (file_of(None), NO_JSON),
    "text": (file_of("w"), NO_JSON),
    "deep_lists": (file_of(b"[" * 200_000), NO_JSON),
    "deep_objects": (file_of(b'{"a":' * 200_000), NO_JSON),
    "deep_shape": (file_of(b'{"w":{"shape":' + b"[" * 200_000), NO_JSON),
    "long_number": (file_of(b'{"w":' + b"9" * 100_000 + b"}"), f"{NO_JSON}|{MISFIT}"),
    "nan": (file_of(b'{"w": NaN}'), NO_JSON),
    "infinity": (file_of(b'{"w": -Infinity}'), NO_JSON),
    "surrogate_name": (file_of(b'{"\\ud800": ' + RAW[6:]), NO_JSON),
    "twice": (file_of(RAW[:-1] + b", " + RAW[1:]), NO_JSON),
    "twice_escaped": (file_of(RAW[:-1] + b', "\\u0077"' + RAW[4:]), NO_JSON),
    "field_twice": (
        file_of(RAW.replace(b'"dtype"', b'"dtype": "F64", "dtype"')),
        NO_JSON,
    ),
    "trailing_byte": (file_of(GOOD, bytes(65)), PLACES),
    "missing_byte": (file_of(GOOD, bytes(63)), PLACES),
    "no_data": (file_of(GOOD, b""), PLACES),
    "empty": (file_of({}, b""), LOADS),
    "empty_with_data": (file_of({}), PLACES),
    "metadata": (file_of({"__metadata__": {"format": "pt"}, **GOOD}), LOADS),
    "metadata_list": (
        file_of({"__metadata__": [], **GOOD}),
        "strings as its __metadata__",
    ),
    "metadata_number": (
        file_of({"__metadata__": 3, **GOOD}),
        "strings as its __metadata__",
    ),
    "metadata_of_numbers": (
        file_of({"__metadata__": {"a": 1}, **GOOD}),
        "strings as its __metadata__",
    ),
    "metadata_tensor": (
        file_of({"__metadata__": info()}),
        "strings as its __metadata__",
    ),
}

INFOS: dict[str, tuple[dict[str, Any] | Any, str]] = {
    "offsets_swapped": (info(64, 0), MISFIT),
    "offsets_negative": (info(-64, 0), MISFIT),
    "offsets_beyond": (info(64, 128), PLACES),
    "offsets_2_62": (info(BIG, BIG + 64), PLACES),
    "offsets_2_63": (info(1 << 63, (1 << 63) + 64), MISFIT),
    "offsets_2_64": (info(1 << 64, (1 << 64) + 64), MISFIT),
    "offsets_one": (info(data_offsets=[0]), MISFIT),
    "offsets_three": (info(data_offsets=[0, 64, 64]), MISFIT),
    "offsets_floats": (info(data_offsets=[0.0, 64.0]), MISFIT),
    "offsets_text": (info(data_offsets="ab"), MISFIT),
    "offsets_null": (info(data_offsets=None), MISFIT),
    "offsets_true": (info(data_offsets=[False, 64]), MISFIT),
    "offsets_odd": (info(1, 65), PLACES),
    "shape_more": (info(shape=[5, 4]), MISFIT),
    "shape_less": (info(shape=[3, 4]), MISFIT),
    "shape_negative": (info(shape=[-4, -4]), MISFIT),
    "shape_overflow": (info(shape=[BIG + 4, 4]), MISFIT),
    "shape_2_64": (info(shape=[1 << 64, 4]), MISFIT),
    "shape_float": (info(shape=[4.0, 4.0]), MISFIT),
    "shape_text": (info(shape=["4", "4"]), MISFIT),
    "shape_true": (info(shape=[True, 16]), MISFIT),
    "shape_number": (info(shape=16), MISFIT),
    "shape_null": (info(shape=None), MISFIT),
    "shape_object": (info(shape={"4": 4}), MISFIT),
    "shape_missing": ({"dtype": "F32", "data_offsets": [0, 64]}, MISFIT),
    "shape_nothing_of_much": (info(0, 0, shape=[0, BIG, BIG]), f"{MISFIT}|{PLACES}"),
    "shape_nothing_of_too_much": (info(0, 0, shape=[BIG, 4, 0]), MISFIT),
    "shape_65_dimensions": (info(shape=[1] * 64 + [16]), ""),
    "shape_of_million": (info(shape=[1] * 300_000 + [16]), ""),
    "shape_of_million_large": (info(shape=[BIG] * 100_000), MISFIT),
    "dtype_unknown": (info(dtype="F31"), MISFIT),
    "dtype_wider": (info(dtype="F64"), MISFIT),
    "dtype_lower_case": (info(dtype="f32"), MISFIT),
    "dtype_number": (info(dtype=3), MISFIT),
    "dtype_list": (info(dtype=["F32"]), MISFIT),
    "dtype_object": (info(dtype={}), MISFIT),
    "dtype_missing": ({"shape": [4, 4], "data_offsets": [0, 64]}, MISFIT),
    "dtype_f4_odd": (info(dtype="F4", shape=[127]), MISFIT),
    "info_list": ([], MISFIT),
    "info_null": (None, MISFIT),
    "info_text": ("w", MISFIT),
    "extra_field": (info(extra=1), ""),
}


def _pairs() -> Iterator[Case]:
    for what, first, second, size in (
        ("overlap", (0, 64), (0, 64), 64),
        ("overlap_by_one", (0, 64), (63, 127), 127),
        ("nested", (0, 64), (16, 32), 64),
        ("gap", (0, 64), (65, 129), 129),
        ("gap_before", (4, 68), (68, 132), 132),
        ("gap_after", (0, 64), (64, 128), 140),
    ):
        pair = {"a": info(*first), "b": info(*second)}
        if second[1] - second[0] == 16:
            pair["b"]["shape"] = [4]
        yield Case(f"safetensors/{what}", _named(file_of(pair, bytes(size))), PLACES)
    crowd = {f"w{i}": info() for i in range(20_000)}
    yield Case("safetensors/crowd", _named(file_of(crowd)), PLACES)
    names = ("", "../../x", "/etc/passwd", "a\0b", "\u0660", "x" * 100_000, "__class__")
    for name in names:
        title = f"safetensors/name_{name[:12]!r}"
        yield Case(title, _named(file_of({name: info()})), LOADS)


def _named(data: bytes, name: str = "bad.safetensors") -> Callable[[Path], object]:
    def write(path: Path) -> str:
        path = path.with_name(name)
        path.write_bytes(data)
        return str(path)

    return write


def _indices() -> Iterator[Case]:
    good = file_of(GOOD)
    other = file_of({"v": info()})
    weights = {"w": "a.safetensors", "v": "b.safetensors"}

    def sharded(index: Any, **shards: bytes) -> Callable[[Path], object]:
        def write(path: Path) -> str:
            for name, data in shards.items():
                path.with_name(f"{name}.safetensors").write_bytes(data)
            raw = index if isinstance(index, bytes) else json.dumps(index).encode()
            path.with_name("model.safetensors.index.json").write_bytes(raw)
            return str(path.with_name("model.safetensors.index.json"))

        return write

    names_of_files = "names of files beside it"
    for what, index, error in (
        ("empty", b"", "an index in JSON"),
        ("not_json", b"{", "an index in JSON"),
        ("deep", b"[" * 200_000, "an index in JSON"),
        ("bad_utf8", b"\xff", "an index in JSON"),
        ("list", [1], "an object 'weight_map'"),
        ("number", 1, "an object 'weight_map'"),
        ("no_map", {"metadata": {}}, "an object 'weight_map'"),
        ("map_list", {"weight_map": []}, "an object 'weight_map'"),
        ("twice", b'{"weight_map": {"w": "a", "w": "b"}}', "an index in JSON"),
        ("parent", {"weight_map": {"w": "../a.safetensors"}}, names_of_files),
        ("dots", {"weight_map": {"w": ".."}}, names_of_files),
        ("absolute", {"weight_map": {"w": "/etc/passwd"}}, names_of_files),
        ("backslash", {"weight_map": {"w": "..\\a"}}, names_of_files),
        ("drive", {"weight_map": {"w": "C:a"}}, names_of_files),
        ("nul", {"weight_map": {"w": "a\0"}}, names_of_files),
        ("empty_name", {"weight_map": {"w": ""}}, names_of_files),
        ("number_name", {"weight_map": {"w": 1}}, names_of_files),
        ("null_name", {"weight_map": {"w": None}}, names_of_files),
        (
            "missing_shard",
            {"weight_map": weights | {"x": "c.safetensors"}},
            "^FileNotFound",
        ),
        (
            "missing_key",
            {"weight_map": weights | {"x": "a.safetensors"}},
            "no such key",
        ),
        (
            "swapped",
            {"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}},
            "no such key",
        ),
        (
            "itself",
            {"weight_map": {"w": "model.safetensors.index.json"}},
            "^RuntimeError: Expected",
        ),
    ):
        write = sharded(index, a=good, b=other)
        yield Case(f"index/{what}", write, error, stock=False)
    write = sharded({"weight_map": weights}, a=good, b=good)
    yield Case("index/key_in_two", write, "no such key|alone", stock=False)
    write = sharded({"weight_map": weights}, a=good, b=other[:-1])
    yield Case("index/bad_shard", write, PLACES, stock=False)


def cases() -> Iterator[Case]:
    """Yields files of the safetensors format."""
    for what, (data, error) in HEADERS.items():
        yield Case(f"safetensors/{what}", _named(data), error)
    for what, (lie, error) in INFOS.items():
        yield Case(f"safetensors/{what}", _named(file_of({"w": lie})), error)
    whole = file_of(GOOD)
    for size in range(0, len(whole), 11):
        error = f"{TOO_LONG}|{NO_JSON}|{PLACES}|beginning of a file"
        yield Case(f"safetensors/cut_to_{size}", _named(whole[:size]), error)
    yield from _pairs()
    yield from _indices()
