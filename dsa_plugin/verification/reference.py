"""Indexer, selection and attention of one layer from the specification, in the inputs' precision.

Nothing is rounded on the way and nothing is shared with the ops: DeepSeek-V3.2-Exp report, section
2.1, and its inference/model.py, with the indexer's RoPE as corrected on 2025-11-17. `Maths` holds
each choice that implementations are known to have got wrong, so that a wrong one can be recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsa_kernels.dims import FP8_BLOCK, FP8_MAX, INDEX_HEAD_DIM, KV_LORA_RANK, ROPE_DIM

Style = Literal["half-split", "interleaved", "none"]
_LAYER_NORM_EPS = 1e-6
_TILE = 1 << 24  # elements of a tile of scores


@dataclass(frozen=True)
class Maths:
    """How a layer computes; the defaults are right for every model.

    Attributes:
        index_topk: keys that a row selects.
        softmax_scale: of attention's logits.
        index_rope: style of the indexer's RoPE.
        rms_norm_eps: of the latent's norm.
        mla_rope: style of MLA's RoPE.
        index_rope_last: whether the indexer rotates its last 64 values in place of its first.
        hadamard: which side alone Hadamard's matrix is applied to.
        relu: whether a head's product is cut off at 0.
        key_bias: whether the index key's LayerNorm adds its bias.
        key_scale, query_scale, latent_scale: whether an fp8 value is multiplied by its scale.
        unseen: of the newest keys that a row sees, how many the indexer leaves out.
    """

    index_topk: int
    softmax_scale: float
    index_rope: Style
    rms_norm_eps: float = 1e-6
    mla_rope: Style = "interleaved"
    index_rope_last: bool = False
    hadamard: Literal["both", "keys", "queries"] = "both"
    relu: bool = True
    key_bias: bool = True
    key_scale: bool = True
    query_scale: bool = True
    latent_scale: bool = True
    unseen: int = 0


@dataclass(frozen=True)
class Norms:
    """Weights of the latent's RMSNorm, and of the index key's LayerNorm, where there is one."""

    latent: Tensor
    key: Tensor | None = None
    key_bias: Tensor | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, table: Tensor, style: Style) -> Tensor:
    """RoPE of x [T, ..., 64] at positions [T] by a table [positions, 32 cosines | 32 sines]."""
    if style == "none":
        return x
    shape = (-1, *(1,) * (x.dim() - 2), ROPE_DIM // 2)
    cos, sin = (part.view(shape) for part in table[positions].to(x.dtype).chunk(2, -1))
    if style == "half-split":
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def latents(kv: Tensor, norms: Norms, positions: Tensor, table: Tensor, maths: Maths) -> Tensor:
    """[T, 576] as they are cached: the normed latent, then the rotated part."""
    nope, pe = kv.split((KV_LORA_RANK, ROPE_DIM), -1)
    nope = rms_norm(nope, norms.latent.to(kv.dtype), maths.rms_norm_eps)
    if not maths.latent_scale:
        blocks = nope.unflatten(-1, (-1, FP8_BLOCK))
        nope = (blocks / _power_of_two(blocks, 1e-4 * FP8_MAX)).flatten(-2)
    return torch.cat((nope, rotate(pe, positions, table, maths.mla_rope)), -1)


def index_keys(k: Tensor, norms: Norms, positions: Tensor, table: Tensor, maths: Maths) -> Tensor:
    """[T, 128]: LayerNorm, then RoPE."""
    assert norms.key is not None
    assert norms.key_bias is not None
    centred = k - k.mean(-1, keepdim=True)
    key = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + _LAYER_NORM_EPS)
    key = key * norms.key.to(k.dtype)
    if maths.key_bias:
        key = key + norms.key_bias.to(k.dtype)
    key = _rotate_index(key, positions, table, maths)
    if not maths.key_scale:
        key = key / _power_of_two(key @ hadamard(key))
    return key @ hadamard(key) if maths.hadamard == "keys" else key


def index_queries(
    q: Tensor, weights: Tensor, positions: Tensor, table: Tensor, maths: Maths
) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, heads, 128] and head weights [T, heads], the score's scales in them."""
    query = _rotate_index(q, positions, table, maths)
    weights = weights * (q.shape[1] * INDEX_HEAD_DIM) ** -0.5
    if not maths.query_scale:
        weights = weights / _power_of_two(query @ hadamard(query))[..., 0]
    return query @ hadamard(query) if maths.hadamard == "queries" else query, weights


