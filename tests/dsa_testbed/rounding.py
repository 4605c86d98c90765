"""The reference with fp8 caches: it rounds where the plugin's fp8 caches round, and nowhere else.

Written from the layouts' definitions, without the plugin's code.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

_E4M3_MAX = 448.0


class Fp8Cache(DynamicCache):  # type: ignore[misc]  # transformers is Any to mypy
    """transformers' cache of a DSA model, holding what the fp8 layouts can hold."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._keys = _PairedKeys if config.model_type == "glm_moe_dsa" else _Keys

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, S, 512] in e4m3, a power-of-two scale for each 128; RoPE in bf16."""
        groups = key_states.unflatten(-1, (4, 128))
        latent = _e4m3(groups, (_amax(groups) / _E4M3_MAX).clamp(min=1e-4)).flatten(-2)
        rope = value_states.bfloat16().to(value_states.dtype)
        pair: tuple[Tensor, Tensor] = super().update(latent, rope, layer_idx, *args, **kwargs)
        return pair

    def update_indexer(self, key_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Index keys [B, S, 128], rotated, in e4m3 with a power-of-two scale for each token."""
        keys = super().update_indexer(self._keys.rounded(key_states), layer_idx, *args, **kwargs)
        return keys.as_subclass(self._keys)


class _Keys(Tensor):
    """Index keys that round the queries they are multiplied with, as the indexer's fp8 does."""

    @classmethod
    def rounded(cls, x: Tensor) -> Tensor:
        """Index queries or keys [..., 128] as the fp8 cache and scores see them."""
        return _rotated_e4m3(x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and not isinstance(args[0], _Keys):
            dots = torch.matmul(cls.rounded(args[0]), args[1].as_subclass(Tensor))
            # indexer_logits on a CPU: each head's dot product is rounded to bf16.
            return dots.bfloat16().float()
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _PairedKeys(_Keys):
    """Of an interleaved indexer: transformers leaves rotated pairs as halves, the cache as pairs.

    Scores do not depend on the order; what the Hadamard rotation makes of a key, and so its
    rounding, does.
    """

    @classmethod
    def rounded(cls, x: Tensor) -> Tensor:
        pairs = x[..., :64].unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2)
        back = _rotated_e4m3(torch.cat((pairs, x[..., 64:]), -1))
        halves = back[..., :64].unflatten(-1, (32, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat((halves, back[..., 64:]), -1)


def _rotated_e4m3(x: Tensor) -> Tensor:
    """Round in the Hadamard-rotated space and rotate back: the matrix is its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < 128:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    h = (h * 128**-0.5).to(x.dtype)
    rotated = x @ h
    back: Tensor = _e4m3(rotated, _amax(rotated).clamp(min=1e-4) / _E4M3_MAX) @ h
    return back


def _amax(x: Tensor) -> Tensor:
    amax: Tensor = x.float().abs().amax(-1, keepdim=True)
    return amax


def _e4m3(x: Tensor, least_scale: Tensor) -> Tensor:
    """Round to e4m3 with the next power of two as the scale."""
    scale = torch.exp2(torch.ceil(torch.log2(least_scale)))
    rounded: Tensor = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.to(x.dtype)
