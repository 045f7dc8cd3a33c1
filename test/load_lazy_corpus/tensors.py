"""Tensors that lie: about their storage, their place in it, and their other fields.

Each lie is told by the first tensor of a file; those about places are told once more by
tensors over untyped storages, and those in numbers by one among so many tensors that the
reader takes them in runs.
"""

import struct
from collections.abc import Iterator
from typing import Any

from load_lazy_corpus.build import (
    archive,
    dictionary,
    integer,
    name,
    ORDERED_DICT,
    pickle,
    push,
    Record,
    tensor,
    text,
)
from load_lazy_corpus.case import Case, LOADS, records, UNREADABLE, WEIGHTS_ONLY, zipped


OUTSIDE = r"every tensor inside its storage in record 'data/\d+', got size"
OTHER_SIZE = r"-?\d+ bytes in record 'data/\d+', got 64 bytes"
MISSING = r"bytes in record 'data/.*', got no such record"
BIG = 1 << 62

# The fields that lie, and what is to come of it.
LIES: dict[str, tuple[dict[str, Any], str]] = {
    # The storage
    "numel_one_more": ({"numel": 17}, OTHER_SIZE),
    "numel_one_less": ({"numel": 15}, OUTSIDE),
    "numel_double": ({"numel": 32}, OTHER_SIZE),
    "numel_zero": ({"numel": 0}, OUTSIDE),
    "numel_negative": ({"numel": -16}, OUTSIDE),
    "numel_int32_min": ({"numel": -(1 << 31)}, OUTSIDE),
    "numel_2_31": ({"numel": (1 << 31) - 1}, OTHER_SIZE),
    "numel_2_32": ({"numel": (1 << 32) + 16}, OTHER_SIZE),
    "numel_2_40": ({"numel": 1 << 40}, OTHER_SIZE),
    "numel_2_62": ({"numel": BIG}, OUTSIDE),
    "numel_wraps_to_16": ({"numel": BIG + 16}, OUTSIDE),
    "numel_2_64": ({"numel": (1 << 64) + 16}, OUTSIDE),
    "numel_2_2000": ({"numel": 1 << 2000}, OUTSIDE),
    "numel_float": ({"numel": 16.0}, UNREADABLE),
    "numel_infinite": ({"numel": float("inf")}, UNREADABLE),
    "numel_nan": ({"numel": float("nan")}, UNREADABLE),
    "numel_none": ({"numel": None}, UNREADABLE),
    "numel_true": ({"numel": True}, UNREADABLE),
    "numel_text": ({"numel": "16"}, UNREADABLE),
    "numel_tuple": ({"numel": (16,)}, UNREADABLE),
    "key_missing": ({"key": "7000"}, MISSING),
    "key_empty": ({"key": ""}, MISSING),
    "key_parent": ({"key": "../data/0"}, MISSING),
    "key_absolute": ({"key": "/etc/passwd"}, MISSING),
    "key_backslash": ({"key": "..\\0"}, MISSING),
    "key_pickle": ({"key": "../data.pkl"}, MISSING),
    "key_nul": ({"key": "0\0"}, MISSING),
    "key_space": ({"key": "0 "}, MISSING),
    "key_arabic_digit": ({"key": "\u0660"}, MISSING),
    "key_surrogate": ({"key": text(b"\xed\xb0\x80")}, UNREADABLE),
    "key_long": ({"key": "0" * 100_000}, MISSING),
    "key_of_another": ({"key": "1", "numel": 17}, "68 bytes in record 'data/1'"),
    "key_integer": ({"key": 0}, LOADS),
    "key_none": ({"key": None}, MISSING),
    "key_list": ({"key": b"]"}, UNREADABLE),
    "tag_module": ({"tag": "module"}, WEIGHTS_ONLY),
    "tag_integer": ({"tag": 1}, WEIGHTS_ONLY),
    "location_unknown": ({"location": "xyz"}, "'xyz'|tagged with xyz"),
    "location_empty": ({"location": ""}, "''|tagged with "),
    "location_cuda": ({"location": "cuda:0"}, "'cuda:0'|on a CUDA device"),
    "location_meta": ({"location": "meta"}, LOADS),
    "location_integer": ({"location": 0}, UNREADABLE),
    "kind_function": ({"kind": name("torch._utils._rebuild_parameter")}, UNREADABLE),
    "kind_dtype": ({"kind": name("torch.float32")}, UNREADABLE),
    "kind_none": ({"kind": None}, UNREADABLE),
    "kind_text": ({"kind": "FloatStorage"}, UNREADABLE),
    "kind_wider": ({"kind": name("torch.DoubleStorage")}, OTHER_SIZE),
    "kind_narrower": ({"kind": name("torch.HalfStorage")}, OTHER_SIZE + "|" + OUTSIDE),
    "kind_quantized": (
        {"kind": name("torch.QInt8Storage"), "numel": 64},
        LOADS,
    ),
    # The place
    "offset_one": ({"offset": 1}, OUTSIDE),
    "offset_end": ({"offset": 16}, OUTSIDE),
    "offset_negative": ({"offset": -1}, OUTSIDE),
    "offset_2_31": ({"offset": (1 << 31) - 1}, OUTSIDE),
    "offset_2_62": ({"offset": BIG}, OUTSIDE),
    "offset_2_63": ({"offset": 1 << 63}, OUTSIDE),
    "offset_2_64": ({"offset": 1 << 64}, OUTSIDE),
    "offset_none": ({"offset": None}, UNREADABLE),
    "offset_tuple": ({"offset": (0,)}, UNREADABLE),
    "offset_float": ({"offset": 0.0}, UNREADABLE),
    "size_one_more": ({"size": (5, 4)}, OUTSIDE),
    "size_columns": ({"size": (4, 5)}, OUTSIDE),
    "size_negative": ({"size": (-4, 4)}, OUTSIDE),
    "size_both_negative": ({"size": (-4, -4)}, OUTSIDE),
    "size_2_31": ({"size": ((1 << 31) - 1, (1 << 31) - 1)}, OUTSIDE),
    "size_2_62": ({"size": (BIG, 4)}, OUTSIDE),
    "size_wraps_to_16": ({"size": (BIG + 4, 4)}, OUTSIDE),
    "size_2_64": ({"size": (1 << 64, 1)}, OUTSIDE),
    "size_nothing_of_much": ({"size": (0, BIG, BIG), "stride": (1, 1, 1)}, LOADS),
    "size_nothing_negative": ({"size": (0, -1)}, OUTSIDE),
    "size_scalar_beyond": ({"size": b")", "stride": b")", "offset": 16}, OUTSIDE),
    "size_float": ({"size": (4.0,)}, UNREADABLE),
    "size_list": ({"size": b"](K\x04K\x04e"}, LOADS),
    "size_none": ({"size": None}, UNREADABLE),
    "size_text": ({"size": "44"}, UNREADABLE),
    "size_65_dimensions": ({"size": (1,) * 65, "stride": (1,) * 65}, LOADS),
    "size_deep": ({"size": b")" + b"\x85" * 10_000}, UNREADABLE),
    "stride_one_more": ({"stride": (5, 1)}, OUTSIDE),
    "stride_negative": ({"stride": (-4, 1)}, OUTSIDE),
    "stride_2_62": ({"stride": (BIG, 1)}, OUTSIDE),
    "stride_wraps_to_4": ({"stride": (BIG + 4, 1)}, OUTSIDE),
    "stride_2_64": ({"stride": ((1 << 64) + 4, 1)}, OUTSIDE),
    "stride_short": ({"stride": (4,)}, OUTSIDE),
    "stride_long": ({"stride": (4, 1, 1)}, OUTSIDE),
    "stride_empty": ({"stride": b")"}, OUTSIDE),
    "stride_none": ({"stride": None}, LOADS),
    "expanded_2_40": ({"size": (1 << 40, 1), "stride": (0, 0)}, LOADS),
    "expanded_2_80": ({"size": (1 << 40, 1 << 40), "stride": (0, 0)}, OUTSIDE),
    # The rest
    "requires_grad_integer": ({"requires_grad": 2}, UNREADABLE),
    "requires_grad_text": ({"requires_grad": "no"}, UNREADABLE),
    "requires_grad_of_integers": (
        {"requires_grad": True, "kind": name("torch.IntStorage")},
        UNREADABLE,
    ),
    "hooks_none": ({"hooks": None}, LOADS),
    "hooks_dict": ({"hooks": b"}"}, LOADS),
    "hooks_filled": ({"hooks": ORDERED_DICT + b"K\0K\1s"}, LOADS),
}