def scores(query: Tensor, weights: Tensor, keys: Tensor, positions: Tensor, maths: Maths) -> Tensor:
    """[T, L] index scores of keys [L, 128]; -inf where a row does not see the key."""
    rows, heads, _ = query.shape
    found = query.new_empty(rows, len(keys))
    step = max(1, _TILE // (heads * len(keys)))
    for first in range(0, rows, step):
        tile = slice(first, first + step)
        products = query[tile] @ keys.T
        if maths.relu:
            products = products.relu_()
        found[tile] = torch.einsum("th,thl->tl", weights[tile], products)
    column = torch.arange(len(keys), device=keys.device)
    return found.masked_fill_(column > positions[:, None] - maths.unseen, -torch.inf)


def top(found: Tensor, k: int) -> Tensor:
    """[T, L] bool: the k best scores of each row; all that it sees where those are fewer."""
    mask = torch.zeros_like(found, dtype=torch.bool)
    mask.scatter_(1, found.topk(min(k, found.shape[1]), -1).indices, True)
    return mask & (found > -torch.inf)


def absorbed(q: Tensor, w_uk: Tensor, positions: Tensor, table: Tensor, maths: Maths) -> Tensor:
    """[T, heads, 576] of q [T, heads, nope + 64]; w_uk [heads, nope, 512]."""
    nope, pe = q[..., :-ROPE_DIM], q[..., -ROPE_DIM:]
    pe = rotate(pe, positions, table, maths.mla_rope)
    return torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk.to(q.dtype)), pe), -1)


def probabilities(query: Tensor, latent: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention [heads, N] of one row's query [heads, 576] to latents [N, 576]; seen [N] bool."""
    logits = (query @ latent.T * scale).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num_(0)


def attend(query: Tensor, latent: Tensor, mask: Tensor, w_uv: Tensor, maths: Maths) -> Tensor:
    """[T, heads, v_head_dim]: each row over the keys that mask [T, L] names, none: zeros."""
    found = []
    for row, chosen in zip(query, mask, strict=True):
        part = latent[chosen]
        everything = torch.ones(len(part), dtype=torch.bool, device=part.device)
        weights = probabilities(row, part, everything, maths.softmax_scale)
        found.append(weights @ part[:, :KV_LORA_RANK])
    return torch.einsum("thc,hcv->thv", torch.stack(found), w_uv.to(query.dtype))


def hadamard(like: Tensor) -> Tensor:
    """H_128 * 128^-0.5, orthogonal: sign of (i, j) by the parity of the bits both have."""
    index = torch.arange(INDEX_HEAD_DIM)
    common = index[:, None] & index
    parity = torch.stack([(common >> bit) & 1 for bit in range(7)]).sum(0) % 2
    matrix: Tensor = (1 - 2 * parity).to(like) * INDEX_HEAD_DIM**-0.5
    return matrix


def _rotate_index(x: Tensor, positions: Tensor, table: Tensor, maths: Maths) -> Tensor:
    if maths.index_rope_last:
        rest, pe = x[..., :-ROPE_DIM], x[..., -ROPE_DIM:]
        return torch.cat((rest, rotate(pe, positions, table, maths.index_rope)), -1)
    pe, rest = x[..., :ROPE_DIM], x[..., ROPE_DIM:]
    return torch.cat((rotate(pe, positions, table, maths.index_rope), rest), -1)


def _power_of_two(x: Tensor, least: float = 1e-4) -> Tensor:
    """[..., 1]: the scale of fp8 of each vector, ue8m0."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=least)
    return torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))


def softmax_scale(head_dim: int, mscale: float) -> float:
    """Of q.k over heads of nope + rope values; YaRN's mscale lengthens either of them."""
    return mscale**2 / math.sqrt(head_dim)
