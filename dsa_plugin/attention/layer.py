"""What a layer is made of, and what one pass hands to it.

Both as a host has them: per tensor-parallel rank, before norm and RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.cache_write import Norm, Rope
from dsa_plugin.attention.invariants import LayerCheck


@dataclass(frozen=True)
class MLAWeights:
    """Multi-head latent attention in its absorbed form (DeepSeek-V2 report, section 2.1).

    Attributes:
        softmax_scale: of the queries' q.k, YaRN's mscale^2 included.
        kv_norm: RMSNorm of the latent, 512 values.
        rope: of queries and latents, always interleaved; YaRN included.
        w_uk: [heads, qk_nope_head_dim, 512], absorbs the key's up-projection into the query.
        w_uv: [heads, 512, v_head_dim], the value's up-projection.
    """

    softmax_scale: float
    kv_norm: Norm
    rope: Rope
    w_uk: Tensor
    w_uv: Tensor

    def reload(self, w_uk: Tensor, w_uv: Tensor) -> None:
        """Take weights loaded anew, where the old ones lie: captured graphs read them there."""
        self.w_uk.copy_(w_uk)
        self.w_uv.copy_(w_uv)


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of one layer, behind its projections.

    Attributes:
        k_norm: LayerNorm of the index key, 128 values.
        rope: of index queries and keys, in the model's style.
        key_cache: [blocks, block_size, 128], or [blocks, block_size, 132] uint8 for fp8.
    """

    k_norm: Norm
    rope: Rope
    key_cache: Tensor

    @property
    def is_fp8(self) -> bool:
        """Whether keys are cached in fp8: only then DeepSeek's reference rotates q and k."""
        return self.key_cache.dtype == torch.uint8


@dataclass(frozen=True)
class Layer:
    """One layer's weights bound to its caches.

    Attributes:
        mla: its weights.
        latent_cache: [blocks, block_size, 576], or [blocks, block_size, 656] uint8 for fp8.
        indexer: None in a layer that attends to what another layer selected.
        check: of `DSA_CHECK`; None where it is off.
    """

    mla: MLAWeights
    latent_cache: Tensor
    indexer: Indexer | None
    check: LayerCheck | None = None


@dataclass(frozen=True)
class IndexProjections:
    """The indexer's projections: q [T, index heads, 128], k [T, 128], weights [T, index heads]."""

    q: Tensor
    k: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Projections:
    """One layer's projections of a pass; a host may pad them beyond the batch's tokens.

    Attributes:
        q: [>= T, heads, qk_nope_head_dim + 64].
        kv: [>= T, 576].
        positions: [>= T] int64.
        index: None where the layer has no indexer.
    """

    q: Tensor
    kv: Tensor
    positions: Tensor
    index: IndexProjections | None

    def first(self, tokens: int) -> Projections:
        """Without the padding."""
        index = self.index and IndexProjections(
            self.index.q[:tokens], self.index.k[:tokens], self.index.weights[:tokens]
        )
        return Projections(self.q[:tokens], self.kv[:tokens], self.positions[:tokens], index)
