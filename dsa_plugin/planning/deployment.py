"""A model on a number of GPUs: what each GPU holds, and how many tokens and requests fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsa_kernels.dims import INDEX_PAGE, KV_LORA_RANK, LATENT_DIM
from dsa_plugin.env import LOGITS_WORKSPACE_MB
from dsa_plugin.fp8_weights import WEIGHT_BLOCK
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.model import ModelShape, WeightsDtype
from dsa_plugin.planning.sizes import (
    Attention,
    CacheDtype,
    Weight,
    cache_bytes_per_token,
    model_weights,
)
from dsa_plugin.planning.weight_kernels import is_weight_only

PAGE = INDEX_PAGE  # tokens a page of either host's cache holds
GIB = 1 << 30
VLLM_MEMORY = 0.92  # share of a GPU's memory that it takes by default
MACHINE = 8  # GPUs that tensor parallelism stays within, in what we propose
MOST_GPUS = 8 * MACHINE  # that we propose


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """`count` = tp x dp GPUs: dp attention ranks of tp GPUs each, experts over all GPUs.

    SGLang counts differently: its `--tp 8 --dp 8 --enable-dp-attention` is tp=1, dp=8 here.

    Attributes:
        ep: GPUs that hold different experts; each expert is split over the other count / ep.
        context: tokens of the longest request.
        mtp: the MTP layers are loaded too, to draft.
        memory_utilization: share of a GPU's memory that the host may take.
        prefill_chunk: tokens of a prompt computed at once.
    """

    model: ModelShape
    gpu: Gpu
    count: int
    tp: int
    dp: int
    ep: int
    context: int
    kv_dtype: CacheDtype
    index_dtype: CacheDtype
    weights_dtype: WeightsDtype
    mtp: bool
    memory_utilization: float
    prefill_chunk: int

    def __post_init__(self) -> None:
        _check(self)

    def local_bytes(self, weight: Weight) -> float:
        """Bytes of a tensor on the GPU that has most of it."""
        experts = weight.part == "experts"
        if is_weight_only(self.gpu, self.weights_dtype, experts=experts):
            return weight.marlin_nbytes() * self._share(weight)
        return weight.nbytes(self.weights_dtype) * self._share(weight)

    def local_parameters(self, weight: Weight) -> float:
        return weight.parameters * self._share(weight)

    @property
    def weight_bytes(self) -> float:
        """Weights of one GPU. MTP layers use the backbone's embedding and head."""
        served = [
            weight
            for weight in model_weights(self.model, mtp=self.mtp)
            if not (weight.part == "mtp" and weight.rows == self.model.vocab_size)
        ]
        return sum(self.local_bytes(weight) for weight in served)

    @property
    def absorbed_bytes(self) -> int:
        """W_UK and W_UV in bf16, which hosts keep beside kv_b_proj."""
        heads, layers = self.model.num_attention_heads // self.tp, self._layers
        per_head = (self.model.qk_nope_head_dim + self.model.v_head_dim) * KV_LORA_RANK
        return 2 * layers * heads * per_head

    @property
    def workspace_bytes(self) -> int:
        """The indexer's logits, at most: DSA_LOGITS_WORKSPACE_MB."""
        return int(LOGITS_WORKSPACE_MB.default) << 20

    @property
    def activation_bytes(self) -> float:
        """Estimate of a prefill chunk's intermediates: of attention or experts, the larger."""
        model, tokens = self.model, self.prefill_chunk
        heads = model.num_attention_heads // self.tp
        q = model.qk_nope_head_dim + model.qk_rope_head_dim
        per_head = q + LATENT_DIM + KV_LORA_RANK + model.v_head_dim  # q, absorbed, attended, out
        attention = 2 * heads * per_head + (4 + 8) * model.index_topk  # with indices and slots
        routed = model.num_experts_per_tok * self.dp / self.ep
        inner = 3 * model.moe_intermediate_size * self.ep / self.count
        experts = 2 * routed * (inner + model.hidden_size)
        residual = 2 * 2 * model.hidden_size
        return tokens * (residual + max(attention, experts))

    @property
    def usable_bytes(self) -> float:
        return self.memory_utilization * self.gpu.memory_gib * GIB

    @property
    def cache_space(self) -> float:
        """Bytes that remain on each GPU for the caches; negative: the rest does not fit."""
        taken = self.weight_bytes + self.absorbed_bytes + self.workspace_bytes
        return self.usable_bytes - taken - self.activation_bytes

    @property
    def cache_bytes_per_token(self) -> tuple[int, int]:
        """Latents and index keys of one token; every GPU of an attention rank has them all."""
        return cache_bytes_per_token(self.model, self.kv_dtype, self.index_dtype, mtp=self.mtp)

    def tokens_per_rank(self, kind: Attention = "dsa") -> int:
        """Cached tokens that fit on one attention rank."""
        latent, index = self.cache_bytes_per_token
        return tokens_that_fit(self.cache_space, latent + (index if kind == "dsa" else 0))

    def requests_per_rank(self, context: int, kind: Attention = "dsa") -> int:
        """Requests of `context` tokens that fit on one attention rank at once."""
        return self.tokens_per_rank(kind) // PAGE // -(-context // PAGE)

    @property
    def fits(self) -> bool:
        """Whether each attention rank has room for one request of `context` tokens."""
        return self.requests_per_rank(self.context) > 0

    def grown_to_fit(self) -> Deployment | None:
        """This, its GPUs doubled until it fits; None: not by MOST_GPUS, or one GPU an expert."""
        grown = self
        while not grown.fits:
            if 2 * grown.count > min(MOST_GPUS, self.model.n_routed_experts):
                return None
            grown = grown._doubled()
        return grown

    def _doubled(self) -> Deployment:
        """A lone attention rank grows up to a machine, then ranks are added; experts over all."""
        tp, count = 2 * self.tp, 2 * self.count
        grows = self.dp == 1 and tp <= MACHINE and self.model.num_attention_heads % tp == 0
        tp = tp if grows else self.tp
        return replace(self, count=count, tp=tp, dp=count // tp, ep=count)

    @property
    def _layers(self) -> int:
        more = self.model.num_nextn_predict_layers if self.mtp else 0
        return self.model.num_hidden_layers + more

    def _share(self, weight: Weight) -> float:
        if weight.split == "whole":
            return 1
        if weight.split == "tensor":
            return 1 / self.tp
        experts = self.model.n_routed_experts
        return -(-experts // self.ep) / experts * self.ep / self.count


def tokens_that_fit(space: float, bytes_per_token: int) -> int:
    """Whole pages of tokens in `space` bytes."""
    return max(0, int(space // (PAGE * bytes_per_token))) * PAGE


def _check(d: Deployment) -> None:
    heads = d.model.num_attention_heads
    for flag in ("count", "tp", "dp", "ep", "context", "prefill_chunk"):
        if getattr(d, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is {getattr(d, flag)}; allowed: an integer >= 1")
    if d.tp * d.dp != d.count:
        raise ValueError(
            f"--tp {d.tp} x --dp {d.dp} is {d.tp * d.dp} GPUs, but --count is {d.count}; leave "
            "--tp out to have it follow from the other two"
        )
    if heads % d.tp:
        works = [str(n) for n in range(1, heads + 1) if heads % n == 0 and d.count % n == 0]
        raise ValueError(
            f"--tp {d.tp} does not divide the {heads} attention heads of {d.model.name}; with "
            f"--count {d.count} use --tp {', '.join(works)} and --dp for the rest"
        )
    if d.count % d.ep or d.ep > d.model.n_routed_experts:
        works = [
            str(n) for n in range(1, min(d.count, d.model.n_routed_experts) + 1) if d.count % n == 0
        ]
        raise ValueError(
            f"--ep {d.ep} must divide --count {d.count} and not exceed the "
            f"{d.model.n_routed_experts} experts; use --ep {', '.join(works)}"
        )
    if d.weights_dtype == "fp8" and d.model.moe_intermediate_size * d.ep // d.count % WEIGHT_BLOCK:
        raise ValueError(
            f"experts of {d.model.moe_intermediate_size} split over {d.count // d.ep} GPUs are not "
            f"whole fp8 blocks of {WEIGHT_BLOCK}, which hosts refuse; use --ep {d.count}"
        )
    if d.context > d.model.max_position_embeddings:
        raise ValueError(
            f"--context {d.context} is longer than {d.model.name} takes: at most "
            f"{d.model.max_position_embeddings}"
        )
    if not 0 < d.memory_utilization <= 1:
        raise ValueError(
            f"--memory-utilization is {d.memory_utilization}; allowed: above 0, at most 1"
        )
