"""What a file is that is no checkpoint: the error can then say what to do.

Only its first bytes are looked at. Law: a file that some reader of this package takes is never judged here.
"""

from typing import NamedTuple


BEGINNING = 512  # bytes that are enough for describe()


class Description(NamedTuple):
    """What a file is, and what to do about it."""

    kind: str
    remedy: str


_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
_OTHERS = {
    b"GGUF": ("a GGUF file", "Load it with the gguf package."),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", "Load it with h5py."),
    b"\x93NUMPY": ("a NumPy array", "Load it with numpy.load."),
    b"version https://git-lfs.github.com/spec/": (
        "a Git LFS pointer",
        "Fetch the file that it stands for with `git lfs pull`.",
    ),
}
_PAGES = (b"<!doctype html", b"<html", b"<?xml")


def describe(beginning: bytes) -> Description | None:
    """Returns what a file with this beginning is, or None if that is not known.

    Args:
        beginning: the first bytes of the file, :data:`BEGINNING` of them if it has so many
    """
    for magic, (name, command) in _COMPRESSED.items():
        if beginning.startswith(magic):
            remedy = f"Decompress it first, for example with {command}."
            return Description(f"data compressed with {name}", remedy)
    for magic, (kind, remedy) in _OTHERS.items():
        if beginning.startswith(magic):
            return Description(kind, remedy)
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        remedy = "Was an error or login page saved in place of the file?"
        return Description("an HTML or XML page", remedy)
    if len(beginning) >= 16 and not any(beginning):
        remedy = "Was the download or the copy interrupted?"
        return Description(f"{len(beginning)} zeros", remedy)
    return None
