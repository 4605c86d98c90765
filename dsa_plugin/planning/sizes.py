"""Parameters, weight bytes and cache bytes of a model.

Tensors are those of the released checkpoints (deepseek-ai/DeepSeek-V3.2-Exp, zai-org/GLM-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dsa_kernels.dims import index_bytes_per_token, latent_bytes_per_token
from dsa_plugin.fp8_weights import WEIGHT_BLOCK, scale_shape
from dsa_plugin.packed_weights import BITS, GROUP
from dsa_plugin.planning.model import ModelShape, WeightsDtype
from dsa_registry import lookup

Attention = Literal["dsa", "dense"]
"""dense: MLA over every cached token, without an indexer, in the same cache of latents."""
CacheDtype = Literal["bf16", "fp8", "fp32"]
"""Of latents or index keys; bf16 stands for fp16 too."""

_ITEMSIZE: dict[CacheDtype, int] = {"fp32": 4, "bf16": 2, "fp8": 1}
# One token in one layer.
LATENT_BYTES = {dtype: latent_bytes_per_token(size) for dtype, size in _ITEMSIZE.items()}
INDEX_BYTES = {dtype: index_bytes_per_token(size) for dtype, size in _ITEMSIZE.items()}


@dataclass(frozen=True)
class Weight:
    """`count` equal tensors [rows, columns].

    Attributes:
        part: attention, indexer, mlp (dense MLP, shared experts, router), experts (routed), vocab
            (embedding and head) or mtp (what only an MTP layer has).
        split: how ranks share it. whole: each has all; tensor: over tensor-parallel ranks; expert:
            over all GPUs.
        linear: quantised in an fp8 checkpoint.
        packed: quantised in w8a16 and w4a16.
        itemsize: bytes a value where it is not quantised.
    """

    part: Literal["attention", "indexer", "mlp", "experts", "vocab", "mtp"]
    rows: int
    columns: int
    count: int
    split: Literal["whole", "tensor", "expert"] = "whole"
    linear: bool = True
    packed: bool = False
    itemsize: int = 2

    @property
    def parameters(self) -> int:
        return self.count * self.rows * self.columns

    def scales(self, dtype: WeightsDtype) -> int:
        """How many scales are stored beside it."""
        if not self._quantised(dtype):
            return 0
        if dtype in BITS:
            return self.count * self.rows * -(-self.columns // GROUP)
        return self.count * math.prod(scale_shape((self.rows, self.columns)))

    def nbytes(self, dtype: WeightsDtype) -> float:
        """Bytes in a checkpoint of this dtype, scales included."""
        if not self._quantised(dtype):
            return self.parameters * self.itemsize
        if bits := BITS.get(dtype):
            return self.parameters * bits / 8 + 2 * self.scales(dtype)
        return self.parameters + 4 * self.scales(dtype)

    def marlin_nbytes(self) -> float:
        """Bytes of an fp8 checkpoint's tensor as Marlin holds it: each row has its scales, in bf16.

        prepare_fp8_layer_for_marlin in either host's layers/quantization.
        """
        if not self._quantised("fp8"):
            return self.nbytes("fp8")
        return self.parameters + 2 * self.count * self.rows * -(-self.columns // WEIGHT_BLOCK)

    def _quantised(self, dtype: WeightsDtype) -> bool:
        return self.packed if dtype in BITS else self.linear and dtype == "fp8"


def layer_weights(model: ModelShape, *, dense: bool, indexer: bool) -> list[Weight]:
    """One layer's tensors; `dense`: an MLP instead of experts; `indexer`: it runs one."""
    return [
        *_attention(model),
        *(_indexer(model) if indexer else ()),
        *(_mlp(model, model.intermediate_size) if dense else _experts(model)),
    ]


