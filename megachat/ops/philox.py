"""The one place for counter-based random numbers: any number of any stream, in any order.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): ten rounds of
multiplications turn a 128-bit counter under a 64-bit key into four random 32-bit words. A number
is named by what it is for, so it does not matter who computes it, when, or beside which others.
"""

import torch
from torch import Tensor

GROUP_TOKENS = 128
"""Neighbouring tokens whose draws share a stream; the kernels count on it."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_words(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random words.

    Args:
        key: Two tensors of 32-bit words in int64, broadcastable to the counter's shape.
        counter: Four tensors of 32-bit words in int64, broadcastable to one shape.

    Returns:
        Four int64 tensors of that shape, uniform in [0, 2**32).
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # A product may pass 2**63, but two's complement keeps both of its halves' bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(
    keys: Tensor, *, positions: Tensor, stream: int | Tensor, first: int, count: int
) -> Tensor:
    """A stretch of each row's stream.

    Args:
        keys: `[rows]` int64, any 64 bits.
        positions: `[rows]` int64 in [0, 2**32), which part of the row's randomness is wanted.
        stream: Number of the stream within that, in [0, 2**32); or `[rows]` int64 of them.
        first: Index of the first wanted number in the stream.
        count: How many.

    Returns:
        `[rows, count]` float64 in the open interval (0, 1), multiples of 2**-33.
    """
    start = first // 4
    blocks = torch.arange(start, -(-(first + count) // 4), device=keys.device)[None]
    zero = torch.zeros_like(keys)
    words = philox_words(
        (keys[:, None] & _LOW, (keys[:, None] >> 32) & _LOW),
        (blocks, (zero + stream)[:, None], positions[:, None], zero[:, None]),
    )
    skip = first - 4 * start
    numbers = torch.stack(words, dim=2).flatten(1)[:, skip : skip + count]
    return (numbers.double() + 0.5) * 2.0**-32
