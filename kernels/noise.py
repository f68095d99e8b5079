"""Noise that decides a draw: exponential variates out of a hash of (seed, position, token id).

Shapes: B rows (one a sequence), V vocabulary.

A hash, not a generator with a state: a draw is the same on every rank, on CPU and GPU, in whatever
batch its sequence runs, and when a request is run again.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import jit, tl

_MASK = 0xFFFFFFFF
# Multipliers of lowbias32, a 32-bit hash with an avalanche bias of 0.17
# (C. Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018).
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B
# 2**32 over the golden ratio: any odd constant that keeps equal words from cancelling would do.
_WEYL = 0x9E3779B9
# Largest float32 below 1: the noise of a hash that rounds up to 1 stays finite.
_BELOW_ONE = 1.0 - 2.0**-24


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Return a hash of the low 32 bits of int64 `x`, in 0 to 2**32 - 1."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * _MULTIPLY_1) & _MASK
    x = ((x ^ (x >> 15)) * _MULTIPLY_2) & _MASK
    return x ^ (x >> 16)


def _row_keys(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return two 32-bit keys a row, from all 64 bits of the seed and 32 of the position."""
    key_B = _hash(_hash(_hash(seeds_B) + (seeds_B >> 32)) + positions_B.long() * _WEYL)
    return key_B, _hash(key_B + _WEYL)


def exponential_noise(
    seeds_B: torch.Tensor, positions_B: torch.Tensor, tokens_BV: torch.Tensor
) -> torch.Tensor:
    """Return float32 [B, V]: an exponential variate of mean 1 for each row and token id.

    Small variates decide a draw, so these are the finely spaced ones: steps of 2**-32 near 0.
    """
    first_B, second_B = _row_keys(seeds_B, positions_B)
    bits_BV = _hash(_hash(tokens_BV + first_B[:, None]) ^ second_B[:, None])
    uniform_BV = (bits_BV.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform_BV.clamp(max=_BELOW_ONE))


# What the kernels need of the above, as keyword arguments.
CONSTANTS = {
    "MULTIPLY_1": _MULTIPLY_1,
    "MULTIPLY_2": _MULTIPLY_2,
    "WEYL": _WEYL,
    "BELOW_ONE": _BELOW_ONE,
}


@jit()
def _hash_kernel(x, MULTIPLY_1: tl.constexpr, MULTIPLY_2: tl.constexpr):
    x = (x ^ (x >> 16)) * MULTIPLY_1
    x = (x ^ (x >> 15)) * MULTIPLY_2
    return x ^ (x >> 16)


@jit()
def row_keys_kernel(
    seed, position, MULTIPLY_1: tl.constexpr, MULTIPLY_2: tl.constexpr, WEYL: tl.constexpr
):
    """Return the two keys of a row, as `_row_keys`."""
    first = _hash_kernel(seed.to(tl.uint32), MULTIPLY_1, MULTIPLY_2)
    first = _hash_kernel(first + (seed >> 32).to(tl.uint32), MULTIPLY_1, MULTIPLY_2)
    first = _hash_kernel(first + position.to(tl.uint32) * WEYL, MULTIPLY_1, MULTIPLY_2)
    return first, _hash_kernel(first + WEYL, MULTIPLY_1, MULTIPLY_2)


@jit()
def log_noise_kernel(
    token,
    first,
    second,
    MULTIPLY_1: tl.constexpr,
    MULTIPLY_2: tl.constexpr,
    BELOW_ONE: tl.constexpr,
):
    """Return the logarithm of the exponential variates of token ids."""
    bits = _hash_kernel(token.to(tl.uint32) + first, MULTIPLY_1, MULTIPLY_2)
    bits = _hash_kernel(bits ^ second, MULTIPLY_1, MULTIPLY_2)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, BELOW_ONE)
    # -log(1 - u); below 1/128 by its series, whose first term left out is u**4 / 4.
    series = u * (1.0 + u * (0.5 + u * 0.3333333333))
    return tl.log(tl.where(u < 0.0078125, series, -tl.log(1.0 - u)))
