"""Pickles that lie: what their instructions ask of whoever reads them.

What the functions do that they may name is in ``calls.py``.
"""

import pickle as python_pickle
import pickletools
import struct
from collections.abc import Iterator

from load_lazy_corpus.build import (
    dictionary,
    name,
    ORDERED_DICT,
    pickle,
    push,
    tensor,
    text,
)
from load_lazy_corpus.case import (
    Case,
    either,
    LOADS,
    UNREADABLE,
    WEIGHTS_ONLY,
    zipped,
)


REFUSED = f"{UNREADABLE}|{WEIGHTS_ONLY}"
TENSOR = text("w") + tensor() + b"s"


def _long4(n: int) -> bytes:
    return struct.pack("<I", n)


def _long8(n: int) -> bytes:
    return struct.pack("<Q", n)


# Bodies of pickles, and what is to come of them.
BODIES: dict[str, tuple[bytes, str]] = {
    # The stack
    "nothing": (b"", REFUSED),
    "two_results": (b"}}", either(REFUSED)),
    "pop": (b"}N0", either(REFUSED)),
    "pop_of_nothing": (b"0", REFUSED),
    "pop_mark": (b"}(N1", either(REFUSED)),
    "dup": (b"}2", either(REFUSED)),
    "mark_left": (b"}(", REFUSED),
    "marks_left": (b"(((", REFUSED),
    "many_marks": (b"(" * 100_000, REFUSED),
    "tuple_without_mark": (b"t", REFUSED),
    "tuple1_of_nothing": (b"\x85", REFUSED),
    "tuple2_of_one": (b"N\x86", either(REFUSED)),
    "tuple3_of_two": (b"NN\x87", either(REFUSED)),
    "tuple_across_mark": (b"N(N\x86", REFUSED),
    "append_to_dict": (b"}Na", REFUSED),
    "append_to_tuple": (b")Na", REFUSED),
    "append_to_nothing": (b"Na", REFUSED),
    "appends_without_mark": (b"]NNe", REFUSED),
    "appends_to_dict": (b"}(NNe", REFUSED),
    "setitem_on_list": (b"]K\0Ns", REFUSED),
    "setitem_on_none": (b"NK\0Ns", REFUSED),
    "setitem_on_global": (name("torch.Size") + b"K\0Ns", REFUSED),
    "setitem_on_tensor": (tensor() + b"K\0K\1s", REFUSED),
    "setitem_on_storage_type": (name("torch.FloatStorage") + b"K\0Ns", REFUSED),
    "setitems_odd": (b"}(NNNu", REFUSED),
    "setitems_on_list": (b"](NNu", REFUSED),
    "setitems_empty": (b"}(u", LOADS),
    "key_list": (b"}]Ns", REFUSED),
    "key_dict": (b"}}Ns", REFUSED),
    "key_tensor": (b"}" + tensor() + b"Ns", either(REFUSED)),
    "key_global": (b"}" + name("torch.float32") + b"Ns", either(REFUSED)),
    "key_nan": (b"}G\x7f\xf8" + b"\0" * 6 + b"Ns", LOADS),
    "key_twice": (dictionary(w=tensor()) + TENSOR, LOADS),
    "true_beside_one": (b"}(\x88NK\1Nu", LOADS),
    "list_in_itself": (b"]q\0h\0a", LOADS),
    "dict_in_itself": (b"}q\0K\0h\0s", LOADS),
    "tuple_around_itself": (b"]q\0h\0\x85a", LOADS),
    # The memo
    "put_of_nothing": (b"q\0", REFUSED),
    "put_2_31": (b"Nr" + _long4((1 << 31) - 1), LOADS),
    "put_2_32": (b"Nr" + _long4((1 << 32) - 1), LOADS),
    "put_backwards": (b"}q\1q\0", LOADS),
    "put_twice": (b"}q\0q\0", LOADS),
    "put_rebinds": (b"](Nq\0}q\0h\0e", LOADS),
    "put_text": (b"}p0\n", REFUSED),
    "memoize": (b"}\x94", REFUSED),
    "get_unknown": (b"h\7", REFUSED),
    "get_2_31": (b"j" + _long4((1 << 31) - 1), REFUSED),
    "get_text": (b"g0\n", REFUSED),
    "billion_laughs": (
        b"]q\0"
        + b"".join(
            b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
            for i in range(200)
        ),
        LOADS,
    ),
    # Numbers and strings
    "unicode_beyond": (b"X" + _long4(1 << 31) + b"abc", REFUSED),
    "unicode_2_32": (b"X" + _long4((1 << 32) - 1) + b"abc", REFUSED),
    "unicode_bad": (text(b"\xff\xfe"), REFUSED),
    "unicode_surrogate": (text(b"\xed\xa0\x80"), LOADS),
    "unicode_overlong": (text(b"\xc0\x80"), REFUSED),
    "unicode8_2_63": (b"\x8d" + _long8(1 << 63) + b"abc", REFUSED),
    "short_unicode": (b"\x8c\3abc", REFUSED),
    "unicode_line": (b"Vabc\n", REFUSED),
    "string_line": (b"S'abc'\n", REFUSED),
    "string_negative": (b"T" + struct.pack("<i", -1) + b"abc", REFUSED),
    "string_2_31": (b"T" + _long4((1 << 31) - 1) + b"abc", REFUSED),
    "short_string": (b"U\3abc", either(REFUSED)),
    "short_string_beyond": (b"U\xffabc", either(REFUSED)),
    "short_string_bad": (b"U\1\xff", REFUSED),
    "bytes_2_32": (b"B" + _long4((1 << 32) - 1) + b"abc", REFUSED),
    "bytes8_2_63": (b"\x8e" + _long8((1 << 63) - 1), REFUSED),
    "bytearray8_2_63": (b"\x96" + _long8((1 << 63) - 1), REFUSED),
    "bytearray8_2_40": (b"\x96" + _long8(1 << 40), REFUSED),
    "next_buffer": (b"\x97", REFUSED),
    "readonly_buffer": (b"}\x98", REFUSED),
    "long1_beyond": (b"\x8a\xff1", either(REFUSED)),
    "long1_empty": (b"\x8a\0", LOADS),
    "long4_negative": (b"\x8b" + struct.pack("<i", -1), REFUSED),
    "long4_2_31": (b"\x8b" + _long4((1 << 31) - 1) + b"1", REFUSED),
    "long_line": (b"L" + b"9" * 100_000 + b"L\n", REFUSED),
    "int_line": (b"I1\n", REFUSED),
    "int_line_true": (b"I01\n", REFUSED),
    "float_line": (b"F1.5\n", REFUSED),
    "float_short": (b"G\0\0\0", REFUSED),
    "int_short": (b"J\0\0", REFUSED),
    "int2_short": (b"M\0", REFUSED),
    "int1_short": (b"K", REFUSED),
    "frame_2_63": (b"\x95" + _long8((1 << 63) - 1) + b"}", REFUSED),
    "frame_zero": (b"\x95" + _long8(0) + b"}", REFUSED),
    "proto_again": (b"}\x80\2", either(REFUSED)),
    "proto_99_inside": (b"}\x80\x63", either(REFUSED)),
    "unknown_zero": (b"\0", REFUSED),
    "unknown_255": (b"\xff", REFUSED),
    "unknown_letter": (b"Z", REFUSED),
    "nothing_after_global": (b"ctorch\nSize", REFUSED),
    "global_without_module": (b"c\nSize\n", REFUSED),
    "global_bad_utf8": (b"c\xff\xfe\nSize\n", REFUSED),
    # Objects
    "newobj": (name("collections.OrderedDict") + b")\x81", either(REFUSED)),
    "newobj_parameter": (name("torch.nn.Parameter") + b")\x81", REFUSED),
    "newobj_of_none": (b"N)\x81", REFUSED),
    "newobj_of_function": (name("torch._utils._rebuild_tensor_v2") + b")\x81", REFUSED),
    "newobj_of_storage_type": (name("torch.FloatStorage") + b")\x81", REFUSED),
    "newobj_ex": (name("collections.OrderedDict") + b")}\x92", REFUSED),
    "obj": (b"(" + name("collections.OrderedDict") + b"o", REFUSED),
    "inst": (b"(icollections\nOrderedDict\n", REFUSED),
    "inst_system": (b"(" + text("touch was_here") + b"ios\nsystem\n", REFUSED),
    "stack_global": (b"\x8c\2os\x8c\6system\x93", REFUSED),
    "stack_global_of_numbers": (b"K\1K\2\x93", REFUSED),
    "ext1": (b"\x82\1", REFUSED),
    "ext2": (b"\x83\1\1", REFUSED),
    "ext4": (b"\x84" + _long4(1 << 31), REFUSED),
    "persid": (b"Pstorage\n", REFUSED),
    "binpersid_of_none": (b"NQ", REFUSED),
    "binpersid_of_text": (text("storage") + b"Q", REFUSED),
    "binpersid_of_int": (b"K\1Q", REFUSED),
    "binpersid_empty": (b")Q", REFUSED),
    "binpersid_short": (push(("storage",)) + b"Q", REFUSED),
    "binpersid_long": (push(("storage", *[None] * 5)) + b"Q", REFUSED),
    "reduce_without_tuple": (name("collections.OrderedDict") + b"]R", REFUSED),
    "reduce_of_none": (b"N)R", REFUSED),
    "reduce_of_text": (text("eval") + b")R", REFUSED),
    "reduce_of_list": (b"])R", REFUSED),
    "reduce_of_dict": (ORDERED_DICT + b")R", REFUSED),
    "reduce_of_tensor": (tensor() + b")R", REFUSED),
    "reduce_of_dtype": (name("torch.float32") + b")R", REFUSED),
    "reduce_of_storage_type": (name("torch.FloatStorage") + b")R", REFUSED),
    "reduce_without_arguments": (b")R", REFUSED),
    "build_none": (b"N}b", REFUSED),
    "build_list": (b"]}b", REFUSED),
    "build_global": (name("torch.Size") + b"}b", REFUSED),
    "build_function": (
        name("torch._utils._rebuild_tensor_v2") + dictionary(__name__=text("x")) + b"b",
        REFUSED,
    ),
    "build_storage_type": (
        name("torch.FloatStorage") + dictionary(dtype=name("torch.int8")) + b"b",
        REFUSED,
    ),
    "build_tensor": (tensor() + b"}b", REFUSED),
    "build_tensor_with_storage": (tensor() + push((b"N",)) + b"b", REFUSED),
    "build_dict_with_none": (ORDERED_DICT + b"Nb", REFUSED),
    "build_dict_with_list": (ORDERED_DICT + b"]b", LOADS),
    "build_dict_with_numbers": (ORDERED_DICT + b"}K\0Nsb", either(REFUSED)),
    "build_dict_with_class": (
        ORDERED_DICT + dictionary(__class__=b"N", __dict__=b"N", keys=b"N") + b"b",
        LOADS,
    ),
    "build_dict_with_itself": (
        ORDERED_DICT + b"q\0" + dictionary(a=b"h\0") + b"b",
        LOADS,
    ),
    "build_slots": (ORDERED_DICT + push((b"N", dictionary(a=b"N"))) + b"b", REFUSED),
}


