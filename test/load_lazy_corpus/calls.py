"""Pickles that ask for more than data: calls of what is forbidden, or too large, or too long.

Some of what torch's unpickler allows makes as much memory as an argument says, or takes
as long: that is not allowed here.
"""

from collections.abc import Iterator

from load_lazy_corpus.build import (
    call,
    dictionary,
    integer,
    items,
    name,
    ORDERED_DICT,
    pickle,
    push,
    storage,
    tensor,
    text,
)
from load_lazy_corpus.case import (
    Case,
    either,
    UNREADABLE,
    WEIGHTS_ONLY,
    zipped,
)


REFUSED = f"{UNREADABLE}|{WEIGHTS_ONLY}"
TOUCH = text("touch was_here")

# Functions that a state dict has no business with, and arguments.
FORBIDDEN: dict[str, tuple[bytes, ...]] = {
    "os.system": (TOUCH,),
    "posix.system": (TOUCH,),
    "nt.system": (TOUCH,),
    "subprocess.Popen": (TOUCH,),
    "subprocess.check_output": (TOUCH,),
    "builtins.eval": (text("open('was_here', 'w')"),),
    "__builtin__.eval": (text("open('was_here', 'w')"),),
    "builtins.exec": (text("open('was_here', 'w')"),),
    "builtins.open": (text("was_here"), text("w")),
    "builtins.getattr": (name("torch.Tensor"), text("numpy")),
    "builtins.__import__": (text("antigravity"),),
    "builtins.print": (text("hello"),),
    "builtins.object": (),
    "builtins.bytes": (integer(1 << 40),),
    "builtins.list": (b"]",),
    "builtins.dict": (b"]",),
    "io.open": (text("was_here"), text("w")),
    "pickle.loads": (text("x"),),
    "marshal.loads": (text("x"),),
    "importlib.import_module": (text("antigravity"),),
    "operator.attrgetter": (text("__class__"),),
    "functools.partial": (name("os.system"), TOUCH),
    "torch.load": (text("x.pt"),),
    "torch.save": (b"N", text("was_here")),
    "torch.hub.load": (text("x"), text("y")),
    "torch.serialization.load": (text("x.pt"),),
    "torch.storage._load_from_bytes": (b"N",),
    "torch.jit.load": (text("x.pt"),),
    "torch.ones": (integer(1 << 40),),
    "torch.empty": (integer(1 << 40),),
    "torch.from_file": (text("was_here"), b"\x88", integer(16)),
    "torch.UntypedStorage.from_file": (text("was_here"), b"\x88", integer(16)),
    "torch._load_lazy._map._map_posix": (b"N", integer(1 << 40)),
    "torch._load_lazy.load": (text("x.pt"),),
    "torch.serialization.add_safe_globals": (b"]",),
    "torch._utils._rebuild_xla_tensor": (b"N",),
    "torch.multiprocessing.reductions.rebuild_storage_filename": (b"N",),
    "numpy.core.multiarray._reconstruct": (b"N", b")", text("b")),
    "numpy.frombuffer": (text("x"),),
    "codecs.encode": (text("x"), text("punycode")),
    "codecs.decode": (text("x"), text("zlib")),
    "webbrowser.open": (text("x"),),
    "shutil.rmtree": (text("x"),),
    "sys.exit": (integer(3),),
    "os._exit": (integer(3),),
    "os.abort": (),
    "signal.raise_signal": (integer(9),),
    "ctypes.string_at": (integer(0),),
    "time.sleep": (integer(1 << 30),),
}

HUGE = 1 << 40

