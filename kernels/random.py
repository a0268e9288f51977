"""Random numbers that are a pure function of a seed and of integer counters.

A sampled negative must not depend on how many ranks share the batch, on the device, or on what was
drawn before it.  So there is no generator with a state: the number for (anchor i, positive p,
negative j) is a hash of (seed, i, p, j), the three being row numbers in the global batch.

    mix(x)        x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    (mod 2^32) absorb(h, c)  mix(((h xor c) + 0x9e3779b9) mod 2^32)
    h             absorb 0 with the seed's low word, then its high word, then each counter in turn
    v             min(float32(max(h, 1)) · 2^-32, 1 - 2^-24)
    gumbel        -log(-log(1 - v))

The two multipliers are those of "lowbias32" (C. Wellons, hash-prospector, public domain).  Hash and
v have the same bits on every device: integers only, then one rounding to float32 and a product with
a power of two. v is densest near 0, where the largest Gumbel values come from, so ties stay rare
with millions of candidates. The logarithms may differ between devices in their last bit; that moves
a draw only where two keys nearly tie. The hash spreads bits; it is no cipher, and two (i, p) pairs
share their numbers with probability 2^-32. In Triton the same lines are plain uint32 arithmetic.
torch has no unsigned 32-bit product; here int32 does it, whose sums and products wrap to the same
bits, and a mask after each shift clears the copies of the sign.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _signed(word: int) -> int:
    """The int32 with the same bits as the low word of an integer."""
    word &= _WORD
    return word - 2**32 if word >= 2**31 else word


# 2^32 divided by the golden ratio: keeps an all-zero input away from mix's fixed point 0.
_STEP = _signed(0x9E3779B9)
_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)


def _mix_(x: Tensor) -> Tensor:
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _absorb(state: Tensor, counter: Tensor) -> Tensor:
    return _mix_((state ^ counter).add_(_STEP))


def _hash(seed: int, *counters: Tensor) -> Tensor:
    """`hash_counters` as int32 with the same bits."""
    state = torch.zeros((), dtype=torch.int32, device=counters[0].device)
    state = _absorb(state, torch.full_like(state, _signed(seed)))
    state = _absorb(state, torch.full_like(state, _signed(seed >> 32)))
    for counter in counters:
        state = _absorb(state, counter.to(torch.int32))
    return state


def hash_counters(seed: int, *counters: Tensor) -> Tensor:
    """32-bit hash of a seed and any number of integer tensors, which broadcast.

    seed: its low 64 bits count.  counters: int64, low 32 bits count; at least one.
    Returns int64 in [0, 2^32) of the broadcast shape.  Memory: a few int64 tensors of that shape.
    """
    return _hash(seed, *counters).to(torch.int64).bitwise_and_(_WORD)


def _unit_interval(hashed: Tensor) -> Tensor:
    # One rounding to float32; values next to 2^32 round up to it and would make 1 - v zero.
    return (hashed.to(torch.float32) * 2.0**-32).clamp_(2.0**-32, 1.0 - 2.0**-24)


def uniform(seed: int, *counters: Tensor) -> Tensor:
    """Uniform float32 in [2^-32, 1 - 2^-24], bit for bit the same on every device; arguments as
    above."""
    return _unit_interval(hash_counters(seed, *counters))


def exponential(seed: int, *counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-log(1 - v), whose negative logarithm is `gumbel` of the same arguments; at least 2^-32."""
    unit = _unit_interval(_hash(seed, *counters).view(torch.uint32))
    return unit.to(dtype).neg_().log1p_().neg_()


def gumbel(seed: int, *counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel values, always finite; the logarithms run in `dtype` (float32 or float64)."""
    return -torch.log(-torch.log1p(-uniform(seed, *counters).to(dtype)))
