"""Which state of its generator each recorded random op has to start from, while nothing is drawn.

Law: the op at position ``k`` draws what it draws in eager construction, whatever else is run, in whatever order, or
never; and once :meth:`Stream.sync` was called the generator is where eager construction would have it. Draws that
nobody wants cost nothing where their number is known (``_mt19937.py`` jumps over them); otherwise they are drawn into
scratch memory.

Recording leaves a mark in the generator (Note [Mark]). So inside of the context its state has to be asked for with
``torch.get_rng_state``, ``torch.initial_seed`` or ``torch.random.fork_rng``, not with
``torch.default_generator.get_state()``. Generators that are passed to an op are no part of this: they are moved ahead
at once.
"""

import bisect
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils._deferred_init import _mt19937
from torch.nn.utils._deferred_init._slot import Ref
from torch.utils._python_dispatch import _disable_current_modes


# Note [Mark]
# A random op that is recorded does not move the generator, so that a user who moves it (manual_seed, set_rng_state,
# the end of fork_rng) cannot be told from one who does not, least of all if it is moved back to where it is. With the
# first recorded op the generator is therefore seeded with a number that nobody else has. As long as it has that seed,
# nobody has touched it. The state that it had is kept, and put back when recording ends.
#
# NB: an op that reaches the generator behind the modes' back (a scripted function) draws from the marked generator.


@contextmanager
def reality() -> Iterator[None]:
    """Run ops for real: no mode, no autograd, and nothing that was recorded, interferes."""
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C._DisableAutocast(),
    ):
        yield


_STRIDE = 256  # draws from one state that is kept to the next


class Stream:
    """The random ops that draw from one default generator, in program order."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._draws: list[Any] = []  # how many numbers of 32 bits, or a Node
        self._known: dict[int, Tensor] = {}  # state before the draw at a position
        self._positions: list[int] = []  # sorted keys of _known
        self._found_at: set[int] = set()  # those where somebody had moved the generator
        self._here: tuple[int, Tensor] | None = None  # a state that need not be kept
        self._mark: int | None = None
        self._found: Tensor | None = None  # state before the first draw
        self._left: Tensor | None = None  # state after the last, if that is known

    def add(self, draw: Any) -> int:
        """Record a draw; return its position."""
        if not self._is_marked():
            state = self.generator.get_state()
            self._found_at.add(len(self._draws))
            self._keep(len(self._draws), state, found=True)
            if self._found is None:
                self._found = state
            self._mark = int.from_bytes(os.urandom(7), "little")
            self.generator.manual_seed(self._mark)
        self._draws.append(draw)
        return len(self._draws) - 1

    def sync(self) -> None:
        """Put the generator where eager construction would have it at this point of the program."""
        if self._is_marked():
            self.generator.set_state(self.before(len(self._draws)))
            self._mark = None

    def suspend(self) -> None:
        """Put the generator back to where it was found: recording ends."""
        self._left = None if self._is_marked() else self.generator.get_state()
        self._mark = None
        if self._found is not None:
            self.generator.set_state(self._found)

    def finish(self) -> None:
        """Put the generator where eager construction leaves it, unless somebody has moved it since recording ended."""
        if self._found is None:
            return
        if torch.equal(self.generator.get_state(), self._found):
            left = self._left
            self.generator.set_state(
                self.before(len(self._draws)) if left is None else left
            )
        self._found = None

    def before(self, position: int) -> Tensor:
        """The generator's state before the draw at ``position``."""
        at = bisect.bisect_right(self._positions, position) - 1
        start = self._positions[at]
        state = self._known[start]
        if self._here is not None and start < self._here[0] <= position:
            start, state = self._here
        ahead = 0
        for i in range(start, position):
            draw = self._draws[i]
            if isinstance(draw, int):
                ahead += draw
                if i % _STRIDE or i + 1 == position:
                    continue
            state = _mt19937.advance(state, ahead) if ahead else state
            ahead = 0
            if not isinstance(draw, int):
                after = self._known.get(i + 1)
                state = draw.draw_after(state) if after is None else after
            self._keep(i + 1, state)
        state = _mt19937.advance(state, ahead) if ahead else state
        self._here = (position, state)
        return state

    def run(self, position: int, call: Callable[[torch.Generator], Any]) -> Any:
        """Call ``call`` with a generator that is where it has to be for the draw at ``position``."""
        generator = torch.Generator(self.generator.device)
        generator.set_state(self.before(position))
        result = call(generator)
        after = generator.get_state()
        if not isinstance(self._draws[position], int):
            self._keep(position + 1, after)
        self._here = (position + 1, after)
        return result

    def _is_marked(self) -> bool:
        return self._mark is not None and self.generator.initial_seed() == self._mark

    def _keep(self, position: int, state: Tensor, found: bool = False) -> None:
        if position not in self._known:
            bisect.insort(self._positions, position)
        elif position in self._found_at and not found:
            return  # this is the state after the draw before, which nobody starts from
        self._known[position] = state


@contextmanager
def default_state(generator: torch.Generator) -> Iterator[None]:
    """Let ops that take no generator draw from ``generator``, and move it."""
    default = default_generator(generator.device)
    before = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(default.get_state())
        default.set_state(before)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator of ops on ``device``; that of the CPU for a device that this machine does not have."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


# Ops that fill a contiguous tensor on the CPU by drawing as uniform_ or as normal_ does.
_LIKE = {
    "uniform_": "uniform_",
    "kaiming_uniform_": "uniform_",
    "rand": "uniform_",
    "normal_": "normal_",
    "randn": "normal_",
}


def count(name: str, ref: Ref) -> int | None:
    """How many numbers of 32 bits the op ``name`` draws to fill ``ref``; None if only doing it can tell."""
    like = _LIKE.get(name)
    if like is None or ref.slot.device.type != "cpu":
        return None
    n = ref.numel()
    if not (_is_counted(like, ref.dtype) and ref.contiguous):
        return None
    # NB: for less than 16 elements normal_ goes another way, on which it may keep a number for the next time.
    return None if like == "normal_" and n < 16 else _count(like, ref.dtype, n)


def _count(like: str, dtype: torch.dtype, n: int) -> int:
    # normal_ fills blocks of 16 numbers; of a block that is not full either all or (float16, bfloat16) the rest
    # is drawn anew.
    if like == "normal_" and n % 16:
        n = n + 16 if dtype.itemsize > 2 else n + 16 - n % 16
    return 2 * n if dtype == torch.float64 else n


@functools.lru_cache
def _is_counted(like: str, dtype: torch.dtype) -> bool:
    """Whether this build of torch draws as :func:`_count` says."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return False
    with reality():
        generator = torch.Generator().manual_seed(7)
        state = generator.get_state()
        for n in (16, 40):
            getattr(torch.empty(n, dtype=dtype), like)(generator=generator)
            state = _mt19937.advance(state, _count(like, dtype, n))
            if not torch.equal(generator.get_state(), state):
                return False
    return True