# Functions that weights_only allows, and calls of them that take memory, time or the process.
GREEDY: dict[str, tuple[bytes, bool]] = {
    "bytearray_2_40": (call("__builtin__.bytearray", integer(HUGE)), False),
    "bytearray_2_30": (call("__builtin__.bytearray", integer(1 << 30)), False),
    "bytearray_negative": (call("__builtin__.bytearray", integer(-1)), True),
    "bytearray_of_dtype": (call("__builtin__.bytearray", name("torch.int8")), True),
    "bytearray_of_tensor": (
        call("__builtin__.bytearray", tensor(size=(HUGE, 1), stride=(0, 0))),
        False,
    ),
    "float_tensor": (call("torch.FloatTensor", integer(HUGE)), False),
    "float_tensor_2_28": (call("torch.FloatTensor", integer(1 << 28)), False),
    "byte_tensor_2_30": (call("torch.ByteTensor", integer(1 << 30)), False),
    "tensor": (call("torch.Tensor", integer(HUGE)), False),
    "tensor_small": (call("torch.Tensor", integer(1000)), False),  # memory as it was
    "tensor_newobj": (
        name("torch.FloatTensor") + items([integer(1 << 28)]) + b"\x81",
        False,
    ),
    "sparse": (
        call(
            "torch._utils._rebuild_sparse_tensor",
            name("torch.sparse_coo"),
            items([tensor(), tensor(), push((HUGE, HUGE))]),
        ),
        True,
    ),
    "quantized": (
        call(
            "torch._utils._rebuild_qtensor",
            storage(kind=name("torch.QInt8Storage"), numel=64),
            integer(0),
            push((HUGE,)),
            push((1,)),
            push((name("torch.per_tensor_affine"), 1.0, 0)),
            b"\x89",
            ORDERED_DICT,
        ),
        False,
    ),
    "meta": (
        call(
            "torch._utils._rebuild_meta_tensor_no_storage",
            name("torch.float32"),
            push((HUGE,)),
            push((1,)),
            b"\x89",
        ),
        True,
    ),
    "wrapper_subclass": (
        call(
            "torch._utils._rebuild_wrapper_subclass",
            name("torch.FloatTensor"),
            name("torch.float32"),
            push((HUGE,)),
            push((1,)),
            integer(0),
            name("torch.strided"),
            push(("cpu",)),
            b"\x89",
        ),
        False,
    ),
    "numpy_bytes": (
        call(
            "torch._utils._rebuild_device_tensor_from_numpy",
            call("_codecs.encode", text("x" * 64), text("latin1")),
            name("torch.float32"),
            text("cpu"),
            b"\x89",
        ),
        True,
    ),
    "encode_punycode": (
        call("_codecs.encode", text("\xe9\u4e00" * 300_000), text("punycode")),
        False,
    ),
    "encode_idna": (
        call("_codecs.encode", text("\xe9." * 300_000), text("idna")),
        False,
    ),
    "encode_unknown": (call("_codecs.encode", text("x"), text("nothing")), True),
    "encode_rot13": (call("_codecs.encode", text("x"), text("rot13")), True),
    "encode_zlib": (call("_codecs.encode", text("x"), text("zlib")), True),
    "encode_nul": (call("_codecs.encode", text("x"), text("a\0b")), True),
    "encode_no_text": (call("_codecs.encode", integer(3), text("latin1")), True),
    "size_of_text": (call("torch.Size", text("abc")), True),
    "size_of_numbers": (call("torch.Size", push((1 << 70,))), True),
    "size_of_expanded": (
        call("torch.Size", tensor(size=(HUGE, 1), stride=(0, 0))),
        False,
    ),
    "set_of_expanded": (
        call("__builtin__.set", tensor(size=(HUGE, 1), stride=(0, 0))),
        False,
    ),
    "ordered_dict_of_expanded": (
        call("collections.OrderedDict", tensor(size=(HUGE, 2), stride=(0, 0))),
        False,
    ),
    "counter_of_expanded": (
        call("collections.Counter", tensor(size=(HUGE, 1), stride=(0, 0))),
        False,
    ),
    "tensor_of_expanded": (
        call("torch.Tensor", tensor(size=(HUGE, 1), stride=(0, 0))),
        False,
    ),
    "device_cuda": (call("torch.device", text("cuda"), integer(1 << 20)), True),
    "device_unknown": (call("torch.device", text("nowhere")), True),
    "parameter_of_none": (
        call("torch._utils._rebuild_parameter", b"N", b"\x88", b"N"),
        True,
    ),
    "parameter_of_integers": (
        call(
            "torch._utils._rebuild_parameter",
            tensor(kind=name("torch.IntStorage")),
            b"\x88",
            ORDERED_DICT,
        ),
        True,
    ),
    "complex_of_text": (call("__builtin__.complex", text("1+2j")), True),
    "set_of_text": (call("__builtin__.set", text("abc")), True),
    "set_of_lists": (call("__builtin__.set", b"](]]e"), True),
    "expanded_device_tensor": (
        call(
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            tensor(size=(HUGE, 1), stride=(0, 0)),
            name("torch.float64"),
            text("cpu"),
            b"\x89",
        ),
        False,
    ),
    "contiguous_state": (
        tensor() + push((storage(), 0, (HUGE,), (1,))) + b"b",
        True,
    ),
    "tensor_state_huge": (
        call("torch.FloatTensor") + push((storage(), 0, (HUGE,), (1,))) + b"b",
        False,
    ),
    "rebuild_of_nothing": (call("torch._utils._rebuild_tensor_v2"), True),
    "rebuild_of_everything": (
        call("torch._utils._rebuild_tensor_v2", *[b"N"] * 100),
        True,
    ),
    "rebuild_v3_of_float_storage": (
        tensor(None, name("torch.int8"), rebuild="torch._utils._rebuild_tensor_v3"),
        True,
    ),
    "metadata_of_lies": (tensor(None, dictionary(conj=b"\x88")), True),
    "metadata_unknown": (tensor(None, dictionary(x=b"\x88")), True),
}


