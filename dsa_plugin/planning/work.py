"""FLOPs and bytes of one decode step or prefill chunk on one GPU, op by op.

Traffic: weights, caches and logits once; latents once for each request that selects them, and what
is expanded from them. Other intermediates and communication between GPUs are left out. A
multiply-add is two FLOPs. Ops are called as in dsa_kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM
from dsa_kernels.prefill_forms import (
    is_decoding_first_faster,
    is_masked_faster,
    selected_keys,
)
from dsa_plugin.planning.deployment import PAGE, Deployment
from dsa_plugin.planning.forms import (
    indexer_logits_form,
    masked_mha_form,
    sparse_mla_form,
    topk_select_form,
)
from dsa_plugin.planning.sizes import (
    INDEX_BYTES,
    LATENT_BYTES,
    Attention,
    CacheDtype,
    Weight,
    layer_weights,
)
from dsa_plugin.planning.weight_kernels import is_weight_only

_TILE_HEADS = 16  # matrix units multiply so many rows at least
Precision = Literal["bf16", "fp8"]
Stage = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Work:
    """What one op has to do.

    Attributes:
        flops, bytes: of one call.
        form: which of the op's kernels does it (forms.py); "": a host's, or the op has one.
        calls: how many there are.
    """

    op: str
    flops: float
    bytes: float
    precision: Precision
    form: str = ""
    calls: int = 1


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

    def selected(self, topk: int) -> float:
        """Tokens that a row selects, on average."""
        return selected_keys(self.queries, self.context, topk) / self.queries


def attention_core(d: Deployment, batch: Batch, kind: Attention, *, indexer: bool) -> list[Work]:
    """What DSA replaces: attention proper and the caches' writes, indexer and selection."""
    if kind == "dense":
        return [_cache_write(d, batch, indexer=False), _dense(d, batch)]
    ops = [_cache_write(d, batch, indexer=indexer)]
    for part in _parts(d, batch):
        if indexer:
            ops += _select(d, part)
        ops += _attend(d, part)
    return ops


def is_masked(d: Deployment, chunk: Batch) -> bool:
    """Whether a GPU expands a chunk's keys and masks what is not selected."""
    model = d.model
    return is_masked_faster(
        chunk.queries,
        chunk.context,
        model.index_topk,
        heads=_heads(d),
        width=model.qk_nope_head_dim + model.qk_rope_head_dim,
        v_width=model.v_head_dim,
    )


def is_decoded_first(d: Deployment, chunk: Batch) -> bool:
    """Whether a GPU decodes fp8 latents before it gathers, where the workspace has room."""
    keys = _whole_pages(chunk.context)
    if d.kv_dtype != "fp8" or keys * LATENT_BYTES["bf16"] > d.workspace_bytes:
        return False
    return is_decoding_first_faster(chunk.queries, keys, d.model.index_topk)


def layer_work(
    d: Deployment, batch: Batch, kind: Attention, *, dense_mlp: bool, indexer: bool
) -> list[Work]:
    """All of one layer."""
    return [
        *attention_core(d, batch, kind, indexer=indexer),
        *weights_work(d, batch, kind, dense_mlp=dense_mlp, indexer=indexer),
    ]


def weights_work(
    d: Deployment, batch: Batch, kind: Attention, *, dense_mlp: bool, indexer: bool
) -> list[Work]:
    """One layer's products with its weights."""
    weights = layer_weights(d.model, dense=dense_mlp, indexer=indexer and kind == "dsa")
    local = [weight for weight in weights if weight.split != "expert"]
    experts = [weight for weight in weights if weight.split == "expert"]
    return [
        _linear("projections", d, local, batch.rows),
        *([_experts(d, experts, batch.rows)] if experts else ()),
    ]


def head_work(d: Deployment, batch: Batch) -> Work:
    """The vocabulary's matrix: of a prompt for the last token alone."""
    head = Weight("vocab", d.model.vocab_size, d.model.hidden_size, 1, "tensor", linear=False)
    rows = batch.rows if batch.stage == "decode" else batch.requests
    return _linear("head", d, [head], rows, precision="bf16")


