"""One layer of a batch: DeepSeek-V3.2's attention with random weights, caches and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from random_caches import BLOCK_SIZE, block_table, index_cache, latent_cache
from torch import Tensor

from dsa_kernels.cache_write import Norm, Rope, apply_rope
from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.sparse_mla import gather_latents
from dsa_kernels.testing import V32, make_cos_sin_cache
from dsa_plugin import attention
from dsa_plugin.attention.forward import write_latents
from dsa_plugin.attention.metadata import DSAMetadata, split_prefill

NOPE, V_HEAD_DIM = V32.head_dim - ROPE_DIM, V32.v_head_dim
EPS = 1e-6
WORKSPACE_BYTES = 512 << 20  # DSA_LOGITS_WORKSPACE_MB's default


@dataclass
class LayerPass:
    """One layer's weights, caches and inputs; fp8 caches, bf16 all else.

    Attributes:
        layer, projections, metadata, topk_indices, out: as `attention.forward` takes them.
        latents: [requests, context, 576] bf16, what the latent cache holds.
        latent_table: [requests, context / 64] int32, their pages, in order.
    """

    layer: attention.Layer
    projections: attention.Projections
    metadata: DSAMetadata
    topk_indices: Tensor
    out: Tensor
    latents: Tensor
    latent_table: Tensor

    @property
    def mla(self) -> attention.MLAWeights:
        return self.layer.mla

    def dsa(self) -> Tensor:
        attention.forward(
            self.layer,
            self.projections,
            self.metadata,
            self.topk_indices,
            self.out,
            reuse_selection=False,
        )
        return self.out

    def dense_query(self) -> tuple[Tensor, Tensor]:
        """What dense MLA has in common: stores the latents; q_nope and rotated q_pe."""
        write_latents(self.layer, self.projections, self.metadata)
        q_nope, q_pe = self.projections.q.split([NOPE, ROPE_DIM], -1)
        return q_nope, apply_rope(q_pe, self.mla.rope, self.projections.positions)

    def absorbed_query(self) -> Tensor:
        """[T, heads, 576]"""
        q_nope, q_pe = self.dense_query()
        absorbed = torch.bmm(q_nope.transpose(0, 1), self.mla.w_uk).transpose(0, 1)
        return torch.cat((absorbed, q_pe), -1)

    def up_project(self, attended: Tensor) -> Tensor:
        """[T, heads, 512] -> [T, heads, v_head_dim]"""
        return torch.bmm(attended.transpose(0, 1), self.mla.w_uv).transpose(0, 1)


def make_layer(
    device: torch.device, heads: int, topk: int, requests: int, rows: int, context: int
) -> LayerPass:
    """`rows` queries of each request, the last of `context` tokens."""
    total = requests * rows

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * std).bfloat16()

    table = block_table(requests, context, device)
    cos_sin = make_cos_sin_cache(context).to(device)
    position = torch.arange(context - rows, context, device=device).repeat(requests)
    request = torch.arange(requests, device=device).repeat_interleave(rows)
    block = table[request, position // BLOCK_SIZE].long()
    decoding = rows == 1
    metadata = DSAMetadata(
        num_tokens=total,
        num_decodes=requests if decoding else 0,
        decode_query_len=1,
        max_decode_context_len=context if decoding else 0,
        prefill_chunks=() if decoding else split_prefill([0, rows], [context], 0, WORKSPACE_BYTES),
        request_ids=request.int(),
        context_lens=position.int() + 1,
        block_table=table,
        slot_mapping=block * BLOCK_SIZE + position % BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        workspace_bytes=WORKSPACE_BYTES,
    )
    mla = attention.MLAWeights(
        softmax_scale=(NOPE + ROPE_DIM) ** -0.5,
        kv_norm=Norm(torch.ones(KV_LORA_RANK, device=device), EPS),
        rope=Rope(cos_sin, interleaved=True),
        w_uk=randn(heads, NOPE, KV_LORA_RANK, std=KV_LORA_RANK**-0.5),
        w_uv=randn(heads, KV_LORA_RANK, V_HEAD_DIM, std=KV_LORA_RANK**-0.5),
    )
    pages = requests * context // BLOCK_SIZE
    ones = torch.ones(INDEX_HEAD_DIM, device=device)
    indexer = attention.Indexer(
        k_norm=Norm(ones, EPS, bias=torch.zeros_like(ones)),
        rope=Rope(cos_sin, interleaved=False),
        key_cache=index_cache(pages, device),
    )
    index = attention.IndexProjections(
        q=randn(total, V32.index_n_heads, INDEX_HEAD_DIM),
        k=randn(total, INDEX_HEAD_DIM),
        weights=randn(total, V32.index_n_heads),
    )
    q, kv = randn(total, heads, NOPE + ROPE_DIM), randn(total, LATENT_DIM)
    layer = LayerPass(
        layer=attention.Layer(mla, latent_cache(pages, torch.uint8, device), indexer),
        projections=attention.Projections(q, kv, position, index),
        metadata=metadata,
        topk_indices=torch.empty(total, topk, dtype=torch.int32, device=device),
        out=torch.empty(total, heads, V_HEAD_DIM, dtype=torch.bfloat16, device=device),
        latents=torch.empty(0),
        latent_table=torch.arange(table.numel(), dtype=torch.int32, device=device).view_as(table),
    )
    write_latents(layer.layer, layer.projections, metadata)
    cache = layer.layer.latent_cache
    layer.latents = torch.stack(
        [gather_latents(cache, row, context, torch.bfloat16) for row in table]
    )
    return layer
