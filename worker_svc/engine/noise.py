"""Noise that is a function of its key: the same on any device, in any batch, in any order of evaluation.

The key is (seed, output position, token id), hashed by the splitmix64 finaliser (Steele, Lea and Flood, 2014)
in torch's wrapping 64-bit integers. Gumbel noise g = -log(-log u) turns a choice into an argmax: argmax(log p
+ g) has distribution p (the Gumbel-max trick). Draft and target that use the same noise tend to choose the
same token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_GAMMA_POSITION = _signed(0xD1B54A32D192ED03)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the hash needs zeros from the left.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def seed_to_int64(seed: int) -> int:
    """Maps any integer in the accepted range to the int64 with the same low 64 bits."""
    return _signed(seed)


def gumbel(seeds: Tensor, positions: Tensor, vocabulary_size: int) -> Tensor:
    """Standard Gumbel noise for every token.

    seeds: int64 [R]. positions: int64 [R, Q], index of the output token that is chosen. Returns float64 [R,
    Q, V].
    """
    tokens = torch.arange(vocabulary_size, device=seeds.device, dtype=torch.int64)
    stream = _mix(_mix(seeds + _GAMMA)[:, None] + positions * _GAMMA_POSITION)
    bits = _mix(stream[:, :, None] + (tokens + 1) * _GAMMA)
    # 53 bits, shifted by half a step, so that u is never 0 nor 1.
    uniform = (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()