def _in_numbers(value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return len(values) < 4 and all(
        type(n) is int and -(1 << 31) <= n < 1 << 31 for n in values
    )


def _long(n: int) -> bytes:
    return struct.pack("<I", n)


def _row(number: int, first_put: int, **lies: Any) -> bytes:
    """Instructions of a tensor as torch.save writes the 256th thing on."""
    fields = {"key": str(number), "numel": 16, "offset": 0} | lies
    size, stride = lies.get("size", (4, 4)), lies.get("stride", (4, 1))
    puts = iter(range(first_put, first_put + 9))
    put = lambda: b"r" + _long(next(puts))
    shape = lambda ns: b"".join(map(integer, ns)) + bytes([0x84 + len(ns)])
    key, numel, offset = (push(fields[k]) for k in ("key", "numel", "offset"))
    return (
        text(f"layer.{number}")
        + (put() + b"h\1((h\2h\3" + key + put() + b"h\4" + numel + b"t" + put() + b"Q")
        + (offset + shape(size) + put() + shape(stride) + put())
        + (b"\x89h\0)R" + put() + b"t" + put() + b"R" + put())
    )


def in_a_run(count: int = 120, liar: int = 100, **lies: Any) -> bytes:
    """A file of many tensors, one of which lies."""
    memo = [name("collections.OrderedDict"), name("torch._utils._rebuild_tensor_v2")]
    memo += [text("storage"), name("torch.FloatStorage"), text("cpu")]
    memo += [b"N"] * 251  # so that what follows is in the long form
    body = b"".join(x + b"q" + bytes([i]) for i, x in enumerate(memo))
    body = b"}(" + text("memo") + b"](" + body + b"e"
    for i in range(count):
        body += _row(i, 256 + 8 * i, **(lies if i == liar else {}))
    extra = [Record(f"archive/data/{i}", bytes(64)) for i in range(count)]
    rest = records(pickle(body + b"u"))
    del rest["data/0"], rest["data/1"]
    return archive([*rest.values(), *extra])


def cases() -> Iterator[Case]:
    """Yields tensors that lie."""
    yield Case("tensor/no_lie", zipped(pickle(dictionary(w=tensor()))), LOADS)
    for title, (lies, error) in LIES.items():
        data = zipped(pickle(dictionary(w=tensor(**lies))))
        yield Case(f"tensor/{title}", data, error)
    untyped = {"kind": name("torch.storage.UntypedStorage"), "numel": 64}
    v3 = {"rebuild": "torch._utils._rebuild_tensor_v3"}
    for title, (lies, error) in LIES.items():
        if title.partition("_")[0] in ("offset", "size", "stride", "expanded"):
            body = tensor(None, name("torch.float32"), **(untyped | v3 | lies))
            yield Case(f"tensor_v3/{title}", zipped(pickle(dictionary(w=body))), error)
    yield Case("tensor_in_a_run/no_lie", in_a_run(), LOADS)
    for title, (lies, error) in LIES.items():
        in_a_row = {"key", "numel", "offset", "size", "stride"}.issuperset(lies)
        if in_a_row and all(map(_in_numbers, lies.values())):
            yield Case(f"tensor_in_a_run/{title}", in_a_run(**lies), error)