def _parts(d: Deployment, batch: Batch) -> Iterator[Batch]:
    """A decode as it is; of prefills, the chunks whose logits fit the workspace (split_prefill)."""
    if batch.stage == "decode":
        yield batch
        return
    most = max(1, d.workspace_bytes // (4 * batch.context))
    for done in range(0, batch.queries, most):
        size = min(most, batch.queries - done)
        yield replace(batch, queries=size, context=batch.context - batch.queries + done + size)


def _cache_write(d: Deployment, batch: Batch, *, indexer: bool) -> Work:
    """In one launch: latents, and of an indexer its keys and queries."""
    model, rope = d.model, 4 * d.model.qk_rope_head_dim
    nbytes = LATENT_BYTES["bf16"] + LATENT_BYTES[d.kv_dtype] + rope
    if indexer:
        nbytes += 2 * model.index_head_dim + INDEX_BYTES[d.index_dtype] + rope
    if indexer and _scores(d, batch):
        value = 2 + (1 if d.index_dtype == "fp8" else 2)
        head = model.index_head_dim * value + 6  # and its weight, read and written
        nbytes += model.index_n_heads * head + rope
    return Work("cache_write", 0, batch.rows * nbytes, "bf16", d.kv_dtype)


def _scores(d: Deployment, batch: Batch) -> bool:
    """Whether some tokens are not selected; the graph of a decode is for the longest context."""
    context = d.context if batch.stage == "decode" else batch.context
    return max(context, batch.context) > d.model.index_topk


def _select(d: Deployment, batch: Batch) -> Iterator[Work]:
    model = d.model
    if not _scores(d, batch):
        return
    decodes = batch.stage == "decode"
    calls, requests = (1, batch.requests) if decodes else (batch.requests, 1)
    rows = requests * batch.queries
    keys = requests * batch.context * INDEX_BYTES[d.index_dtype]
    logits = 4 * rows * batch.keys
    in_fp8 = d.index_dtype == "fp8" and d.gpu.fp8_tflops is not None  # else decoded to bf16
    if not decodes:
        yield Work("gather_index_keys", 0, 2 * keys, "bf16", d.index_dtype, calls)
    yield Work(
        "indexer_logits",
        2 * rows * model.index_n_heads * batch.keys * model.index_head_dim,
        keys + logits,
        "fp8" if in_fp8 else "bf16",
        indexer_logits_form(batch.stage, d.index_dtype, model.index_n_heads),
        calls,
    )
    columns = max(d.context, batch.context) if decodes else batch.context
    nbytes = logits + 4 * rows * model.index_topk
    yield Work("topk_select", 0, nbytes, "bf16", topk_select_form(columns), calls)


def _attend(d: Deployment, batch: Batch) -> list[Work]:
    """DSA: in whichever of its forms the plugin attends."""
    if batch.stage == "decode":
        return [_sparse(d, batch, d.kv_dtype, 1)]
    if is_masked(d, batch):
        return _masked(d, batch)
    if is_decoded_first(d, batch):
        gather = _gather_latents(d, _whole_pages(batch.context), batch.requests)
        return [gather, _sparse(d, batch, "bf16", batch.requests)]
    return [_sparse(d, batch, d.kv_dtype, batch.requests)]


def _sparse(d: Deployment, batch: Batch, latents: CacheDtype, calls: int) -> Work:
    """Rows of one request select from the same latents, which stay in the second-level cache."""
    rows, heads = batch.rows // calls, max(_TILE_HEADS, _heads(d))
    selected = rows * batch.selected(d.model.index_topk)
    read = selected if batch.stage == "decode" else min(selected, batch.context)
    return Work(
        "sparse_mla",
        2 * selected * heads * (LATENT_DIM + KV_LORA_RANK),
        read * LATENT_BYTES[latents],
        "bf16",
        sparse_mla_form(latents, heads),
        calls,
    )


def _masked(d: Deployment, batch: Batch) -> list[Work]:
    """Keys and values are expanded from a request's latents; then dense attention with a mask."""
    model, heads, keys = d.model, _heads(d), batch.context
    width, v_width = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    expanded = 2 * heads * keys * (width + v_width)
    return [
        _gather_latents(d, keys, batch.requests),
        Work(
            "expand",
            2 * keys * KV_LORA_RANK * heads * (model.qk_nope_head_dim + v_width),
            keys * LATENT_BYTES["bf16"] + expanded,
            "bf16",
            calls=batch.requests,
        ),
        Work(
            "masked_mha",
            2 * batch.queries * batch.keys * heads * (width + v_width),
            expanded + 2 * heads * batch.queries * (width + v_width),
            "bf16",
            masked_mha_form(width),
            batch.requests,
        ),
    ]


def _gather_latents(d: Deployment, keys: int, calls: int) -> Work:
    nbytes = keys * (LATENT_BYTES[d.kv_dtype] + LATENT_BYTES["bf16"])
    return Work("gather_latents", 0, nbytes, "bf16", d.kv_dtype, calls)


def _whole_pages(keys: int) -> int:
    return -(-keys // PAGE) * PAGE


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
