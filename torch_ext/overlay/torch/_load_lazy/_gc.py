"""Pauses the garbage collector while a checkpoint's objects are made.

10,000 tensors are more objects than the collector's thresholds were made for: it runs 50 times
while they are made, once over all that ``import torch`` made, and finds nothing; that is half
of the time of a load. Law: the collector is on afterwards if, and only if, it was
before; loads in several threads count as one.
"""

import gc
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
            _pauses -= 1
            if not _pauses and _was_enabled:
                gc.enable()