def _again(function: str, argument: bytes, *more: bytes) -> bytes:
    """Instructions that make 20,000 copies of an argument that is there once."""
    first = name(function) + b"q\1" + items([argument, *more]) + b"q\2R"
    return b"](" + first + b"h\1h\2R" * 20_000 + b"e"


# Calls that are allowed once, and not over and over.
COPIES: dict[str, bytes] = {
    "encode": _again("_codecs.encode", text("x" * 100_000), text("latin1")),
    "bytearray": _again("__builtin__.bytearray", text("x" * 99_999), text("latin-1")),
    "set": _again(
        "__builtin__.set", b"](" + b"".join(map(integer, range(9999))) + b"e"
    ),
    "size": _again("torch.Size", push(tuple(range(9999)))),
    "counter": _again(
        "collections.Counter",
        b"}(" + b"".join(integer(i) + b"N" for i in range(9999)) + b"u",
    ),
    "ordered_dict": _again(
        "collections.OrderedDict", b"](" + push((1, 2)) * 9999 + b"e"
    ),
}


def cases() -> Iterator[Case]:
    """Yields pickles that call functions."""
    for what, body in COPIES.items():
        yield Case(f"copies/{what}", zipped(pickle(body)), REFUSED, stock=False)
        data = zipped(pickle(b"\x80\3" + body))
        yield Case(f"copies_screened/{what}", data, REFUSED, stock=False)
    for function, arguments in FORBIDDEN.items():
        for where, body in (
            ("alone", call(function, *arguments)),
            ("late", dictionary(w=tensor(), x=call(function, *arguments))),
            ("unused", dictionary(w=tensor(), x=name(function))),
        ):
            yield Case(f"forbidden_{where}/{function}", zipped(pickle(body)), REFUSED)
    for what, (body, stock) in GREEDY.items():
        data = zipped(pickle(dictionary(x=body)))
        yield Case(f"greedy/{what}", data, either(REFUSED), stock)
        data = zipped(pickle(dictionary(x=body), 3))
        yield Case(f"greedy_protocol_3/{what}", data, either(REFUSED), stock)
