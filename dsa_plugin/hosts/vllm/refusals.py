"""What of vLLM's settings the plugin does not serve, each with what would work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.hosts.vllm.backend import index_cache_is_fp8
from dsa_plugin.hosts.vllm.kv_transfer import connector_faults
from dsa_plugin.hosts.vllm.rope import context_faults

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ParallelConfig, VllmConfig

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8_ds_mla")


def unsupported(vllm_config: VllmConfig, config: DSAConfig) -> list[str]:
    """Every reason against serving the model so; empty if there is none."""
    parallel = vllm_config.parallel_config
    return [
        *config.tensor_parallel_faults(parallel.tensor_parallel_size),
        *_parallelism(parallel, config),
        *context_faults(vllm_config.model_config),
        *connector_faults(vllm_config),
        *_environment(),
        *_caches(vllm_config.cache_config, str(vllm_config.model_config.dtype)),
    ]


def _parallelism(parallel: ParallelConfig, config: DSAConfig) -> list[str]:
    reasons = _pipeline(parallel.pipeline_parallel_size, config)
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            flag = name.replace("_", "-")
            reasons.append(
                f"--{flag} {size}: the plugin keeps whole contexts on each rank; use --{flag} 1 "
                "and more tensor or data parallelism"
            )
    if getattr(parallel, "use_ubatching", parallel.enable_dbo):
        flag = "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}"
        reasons.append(
            f"{flag}: the micro-batches of a step share one buffer of selected tokens, which one "
            "would write before the other's layers have read theirs; drop the flag"
        )
    return reasons


def _pipeline(stages: int, config: DSAConfig) -> list[str]:
    from vllm.distributed.utils import get_pp_indices

    starts = {n: get_pp_indices(config.num_hidden_layers, n, stages)[0] for n in range(1, stages)}
    without = {n: start for n, start in starts.items() if config.indexer_types[start] == "shared"}
    if not without:
        return []
    stage, start = next(iter(without.items()))
    remedy = "choose another size"
    if partition := config.pipeline_partition(stages):
        remedy = f"set VLLM_PP_LAYER_PARTITION={','.join(map(str, partition))}"
    fault = (
        f"--pipeline-parallel-size {stages}: stage {stage} would start at layer {start}, which "
        f"reuses the selection of a layer on the stage before; {remedy}"
    )
    return [fault]


def _environment() -> list[str]:
    if not getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return []
    fault = (
        "VLLM_BATCH_INVARIANT=1: the kernels divide a request's tokens by the shape of the batch, "
        "so that rounding depends on what else is in it; unset it"
    )
    return [fault]


def _caches(cache: CacheConfig, model_dtype: str) -> list[str]:
    reasons = []
    dtype = cache.cache_dtype
    if dtype not in _KV_CACHE_DTYPES or (
        dtype in ("float16", "bfloat16") and not model_dtype.endswith(dtype)
    ):
        reasons.append(
            f"--kv-cache-dtype {dtype} with a {model_dtype} model: the latent cache is kept in the "
            "model's dtype (auto) or as fp8_ds_mla (656 bytes a token); choose one of these"
        )
    if index_cache_is_fp8() and cache.user_specified_block_size and cache.block_size != INDEX_PAGE:
        reasons.append(
            f"--block-size {cache.block_size}: pages of the fp8 index cache hold {INDEX_PAGE} "
            f"tokens; drop the flag, or set DSA_INDEX_CACHE_DTYPE=model"
        )
    return reasons
