"""What cache_write computes, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsa_kernels.cache_write import Rope
from dsa_kernels.testing import make_cos_sin_cache

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative error of one rounding
EPS = 1e-6


def make_rope(max_position: int, interleaved: bool) -> Rope:
    return Rope(make_cos_sin_cache(max_position), interleaved)


def rope_truth(x: Tensor, positions: Tensor, interleaved: bool, theta: float = 1e4) -> Tensor:
    """RoFormer in fp64: each pair is a complex number, turned by position * frequency."""
    x = x.double()
    angle = positions.double()[:, None] * theta ** -(torch.arange(32).double() / 32)
    turn = torch.polar(torch.ones_like(angle), angle).view(-1, *(1,) * (x.dim() - 2), 32)
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (32, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)
    turned = torch.complex(x[..., :32], x[..., 32:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def latent_truth(kv: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    nope = kv[:, :512].double()
    nope = nope / (nope.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return torch.cat((nope, rope_truth(kv[:, 512:], positions, interleaved=True)), -1)


def norm_truth(k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    k = k.double()
    k = k - k.mean(-1, keepdim=True)
    return k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double()


def index_truth(k: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return torch.cat((rope_truth(k[..., :64], positions, interleaved), k[..., 64:].double()), -1)


def hadamard_truth() -> Tensor:
    """H[i, j] = (-1)^popcount(i & j)."""
    signs = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(128)] for i in range(128)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(128)
