"""Holds ``torch.load(f, lazy=True)`` to its law on files that may be bad.

``judge`` tries each case in a process of its own kind: with little memory to take, and a
parent that notices when it dies or hangs, and which case it was. The law: no crash, hang,
or allocation beyond 64 MiB and the file's size; nothing is accepted that torch.load
refuses, and what is accepted equals what torch.load returns.

Needs os.fork and the resource module.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import re
import resource
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from load_lazy_corpus import Case


_ALLOWANCE = 64 << 20
_STOCK_ALLOWANCE = 1 << 30
_LOADED = "loaded"
_NOTHING: dict[str, Any] = {}
_SIGNS_OF_GREED = ("MemoryError", "can't allocate memory", "Errno 12")
_ADDRESS = re.compile(" at 0x[0-9a-f]+")


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
        lazy: "loaded", or the error's type and text, with the folder's name cut out
        stock: the same of torch.load; "" if it was not tried, "died" if it ended the process
        fault: how the law is broken; "" if it holds
    """

    lazy: str
    stock: str = ""
    fault: str = ""


def judge(
    cases: Iterable[Case], timeout: float = 60.0
) -> Iterator[tuple[Case, Verdict]]:
    """Yields each case with its verdict."""
    waiting = list(cases)[::-1]
    while waiting:
        with _worker(waiting[::-1]) as (process, results):
            while waiting:
                verdict = Verdict("", fault=f"no end in {timeout} s")
                case = waiting.pop()
                try:
                    # NB: in two steps, so that the end of torch.load is told from ours.
                    for _ in range(2):
                        if not results.poll(timeout):
                            break
                        verdict = results.recv()
                    else:
                        yield case, verdict
                        continue
                except EOFError:
                    process.join()
                    if not verdict.lazy:
                        fault = f"died: code {process.exitcode}"
                        verdict = Verdict("", fault=fault)
                yield case, verdict
                break


@contextlib.contextmanager
def _worker(cases: list[Case]) -> Iterator[tuple[Any, Connection]]:
    # NB: a fork, so that the worker has the same torch, and costs nothing to start.
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = cases, sender, Path(folder)
        process = fork.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            yield process, receiver
        finally:
            process.kill()
            process.join()
            receiver.close()


def _work(cases: list[Case], results: Connection, folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    gc.freeze()  # what was there before is no garbage, and need not be looked at
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.chdir(folder)
    for case in cases:
        f = case.write(folder)
        verdict, value = _try_lazy(case, f, folder)
        results.send(verdict._replace(stock="died"))
        results.send(_compare(case, f, folder, verdict, value))
        for entry in os.scandir(folder):
            is_folder = entry.is_dir(follow_symlinks=False)
            os.rmdir(entry) if is_folder else os.unlink(entry)


def _try_lazy(case: Case, f: Any, folder: Path) -> tuple[Verdict, Any]:
    before = _surroundings()
    # NB: once for the mapping, and once for all that may be read of it.
    with _memory_limit(_ALLOWANCE + 2 * _size(f)):
        lazy, value = _load(f, folder, weights_only=case.weights_only, lazy=True)
    fault = "" if _surroundings() == before else "it changed its surroundings"
    if any(sign in lazy for sign in _SIGNS_OF_GREED):
        fault = "it asks for too much memory"
    return Verdict(lazy, fault=fault), value


def _compare(case: Case, f: Any, folder: Path, verdict: Verdict, value: Any) -> Verdict:
    if not case.stock:
        return verdict
    with _memory_limit(_STOCK_ALLOWANCE + 2 * _size(f)):
        stock, stock_value = _load(f, folder, weights_only=case.weights_only)
    fault = verdict.fault
    if verdict.lazy == stock == _LOADED and describe(value) != describe(stock_value):
        fault = f"it loads {_short(value)}, torch.load {_short(stock_value)}"
    elif verdict.lazy == _LOADED != stock and not _is_original(case, value):
        fault = "it loads what torch.load refuses"
    return Verdict(verdict.lazy, stock, fault)


def _is_original(case: Case, value: Any) -> bool:
    """Whether a damaged file gave the data that it had before."""
    if case.original is None:
        return False
    stock = torch.load(io.BytesIO(case.original), weights_only=case.weights_only)
    return describe(value) == describe(stock)


def _size(f: Any) -> int:
    if isinstance(f, io.BytesIO):
        return f.getbuffer().nbytes
    return os.stat(f).st_size if isinstance(f, str) and os.path.exists(f) else 0


def _load(f: Any, folder: Path, **kwargs: Any) -> tuple[str, Any]:
    if hasattr(f, "seek"):
        f.seek(0)
    try:
        return _LOADED, torch.load(f, **kwargs)
    except Exception as error:
        text = str(error).replace(str(folder), "")
        return f"{type(error).__name__}: {text}", None


@contextlib.contextmanager
def _memory_limit(nbytes: int) -> Iterator[None]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _surroundings() -> object:
    return (
        sorted(os.listdir("/proc/self/fd")),
        sorted(os.listdir()),
        gc.isenabled(),
        torch.serialization._serialization_tls.map_location,
        os.environ.copy(),
    )


def _short(value: Any) -> str:
    try:
        return repr(value)[:200]
    except Exception as error:
        return f"what has no repr: {error!r}"[:200]


def describe(value: Any) -> list[Any]:
    """All that there is to see of a loaded object, as plain values.

    Without recursion, and each object once: a file's objects may hold themselves.
    """
    parts: list[Any] = []
    seen: dict[int, int] = {}
    todo = [value]
    while todo:
        item = todo.pop()
        if type(item).__name__ == "DeferredTensor":
            item.untyped_storage()  # reads it: from now on it is a plain tensor
        parts.append(type(item))
        if isinstance(item, (torch.Tensor, dict, list, set, torch.UntypedStorage)):
            if id(item) in seen:
                parts.append(seen[id(item)])
                continue
            seen[id(item)] = len(seen)
        if isinstance(item, torch.Tensor):
            parts.append(_describe_tensor(item, seen))
        elif isinstance(item, dict):
            inner = [x for pair in item.items() for x in pair]
            todo += [len(inner), *inner, getattr(item, "__dict__", _NOTHING)]
        elif isinstance(item, (list, tuple)):
            todo += [len(item), *item]
        elif isinstance(item, set):
            todo += [len(item), *sorted(item, key=repr)]
        elif isinstance(item, torch.UntypedStorage):
            parts.append(bytes(item.tolist()))
        else:
            parts.append(_ADDRESS.sub("", repr(item)))
    return parts


def _describe_tensor(tensor: torch.Tensor, seen: dict[int, int]) -> tuple[Any, ...]:
    what = tensor.dtype, tensor.device, tensor.size(), tensor.requires_grad
    state = tensor._backward_hooks or None, vars(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return *what, _short(tensor), repr(state)
    storage = tensor.untyped_storage()
    number = seen.setdefault(storage._cdata, len(seen))
    place = tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()
    return *what, *place, number, bytes(storage.tolist()), repr(state)
