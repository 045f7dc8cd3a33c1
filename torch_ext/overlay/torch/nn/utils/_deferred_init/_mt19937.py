"""Move the state of a CPU generator ahead as if ``n`` numbers had been drawn, without drawing them.

The generator is MT19937, a linear recurrence over GF(2): its state after ``n`` steps is ``x**n mod p`` applied to its
state, where ``p`` is the generator's characteristic polynomial (Haramoto, Matsumoto, Nishimura, Panneton, L'Ecuyer,
"Efficient jump ahead for F2-linear random number generators", 2008). Polynomials are Python integers, one bit a
coefficient.

Law: :func:`advance` is drawing ``n`` times 32 bits, bit for bit. A normal number that is cached stays cached. This
reads the layout of ``torch.Generator.get_state()``, which :func:`is_supported` compares with what really happens.
"""

import functools
import sys

import torch
from torch import Tensor


_N, _M, _DEGREE = 624, 397, 19937
_LEFT, _NEXT, _STATE = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _N)

# Generating is about 2 ns a number; a jump takes some 15 ms, and some 45 ms the first time it goes that far.
_WORTH = 1 << 23


def advance(state: Tensor, n: int) -> Tensor:
    """Return the state that a CPU generator in ``state`` has after drawing ``n`` numbers of 32 bits."""
    if n >= _WORTH and is_supported():
        return jump(state, n)
    return _burn(state, n)


def _burn(state: Tensor, n: int) -> Tensor:
    generator = torch.Generator()
    generator.set_state(state)
    scratch = torch.empty(min(n, 1 << 16), dtype=torch.uint8)
    while n > 0:
        scratch[: min(n, len(scratch))].random_(generator=generator)
        n -= len(scratch)
    return generator.get_state()


@functools.lru_cache(1)
def is_supported() -> bool:
    """Whether :func:`jump` knows the generator of this build of torch."""
    if sys.byteorder != "little":
        return False
    state = torch.Generator().manual_seed(20240229).get_state()
    if state.numel() < _STATE.stop:
        return False
    return all(torch.equal(jump(state, n), _burn(state, n)) for n in (1, 624, 1000))


def jump(state: Tensor, n: int) -> Tensor:
    """As :func:`advance`, whatever it costs."""
    left = int(state[_LEFT].view(torch.int32))
    # How many numbers of the current block of 624 are used up; a fresh generator makes its first block when asked.
    used = _N if left == 1 else int(state[_NEXT].view(torch.int64))
    blocks, used = divmod(used + n, _N)
    if used == 0 and blocks > 0:
        blocks, used = blocks - 1, _N
    words = state[_STATE].view(torch.int64)
    new = state.clone()
    if blocks:
        # NB: the first word of a seeded state is none of the sequence, but for its highest bit.
        words = _apply(_power((blocks - 1) * _N), _following(words))
        new[_STATE].view(torch.int64).copy_(words)
    new[_LEFT].view(torch.int32).fill_(1 if used == _N else _N - used + 1)
    new[_NEXT].view(torch.int64).fill_(used)
    return new


def _following(words: Tensor) -> Tensor:
    """The block of 624 words that MT19937 makes from the one before."""
    new = words.clone()

    def twist(at: slice, low: Tensor, far: Tensor) -> None:
        mixed = (new[at] & 0x80000000) | (low & 0x7FFFFFFF)
        new[at] = far ^ (mixed >> 1) ^ ((mixed & 1) * 0x9908B0DF)

    # NB: in place, in steps that read only what the steps before have written.
    step = _N - _M
    twist(slice(0, step), new[1 : step + 1], new[_M:].clone())
    for start in range(step, _N - 1, step):
        end = min(start + step, _N - 1)
        at = slice(start, end)
        twist(at, new[start + 1 : end + 1], new[start - step : end - step].clone())
    twist(slice(_N - 1, _N), new[:1], new[_M - 1 : _M].clone())
    return new


def _apply(polynomial: int, words: Tensor) -> Tensor:
    """The state whose words are the sums of those that ``polynomial`` picks from the sequence behind ``words``."""
    blocks = [words]
    for _ in range(_DEGREE // _N + 2):
        blocks.append(_following(blocks[-1]))
    windows = torch.cat(blocks).to(torch.int32).unfold(0, _N, 1)
    bits = bytearray(polynomial.to_bytes(_DEGREE // 8 + 1, "little"))
    octets = torch.frombuffer(bits, dtype=torch.uint8).unsqueeze(1)
    picked = ((octets >> torch.arange(8)) & 1).flatten().nonzero().flatten()
    total = torch.zeros(_N, dtype=torch.int32)
    for some in picked.split(48):  # few enough that no other threads are asked to help
        rows = windows[some]
        while len(rows) > 1:
            half = len(rows) // 2
            rows[:half] ^= rows[-half:]
            rows = rows[: len(rows) - half]
        total ^= rows[0]
    return total.to(torch.int64) & 0xFFFFFFFF


@functools.lru_cache(64)
def _power(n: int) -> int:
    """``x**n`` modulo the characteristic polynomial."""
    result = 1
    for bit in f"{n:b}":
        # Squaring over GF(2) puts a zero between the coefficients: base 2 read as base 4.
        result = _reduce(int(f"{result:b}", 4))
        if bit == "1":
            result = _reduce(result << 1)
    return result


def _reduce(value: int) -> int:
    """``value`` modulo the characteristic polynomial."""
    # What is above the degree is folded down at once, by each term of the polynomial's remainder.
    mask = (1 << _DEGREE) - 1
    while high := value >> _DEGREE:
        value &= mask
        for term in _terms():
            value ^= high << term
    return value


@functools.lru_cache(1)
def _terms() -> tuple[int, ...]:
    """Exponents of the characteristic polynomial below its degree: 134, the largest of them 19314."""
    bits = _low_bits(2 * _DEGREE + 64)
    # Berlekamp-Massey over one bit of the sequence; `seen` has the newest bit lowest.
    connection, before, length, shift, seen = 1, 1, 0, 1, 0
    for position, bit in enumerate(bits):
        seen = (seen << 1) | bit
        if (seen & connection).bit_count() & 1:
            changed = connection ^ (before << shift)
            if 2 * length <= position:
                length, before, shift = position + 1 - length, connection, 0
            connection = changed
        shift += 1
    text = f"{connection:0{_DEGREE + 1}b}"  # the connection polynomial is the reciprocal one
    return tuple(i for i, c in enumerate(text) if c == "1" and i < _DEGREE)


def _low_bits(n: int) -> list[int]:
    generator = torch.Generator().manual_seed(5489)
    words = generator.get_state()[_STATE].view(torch.int64)
    bits: list[int] = []
    words = _following(words)
    while len(bits) < n:
        words = _following(words)
        bits += (words & 1).tolist()
    return bits[:n]
