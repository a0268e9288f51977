"""The counter-based random numbers of ../random.py in Triton: the same bits for the same seed and
counters.

A hash is built up counter by counter (`absorb`), so a tile of pairs shares what its rows have in
common.
"""

import triton
import triton.language as tl

STEP = tl.constexpr(0x9E3779B9)
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B)
LARGEST = tl.constexpr(1.0 - 2.0**-24)


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed, as signed 32-bit integers: in this form Triton gives every seed
    one type."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit
def absorb(state, counter):
    """The hash `state`, uint32, with one more counter in it; of the counter the low 32 bits
    count."""
    x = (state ^ counter.to(tl.uint32)) + STEP
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 16)


@triton.jit
def seeded(low, high):
    """The hash of a seed alone, from its `seed_words`."""
    return absorb(absorb(tl.full((), 0, tl.uint32), low), high)


@triton.jit
def uniform(state):
    """A hash as a float32 in [2^-32, 1 - 2^-24]."""
    # One rounding to float32; values next to 2^32 round up to it and would make 1 - v zero.
    return tl.minimum(tl.maximum(state, 1).to(tl.float32) * 2.0**-32, LARGEST)


@triton.jit
def exponential(v):
    """-log(1 - v), accurate for small v too; its negative logarithm is Gumbel noise."""
    rest = 1.0 - v
    # log(rest) / (rest - 1) is smooth at 1, so that the rounding of `rest` cancels in it (W.
    # Kahan's log1p).
    return tl.where(rest == 1.0, v, tl.log(rest) * v / (rest - 1.0))
