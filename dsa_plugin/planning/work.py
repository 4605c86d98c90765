"""FLOPs and bytes of one decode step or prefill chunk on one GPU, op by op.

Traffic: weights, caches and logits once, but each row's selected latents anew. Intermediates and
communication between GPUs are left out. A multiply-add is two FLOPs. Ops are called as in
dsa_kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM
from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.sizes import (
    INDEX_BYTES,
    LATENT_BYTES,
    Attention,
    Weight,
    layer_weights,
)
from dsa_plugin.planning.weight_kernels import is_weight_only

Precision = Literal["bf16", "fp8"]
Stage = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Work:
    """What one op has to do."""

    op: str
    flops: float
    bytes: float
    precision: Precision


@dataclass(frozen=True)
class Batch:
    """One step of one attention rank.

    Attributes:
        stage: of all its requests.
        requests: how many.
        queries: tokens computed of each: its last ones.
        context: tokens of each, these included.
    """

    stage: Stage
    requests: int
    queries: int
    context: int

    @property
    def rows(self) -> int:
        return self.requests * self.queries

    @property
    def keys(self) -> float:
        """Tokens that a row sees, on average."""
        return self.context - (self.queries - 1) / 2


def attention_core(d: Deployment, batch: Batch, kind: Attention, *, indexer: bool) -> list[Work]:
    """What DSA replaces: attention proper, with indexer and selection where the layer has them.

    DSA attends to a prefill whose context is not long as dense attention would, with a mask.
    """
    if kind == "dense":
        return [_dense(d, batch)]
    attend = _sparse(d, batch)
    if batch.stage == "prefill":
        masked = replace(_dense(d, batch), op="masked_mha")
        attend = min(attend, masked, key=_cost)
    return [*(_select(d, batch) if indexer else ()), attend]


def layer_work(
    d: Deployment, batch: Batch, kind: Attention, *, dense_mlp: bool, indexer: bool
) -> list[Work]:
    """All of one layer."""
    weights = layer_weights(d.model, dense=dense_mlp, indexer=indexer and kind == "dsa")
    local = [weight for weight in weights if weight.split != "expert"]
    experts = [weight for weight in weights if weight.split == "expert"]
    return [
        *attention_core(d, batch, kind, indexer=indexer),
        _linear("projections", d, local, batch.rows),
        *([_experts(d, experts, batch.rows)] if experts else ()),
    ]


def head_work(d: Deployment, batch: Batch) -> Work:
    """The vocabulary's matrix: of a prompt for the last token alone."""
    head = Weight("vocab", d.model.vocab_size, d.model.hidden_size, 1, "tensor", linear=False)
    rows = batch.rows if batch.stage == "decode" else batch.requests
    return _linear("head", d, [head], rows, precision="bf16")


def _select(d: Deployment, batch: Batch) -> Iterator[Work]:
    model = d.model
    if batch.context <= model.index_topk:
        return  # everything is selected, nothing is scored
    logits = 4 * batch.rows * batch.keys
    in_fp8 = d.index_dtype == "fp8" and d.gpu.fp8_tflops is not None  # else decoded to bf16
    yield Work(
        "indexer_logits",
        2 * batch.rows * model.index_n_heads * batch.keys * model.index_head_dim,
        batch.requests * batch.context * INDEX_BYTES[d.index_dtype] + logits,
        "fp8" if in_fp8 else "bf16",
    )
    yield Work("topk_select", 0, logits + 4 * batch.rows * model.index_topk, "bf16")


def _sparse(d: Deployment, batch: Batch) -> Work:
    selected = batch.rows * min(d.model.index_topk, batch.keys)
    return Work(
        "sparse_mla",
        2 * selected * _heads(d) * (LATENT_DIM + KV_LORA_RANK),
        selected * LATENT_BYTES[d.kv_dtype],
        "bf16",
    )


def _cost(attend: Work) -> float:
    """What the plugin compares: FLOPs, of which a byte gathered is worth 64 (masked_is_faster)."""
    return max(attend.flops, 64 * attend.bytes)


def _dense(d: Deployment, batch: Batch) -> Work:
    """Decode: absorbed, over latents. Prefill: keys and values expanded from the latents first."""
    model, heads = d.model, _heads(d)
    pairs = batch.rows * batch.keys
    cached = batch.requests * batch.context
    latents = cached * LATENT_BYTES[d.kv_dtype]
    if batch.stage == "decode":
        flops = 2 * pairs * heads * (LATENT_DIM + KV_LORA_RANK)
        return Work("dense_mla", flops, latents, "bf16")
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    expand = 2 * cached * KV_LORA_RANK * heads * (nope + value)
    flops = 2 * pairs * heads * (nope + rope + value)
    return Work("dense_mha", flops + expand, latents, "bf16")


def _experts(d: Deployment, weights: list[Weight], rows: int) -> Work:
    """Routed experts, evenly loaded; a step of few rows reads only those that it meets."""
    model, all_rows = d.model, rows * d.dp
    routed = model.num_experts_per_tok / model.n_routed_experts
    met = 1 - (1 - routed) ** all_rows
    return Work(
        "experts",
        2 * all_rows * routed * sum(weight.parameters for weight in weights) / d.count,
        met * sum(d.local_bytes(weight) for weight in weights),
        _weights_precision(d, experts=True),
    )


def _linear(
    op: str,
    d: Deployment,
    weights: Iterable[Weight],
    rows: int,
    precision: Precision | None = None,
) -> Work:
    weights = list(weights)
    return Work(
        op,
        2 * rows * sum(d.local_parameters(weight) for weight in weights),
        sum(d.local_bytes(weight) for weight in weights),
        precision or _weights_precision(d, experts=False),
    )


def _heads(d: Deployment) -> int:
    return d.model.num_attention_heads // d.tp


def _weights_precision(d: Deployment, *, experts: bool) -> Precision:
    weight_only = is_weight_only(d.gpu, d.weights_dtype, experts=experts)
    return "fp8" if d.weights_dtype == "fp8" and not weight_only else "bf16"