def _depths() -> Iterator[Case]:
    deep = 20_000
    shapes = {
        "lists": b"]" * deep + b"a" * (deep - 1),
        "tuples": b")" + b"\x85" * deep,
        "tuples_by_mark": b"(" * deep + b"t" * deep,
        "dicts": b"}" + b"K\0}" * deep + b"s" * deep,
        "ordered_dicts": ORDERED_DICT + (text("x") + ORDERED_DICT) * 5000 + b"s" * 5000,
        "states": ORDERED_DICT
        + (b"}" + text("x") + ORDERED_DICT) * 5000
        + b"sb" * 5000,
    }
    for what, body in shapes.items():
        yield Case(f"depth/{what}", zipped(pickle(body)), either(REFUSED))
    # In torch.load, a regular expression looks for words in such a name.
    data = zipped(pickle(b"c" + b"a" * 1_000_000 + b"\nb\n"))
    yield Case("pickle/global_long", data, REFUSED, stock=False)
    deep = 200_000
    # Hashing a tuple nested so deep overruns C's stack, in torch.load too.
    keys = {
        "key": b"}" + b")" + b"\x85" * deep + b"Ns",
        "keys": b"}(" + b")" + b"\x85" * deep + b"Nu",
        "key_in_ordered_dict": ORDERED_DICT + b")" + b"\x85" * deep + b"Ns",
        "key_in_set": name("__builtin__.set")
        + b"]("
        + b")"
        + b"\x85" * deep
        + b"e\x85R",
        "key_after_protocol_3": b"\x80\3}" + b")" + b"\x85" * deep + b"Ns",
        "storage_key": b"("
        + text("storage")
        + name("torch.FloatStorage")
        + b")"
        + b"\x85" * deep
        + text("cpu")
        + b"K\x10tQ",
        "function": b")" + b"\x85" * deep + b")R",
        # Of a tuple that holds the same one twice, and so on, a hash takes 2**60 steps.
        "doubled": b"})q\0" + b"h\0\x86q\0" * 60 + b"Ns",
        "doubled_after_protocol_3": b"\x80\3})q\0" + b"h\0\x86q\0" * 60 + b"Ns",
        "doubled_in_set": name("__builtin__.set")
        + b"])q\0"
        + b"h\0\x86q\0" * 60
        + b"a\x85R",
        "wide_keys": b"}(" + b"N" * 99_999 + b"tq\0Ns(" + b"h\0N" * 99_999 + b"u",
        "wide_keys_after_protocol_3": b"\x80\3}("
        + b"N" * 30_000
        + b"tq\0Ns("
        + b"h\0N" * 30_000
        + b"u",
    }
    for what, body in keys.items():
        data = zipped(pickle(body))
        yield Case(f"depth/{what}", data, REFUSED, stock=False)


