"""Locks that a forked process makes anew: the threads that held them are not in it.

Law: no thread holds two locks of one pool, so that none waits for another in a circle.
"""

import os
import threading
from itertools import count


_COUNT = 64


class Pool:
    """A few locks for any number of owners."""

    def __init__(self) -> None:
        self._tickets = count()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def ticket(self) -> int:
        """Returns what gets the same lock each time, and shares it with few others."""
        return next(self._tickets) % _COUNT

    def __getitem__(self, ticket: int) -> threading.RLock:
        return self._locks[ticket]

    def _renew(self) -> None:
        self._locks = [threading.RLock() for _ in range(_COUNT)]