def model_weights(model: ModelShape, *, mtp: bool) -> list[Weight]:
    """Every tensor of the checkpoint's backbone, and with `mtp` of its MTP layers."""
    vocab = Weight("vocab", model.vocab_size, model.hidden_size, 2, "tensor", linear=False)
    weights = [vocab, _norms("attention", model.hidden_size)]
    for layer, kind in enumerate(model.indexer_types):
        dense = layer < model.first_k_dense_replace
        weights += layer_weights(model, dense=dense, indexer=kind == "full")
    for _ in range(model.num_nextn_predict_layers if mtp else 0):
        weights += layer_weights(model, dense=False, indexer=True)
        weights += [
            Weight("mtp", model.hidden_size, 2 * model.hidden_size, 1, linear=False),  # eh_proj
            _norms("mtp", 3 * model.hidden_size),  # enorm, hnorm, shared_head.norm
        ]
        if lookup(model.model_type).mtp_repeats_vocab:
            weights.append(replace(vocab, part="mtp"))
    return weights


def parameters(model: ModelShape, *, mtp: bool) -> int:
    """How many parameters the checkpoint has, without scales."""
    return sum(weight.parameters for weight in model_weights(model, mtp=mtp))


def active_parameters(model: ModelShape) -> float:
    """Parameters that one token is multiplied with: its own experts, the head, no embedding."""
    share = {"experts": model.num_experts_per_tok / model.n_routed_experts, "vocab": 1 / 2}
    return sum(
        weight.parameters * share.get(weight.part, 1) for weight in model_weights(model, mtp=False)
    )


def weight_bytes(model: ModelShape, dtype: WeightsDtype, *, mtp: bool) -> float:
    """Bytes of the checkpoint's tensors."""
    return sum(weight.nbytes(dtype) for weight in model_weights(model, mtp=mtp))


def cache_bytes_per_token(
    model: ModelShape, kv_dtype: CacheDtype, index_dtype: CacheDtype, *, mtp: bool
) -> tuple[int, int]:
    """Bytes of one token in all layers: latents, index keys."""
    more = model.num_nextn_predict_layers if mtp else 0
    return (
        LATENT_BYTES[kv_dtype] * (model.num_hidden_layers + more),
        INDEX_BYTES[index_dtype] * (model.num_indexers + more),
    )


def _attention(model: ModelShape) -> Iterator[Weight]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    q_head = model.qk_nope_head_dim + model.qk_rope_head_dim
    kv_head = model.qk_nope_head_dim + model.v_head_dim
    yield Weight("attention", model.q_lora_rank, hidden, 1)
    yield Weight("attention", model.kv_lora_rank + model.qk_rope_head_dim, hidden, 1)
    more = model.packs_more
    yield Weight("attention", heads * q_head, model.q_lora_rank, 1, "tensor", packed=more)
    yield Weight("attention", heads * kv_head, model.kv_lora_rank, 1, "tensor")
    yield Weight("attention", hidden, heads * model.v_head_dim, 1, "tensor", packed=more)
    yield _norms("attention", model.q_lora_rank + model.kv_lora_rank + 2 * hidden)


def _indexer(model: ModelShape) -> Iterator[Weight]:
    heads, dim = model.index_n_heads, model.index_head_dim
    yield Weight("indexer", heads * dim, model.q_lora_rank, 1)
    yield Weight("indexer", dim, model.hidden_size, 1)
    yield Weight("indexer", heads, model.hidden_size, 1, linear=False)  # weights_proj
    yield _norms("indexer", 2 * dim)  # weight and bias


def _mlp(model: ModelShape, intermediate_size: int) -> Iterator[Weight]:
    hidden, more = model.hidden_size, model.packs_more
    yield Weight("mlp", intermediate_size, hidden, 2, "tensor", packed=more)
    yield Weight("mlp", hidden, intermediate_size, 1, "tensor", packed=more)


def _experts(model: ModelShape) -> Iterator[Weight]:
    experts, inner = model.n_routed_experts, model.moe_intermediate_size
    yield Weight("mlp", experts, model.hidden_size, 1, linear=False)  # router
    yield Weight("mlp", 1, experts, 1, linear=False, itemsize=4)  # its correction bias
    yield Weight("experts", inner, model.hidden_size, 2 * experts, "expert", packed=True)
    yield Weight("experts", model.hidden_size, inner, experts, "expert", packed=True)
    if model.n_shared_experts:
        yield from _mlp(model, inner * model.n_shared_experts)


def _norms(part: Literal["attention", "indexer", "mtp"], size: int) -> Weight:
    return Weight(part, 1, size, 1, linear=False)
