"""CRC32 of one range from those of its parts, so that several threads can share one large record.

A CRC32 is a polynomial over two elements, modulo a fixed one, bits in reverse; bytes appended to the first part are a
multiplication by a power of x (Mark Adler's crc32_combine in zlib, which Python does not give access to).
"""

from functools import lru_cache


_MODULUS = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def combine(first: int, second: int, size: int) -> int:
    """Return the CRC32 of two ranges, one behind the other.

    Args:
        first: CRC32 of the first range
        second: CRC32 of the second range
        size: of the second range, in bytes
    """
    return _multiply(_x_to_the(8 * size), first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_MODULUS if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _x_to_the(power: int) -> int:
    result, square = _ONE, _X
    while power:
        if power & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        power >>= 1
    return result
