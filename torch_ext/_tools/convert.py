"""``python -m torch_ext convert SRC DST``: one checkpoint in another format, with no more than a tensor in memory.

SRC is a file of ``torch.save``, a safetensors file, a sharded one, or the folder of a DCP checkpoint; DST is a
``.safetensors`` file, another file (``.pt``), or, without a suffix, the folder of a DCP checkpoint. A file takes its
name when it is complete, a DCP checkpoint its ``.metadata``.

What the formats do not have is lost: ties in DCP and safetensors, nesting in safetensors (names are joined by dots),
and all that is no tensor, which safetensors refuses.
"""

import os
import sys
import warnings
from pathlib import Path

import rich.filesize
import torch

import torch_ext


def main(src: str, dst: str, weights_only: bool) -> int:
    """Convert ``src`` to ``dst``; returns the exit status."""
    try:
        with torch_ext.enable("load_lazy", "dcp_torch_reader"):
            convert(src, dst, weights_only)
    # NB: torch.distributed.checkpoint raises what is no Exception.
    except (Exception, _checkpoint_exception()) as e:
        print(f"torch_ext: {src}: {_cause(e)}", file=sys.stderr)
        return 1
    print(f"{dst}: {rich.filesize.decimal(_size(Path(dst)))}")
    return 0


def convert(src: str, dst: str, weights_only: bool) -> None:
    """Convert ``src`` to ``dst``, while the patches are on."""
    # NB: here, since the new ones are there while the patches are on.
    from torch.distributed.checkpoint import _single_file as single_file  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.checkpoint.torch_save_reader import (  # type: ignore[import-not-found]
        TorchSaveReader,
    )

    is_dcp = os.path.exists(os.path.join(src, ".metadata"))
    if not os.path.exists(src):
        raise FileNotFoundError("no such file or folder")
    if os.path.exists(dst) and os.path.samefile(src, dst):
        raise ValueError("Expected DST to be another file than SRC, got the same.")
    if os.path.isdir(dst) and os.listdir(dst):
        raise FileExistsError(
            f"Expected {dst} to be empty, or no folder, got files in it."
        )
    if dst.endswith(".safetensors"):
        reader = (
            single_file.ChunkReader(src)
            if is_dcp
            else TorchSaveReader(src, weights_only=weights_only)
        )
        single_file.save_safetensors(reader, dst)
    elif is_dcp and not _is_file(dst):
        raise ValueError(
            f"Expected DST to be a file, since SRC is a DCP checkpoint, got {dst}."
        )
    elif is_dcp:
        single_file.save(single_file.ChunkReader(src), dst)
    else:
        loaded = torch.load(
            src, map_location="cpu", weights_only=weights_only, lazy=True
        )
        if _is_file(dst):
            with single_file.replacing(dst) as new:
                torch.save(loaded, new)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of one process alone
                save(loaded, checkpoint_id=dst, no_dist=True)


def _is_file(dst: str) -> bool:
    return bool(Path(dst).suffix) and not os.path.isdir(dst)


def _checkpoint_exception() -> type[BaseException]:
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return str(cause) or type(cause).__name__


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
