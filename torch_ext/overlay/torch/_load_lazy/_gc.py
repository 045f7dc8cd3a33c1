"""Pauses the garbage collector while a checkpoint's objects are made.

10,000 tensors are more objects than the collector's thresholds were made for: it runs 50 times
while they are made, once over all that ``import torch`` made, and finds nothing; that is half
of the time of a load. Law: the collector is on afterwards if, and only if, it was
before; loads in several threads count as one, and none goes on in a forked process.
"""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextmanager
def paused_gc() -> Iterator[None]:
    """Context in which no garbage collection starts."""
    global _pauses, _was_enabled
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= bool(_pauses)  # which a fork in between has set to 0
            if not _pauses and _was_enabled:
                gc.enable()


def _resume() -> None:
    # NB: the threads that would end their pauses are not in a forked process.
    global _lock, _pauses
    _lock = threading.Lock()
    if _pauses and _was_enabled:
        gc.enable()
    _pauses = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume)
