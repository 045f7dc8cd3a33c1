"""A folder that takes its name when it is complete, as ``replacing`` does it for a file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Context with the path of a new folder, which takes the name ``path`` if nothing raises.

    Args:
        path: where no folder is, or an empty one, whose permissions it gets
    """
    target = os.path.realpath(path)
    parent, name = os.path.split(target)
    mode = _mode(target)
    new = tempfile.mkdtemp(prefix=f"{name}.", dir=parent)
    try:
        yield new
        os.chmod(new, mode)
        os.rename(new, target)  # also onto an empty folder
        _sync(parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _mode(target: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(target).st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
