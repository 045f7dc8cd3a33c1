"""What a call of torch.load asks for: its arguments, as torch.load understands them.

Law: the arguments, the environment and the surroundings are judged as ``torch.load`` does it;
what they ask for that is not lazy is left to it.
"""

import os
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch._load_lazy._modes import has_dispatch_modes
from torch._load_lazy._places import carrying
from torch._load_lazy._sniff import BEGINNING, describe
from torch.serialization import (
    _check_dill_version,
    _default_to_weights_only,
    _is_path,
    _serialization_tls,
    get_default_mmap_options,
)


_MAP_PRIVATE = 2  # as in torch.utils.serialization.config, on any system


class NotLazy(Exception):
    """Says that a file has to be read whole, to who would rather do something else."""


@dataclass(frozen=True)
class Request:
    """The arguments of one call, ``weights_only`` decided. See :func:`torch.load`.

    ``lazy_only`` asks for :class:`NotLazy` instead of a file that is read whole.
    """

    f: Any
    map_location: Any
    pickle_module: ModuleType | None
    weights_only: bool
    mmap: bool | None
    pickle_load_args: dict[str, Any]
    lazy_only: bool = False

    @property
    def is_path(self) -> bool:
        """Whether ``f`` is a path."""
        return _is_path(self.f) or isinstance(self.f, bytes)

    @property
    def is_plain(self) -> bool:
        """Whether the file's pickles are Python's, and no argument changes their meaning."""
        # NB: encoding and errors are for strings of Python 2, which no inert reader knows.
        return self.pickle_module in (None, pickle) and not (
            self.pickle_load_args.keys() - {"encoding", "errors"}
        )

    def of(self, path: str) -> "Request":
        """Returns the same request of another file."""
        return replace(self, f=path)

    def eager(self) -> Any:
        """Returns what torch.load makes of the file, all of it read."""
        map_location = self.map_location
        return torch.load(
            os.fsdecode(self.f) if self.is_path else self.f,
            carrying(map_location) if callable(map_location) else map_location,
            self.pickle_module,
            weights_only=self.weights_only,
            mmap=bool(self.mmap),
            **self.pickle_load_args,
        )


_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # NB: a Path has one slash of two
_MAX_PATH = 4096  # bytes; Linux takes no longer one


def check_path(f: Any) -> None:
    """Raises if ``f`` is no path, though its type is that of one."""
    if isinstance(f, bytes) and (
        b"\0" in f or len(f) > _MAX_PATH or describe(f[:BEGINNING]) is not None
    ):
        raise ValueError(
            f"Expected f to be a path or a file object, got {len(f)} bytes that are no path. "
            "(Did you mean io.BytesIO(f)?)"
        )
    if _is_path(f) and _URL.match(os.fspath(f)) and not os.path.exists(f):
        raise ValueError(
            f"Expected f to be a path or a file object, got the URL {os.fspath(f)!r}. Open it as a file, for example "
            "with fsspec: `with fsspec.open(url) as f: torch.load(f, lazy=True)`."
        )


def request(
    f: Any,
    map_location: Any,
    pickle_module: ModuleType | None,
    weights_only: bool | None,
    mmap: bool | None,
    pickle_load_args: dict[str, Any],
) -> Request:
    """Returns the request that torch.load's arguments make, or raises as torch.load does."""
    chosen = _weights_only(weights_only, pickle_module)
    if chosen and pickle_load_args:
        warnings.warn(
            "pickle_load_args only works if `weights_only=False`.", stacklevel=4
        )
    _check_dill_version(pickle_module)
    if not chosen and pickle_module is None:
        pickle_module = pickle
    if mmap and get_default_mmap_options() not in (None, _MAP_PRIVATE):
        raise ValueError(
            "Expected set_default_mmap_options to be MAP_PRIVATE with lazy=True, got "
            "MAP_SHARED. (Did you mean to load without lazy=True?)"
        )
    return Request(f, map_location, pickle_module, chosen, mmap, pickle_load_args)


def _weights_only(weights_only: bool | None, pickle_module: ModuleType | None) -> bool:
    given = weights_only is not None
    chosen = bool(weights_only) if given else _default_to_weights_only(pickle_module)
    force, force_no = (
        os.getenv(name, "0").lower() in ("1", "y", "yes", "true")
        for name in (
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
        )
    )
    if force and force_no:
        raise RuntimeError(
            "Only one of `TORCH_FORCE_WEIGHTS_ONLY_LOAD` or "
            "`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` should be set, but both were set."
        )
    if force:
        chosen = True
    elif force_no and not given:
        warnings.warn(
            "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected, since the"
            "`weights_only` argument was not explicitly passed to `torch.load`, "
            "forcing weights_only=False.",
            stacklevel=5,
        )
        chosen = False
    if chosen and pickle_module is not None:
        raise RuntimeError(
            "Can not safely load weights when explicit pickle_module is specified"
        )
    return chosen


def is_ordinary() -> bool:
    """Whether nothing in force asks torch for other tensors than plain ones."""
    return not (
        torch.is_inference_mode_enabled()
        or _serialization_tls.skip_data
        or has_dispatch_modes()
        or torch._guards.detect_fake_mode(None) is not None
    )
