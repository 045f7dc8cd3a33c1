"""Reads the tensors of a pickle many at a time. See Note [Rows].

``match_rows`` takes the run of tensors that starts at a place of the pickle, if there is
one. Law: the instructions that it takes mean what ``Rows`` says of them, nothing else.

Not here: the places where torch.save writes a tensor in another way (the first one,
Parameters, new dtypes); the inert reader reads these one instruction at a time.
"""

import re
import sys
from array import array
from itertools import islice
from operator import itemgetter


# Note [Rows]
# ~~~~~~~~~~~
# After its first tensor torch.save writes each one as
#
#     [name PUT] GET(_rebuild_tensor_v2) ( ( GET("storage") GET(type) key PUT
#     GET(location) numel t PUT Q offset size PUT stride PUT requires_grad
#     GET(OrderedDict) ) R PUT t PUT R PUT
#
# (in legacy files, N after numel) with nothing in between, so that a run of them is read
# by matching. The first byte of an instruction tells its length, but for strings, whose
# lengths are checked here: the pattern can match in one way only, the one in which an
# unpickler reads it. All bytes but name, key and PUTs are the same for all tensors of one
# kind: they are the row's kind, looked at once. Of a row's PUTs the last one is checked,
# and only those of name, key and tensor are kept: torch.save never refers to the others.
# (A file that rebinds there what it refers to later is read as if it did not.)
_GET = rb"(?:h.|j....)"
_PUT = rb"(?:r....|q.)"
_INT = rb"(?:K.|M..|J....)"
_INTS = rb"(?:\)|%b(?:\x85|%b(?:\x86|%b\x87))|\((?:%b){4,64}t)" % ((_INT,) * 4)
_ROW = re.compile(
    rb"(?:X(.)\0\0\0([\w.]+)" + _PUT + rb")?"
    rb"(" + _GET + rb"\(\(" + _GET + _GET + rb")"
    rb"X(.)\0\0\0(\d+)" + _PUT + rb"(" + _GET + _INT + rb"N?)t" + _PUT + rb"Q"
    rb"(" + _INT + _INTS + rb")(?:" + _PUT + rb")?(" + _INTS + rb")(?:" + _PUT + rb")?"
    rb"([\x88\x89]" + _GET + rb")\)R" + _PUT + rb"t" + _PUT + rb"R(?:r(....)|q(.))",
    re.DOTALL,
)
_NAME_LENGTH, _NAME, _KEY_LENGTH, _KEY = map(itemgetter, (0, 1, 3, 4))
_LONG_PUT, _SHORT_PUT = map(itemgetter, (9, 10))
_KIND = itemgetter(2, 5, 6, 7, 8)

# NB: rows are read this many at a time, so that what they leave is freed before the
# garbage collector sees it, and is still in the cache when it is looked at.
_AT_ONCE = 256

Kind = tuple[bytes, ...]


class Rows:
    """A run of tensors.

    Attributes:
        names: of each row, "" where it has none
        keys: of its storage
        kinds: instructions that tell all the rest
        indices: of the tensor in the memo
        end: where the run ends in the pickle
    """

    def __init__(self, matches: list[re.Match[bytes]]) -> None:
        groups = [match.groups(b"") for match in matches]
        # NB: no name and no key holds a line's end.
        self.names = b"\n".join(map(_NAME, groups)).decode("ascii").split("\n")
        self.keys = b"\n".join(map(_KEY, groups)).decode("ascii").split("\n")
        self.kinds: list[Kind] = list(map(_KIND, groups))
        # Indices of one byte come before those of four.
        indices = array("I", b"".join(map(_LONG_PUT, groups)))
        if sys.byteorder == "big":
            indices.byteswap()
        self.indices = [*b"".join(map(_SHORT_PUT, groups)), *indices]
        self.end = matches[-1].end()
        lengths = bytes(filter(None, map(len, self.names)))
        if b"".join(map(_NAME_LENGTH, groups)) != lengths:
            raise ValueError("a name has another length than it says")
        if b"".join(map(_KEY_LENGTH, groups)) != bytes(map(len, self.keys)):
            raise ValueError("a key has another length than it says")


def match_rows(pickle: bytes, start: int) -> Rows | None:
    """Returns the run of tensors that starts at ``start``."""
    # NB: a scanner matches at once where the match before has ended, and nowhere else.
    scanner = _ROW.scanner(pickle, start)  # type: ignore[attr-defined]
    matches = list(islice(iter(scanner.match, None), _AT_ONCE))
    return Rows(matches) if matches else None
