"""``python -m torch_ext convert SRC DST``: one checkpoint in another format, with no more than a tensor in memory.

SRC is a file of ``torch.save``, a safetensors file, a sharded one, or the folder of a DCP checkpoint; DST is a
``.safetensors`` file, another file (``.pt``), or, without a suffix, the folder of a DCP checkpoint.

What DST could not hold is refused by name before anything is written. DST is written under another name beside it, read
back and compared with SRC (unless ``verify`` is off), and only then takes its name. Whatever raises, Ctrl-C and SIGTERM
included, leaves what was there before, and nothing else.

What the formats do not have is lost: ties in DCP and safetensors, nesting in safetensors (names are joined by dots).
Of a DCP checkpoint and safetensors a line on stderr tells of empty dicts, which are lost, and of keys that were ints.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.filesize
import torch

import torch_ext
from torch_ext._tools.convertible import check, NAMES
from torch_ext._tools.leaves import Leaves, leaves_of
from torch_ext._tools.load import load
from torch_ext._tools.new_folder import new_folder
from torch_ext._tools.read_back import compare
from torch_ext._tools.torchscript import refuse_torchscript
from torch_ext._tools.unread import nested, open_dcp


def main(src: str, dst: str, weights_only: bool, verify: bool) -> int:
    """Convert ``src`` to ``dst``; returns the exit status."""
    try:
        with torch_ext.enable("load_lazy", "dcp_torch_reader"), _sigterm_raises():
            convert(src, dst, weights_only, verify)
    # NB: torch.distributed.checkpoint raises what is no Exception.
    except (Exception, _checkpoint_exception()) as e:
        cause = _cause(e)
        if (stop := _stop(cause)) is not None:
            raise stop from None
        print(f"torch_ext: {src}: {cause or type(cause).__name__}", file=sys.stderr)
        return 1
    print(f"{dst}: {rich.filesize.decimal(_size(Path(dst)))}")
    return 0


def convert(src: str, dst: str, weights_only: bool, verify: bool) -> None:
    """Convert ``src`` to ``dst``, while the patches are on."""
    _check_paths(src, dst)
    if os.path.exists(os.path.join(src, ".metadata")):
        _convert_dcp(src, dst, verify)
        return
    refuse_torchscript(src)
    target = _format(dst)
    if target == "pt":
        _convert_to_pt(src, dst, weights_only, verify)
    elif target == "safetensors":
        _convert_to_safetensors(src, dst, weights_only, verify)
    else:
        _convert_to_dcp(src, dst, weights_only, verify)


def _check_paths(src: str, dst: str) -> None:
    if not os.path.exists(src):
        raise FileNotFoundError("no such file or folder")
    if os.path.exists(dst) and os.path.samefile(src, dst):
        raise ValueError("Expected DST to be another file than SRC, got the same.")
    if os.path.isdir(dst) and (os.listdir(dst) or dst.endswith(".safetensors")):
        raise FileExistsError(
            f"Expected {dst} to be empty, or no folder, got files in it."
            if os.listdir(dst)
            else f"Expected {dst} to be a file, got a folder."
        )
    parent = os.path.dirname(os.path.realpath(dst))
    if not os.path.isdir(parent):
        raise FileNotFoundError(
            f"Expected the folder of DST to exist, got none of the name {parent}."
        )


def _format(dst: str) -> str:
    if dst.endswith(".safetensors"):
        return "safetensors"
    return "pt" if Path(dst).suffix and not os.path.isdir(dst) else "dcp"


def _convert_dcp(src: str, dst: str, verify: bool) -> None:
    from torch.distributed.checkpoint import _single_file as single_file  # type: ignore[attr-defined]

    target = _format(dst)
    if target == "dcp":
        raise ValueError(
            f"Expected DST to be a file, since SRC is a DCP checkpoint, got {dst}."
        )
    values = open_dcp(src)
    check(values, target)
    write = (
        single_file.save_safetensors if target == "safetensors" else single_file.save
    )
    with single_file.replacing(dst) as new:
        write(single_file.ChunkReader(src), new)
        if verify:
            old = values if target == "safetensors" else nested(src, values)
            # NB: what the pickles of a DCP checkpoint make is trusted already.
            compare(old, load(new, weights_only=False))


def _convert_to_pt(src: str, dst: str, weights_only: bool, verify: bool) -> None:
    from torch.distributed.checkpoint import _single_file as single_file  # type: ignore[attr-defined]

    loaded = load(src, weights_only)
    with single_file.replacing(dst) as new:
        torch.save(loaded, new)
        if verify:
            compare(loaded, load(new, weights_only))


def _convert_to_safetensors(
    src: str, dst: str, weights_only: bool, verify: bool
) -> None:
    from torch.distributed.checkpoint import _single_file as single_file  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.torch_save_reader import (  # type: ignore[import-not-found]
        _load as load_deferred,
    )
    from torch.distributed.checkpoint.torch_save_reader import (
        TorchSaveReader,
    )

    leaves = leaves_of(load_deferred(src, weights_only))
    check(leaves.values, "safetensors")
    reader = TorchSaveReader(src, weights_only=weights_only)
    with single_file.replacing(dst) as new:
        single_file.save_safetensors(reader, new)
        if verify:
            compare(leaves.values, load(new, weights_only))
    _tell(src, leaves, "safetensors")


def _convert_to_dcp(src: str, dst: str, weights_only: bool, verify: bool) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    loaded = load(src, weights_only)
    leaves = leaves_of(loaded)
    check(leaves.values, "dcp")
    with new_folder(dst) as new:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of one process alone
            save(loaded, checkpoint_id=new, no_dist=True)
        if verify:
            compare(leaves.values, open_dcp(new))
    _tell(src, leaves, "dcp")


def _tell(src: str, leaves: Leaves, target: str) -> None:
    for names, what in (
        (leaves.empty, "cannot hold empty dicts, and these are lost"),
        (leaves.int_keys, "has keys that are str, and those of these were int"),
    ):
        if names:
            listed = ", ".join(
                repr(n) if n else "the dict at the top" for n in names[:10]
            )
            more = ", ..." if len(names) > 10 else ""
            text = f"torch_ext: {src}: note: {NAMES[target]} {what}: {listed}{more}"
            print(text, file=sys.stderr)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises SystemExit, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checkpoint_exception() -> type[BaseException]:
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


def _cause(error: BaseException) -> BaseException:
    failures: Any = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _stop(error: BaseException | None) -> BaseException | None:
    """What stopped the command; DCP, and writers that are stopped halfway, raise errors of their own instead."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