def _whole() -> Iterator[Case]:
    good = pickle(dictionary(w=tensor()))
    for size in range(0, len(good), 9):
        yield Case(f"pickle/cut_to_{size}", zipped(good[:size]), REFUSED)
    yield Case("pickle/tail", zipped(good + b"\0" * 99), LOADS)
    yield Case("pickle/twice", zipped(good + good), LOADS)
    yield Case("pickle/no_protocol", zipped(good[2:]), either(REFUSED))
    yield Case("pickle/no_stop", zipped(good[:-1]), REFUSED)
    yield Case("pickle/utf8_bom", zipped(b"\xef\xbb\xbf" + good), REFUSED)
    yield Case("pickle/json", zipped(b'{"w": 1}'), REFUSED)
    for protocol in (0, 1, 3, 4, 5, 6, 255):
        body = pickle(dictionary(w=tensor()), protocol)
        yield Case(f"pickle/says_protocol_{protocol}", zipped(body), either(REFUSED))
    value = {"x": [1, 2.5, "three", b"four", None, True, (1,), {2}, 1 << 70]}
    for protocol in range(6):
        body = python_pickle.dumps(value, protocol)
        yield Case(f"pickle/of_protocol_{protocol}", zipped(body), either(REFUSED))
        title = f"pickle/of_protocol_{protocol}_for_pickle"
        yield Case(title, zipped(body), LOADS, weights_only=False)
    for code in pickletools.opcodes:
        byte = code.code.encode("latin1")
        yield Case(f"opcode/{code.name}_first", zipped(pickle(byte)), either(REFUSED))
        body = dictionary(w=tensor()) + byte + b"\0\0\0\0\n\n"
        yield Case(f"opcode/{code.name}_late", zipped(pickle(body)), either(REFUSED))


def cases() -> Iterator[Case]:
    """Yields pickles whose instructions make no sense, or ask for too much."""
    for what, (body, error) in BODIES.items():
        yield Case(f"pickle/{what}", zipped(pickle(body)), error)
    yield from _depths()
    yield from _whole()
