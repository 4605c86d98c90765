"""What of vLLM's settings the plugin does not serve, each with what would work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.hosts.refusal import read_path, refused_flags, refused_variables
from dsa_plugin.hosts.vllm.backend import index_cache_is_fp8
from dsa_plugin.hosts.vllm.kv_transfer import connector_faults
from dsa_plugin.hosts.vllm.refused import REFUSED
from dsa_plugin.hosts.vllm.rope import context_faults

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8_ds_mla")


def refused(vllm_config: VllmConfig) -> list[str]:
    """Every flag and variable that is refused whatever the model."""
    return [
        *refused_flags(REFUSED, lambda path: read_path(vllm_config, path)),
        *refused_variables(REFUSED, os.environ),
    ]


def unsupported(vllm_config: VllmConfig, config: DSAConfig) -> list[str]:
    """Every reason that depends on the model or on two flags; empty if there is none."""
    parallel = vllm_config.parallel_config
    return [
        *config.tensor_parallel_faults(parallel.tensor_parallel_size),
        *_pipeline(parallel.pipeline_parallel_size, config),
        *_drafts_in_stages(vllm_config),
        *context_faults(vllm_config.model_config),
        *connector_faults(vllm_config),
        *_caches(vllm_config.cache_config, str(vllm_config.model_config.dtype)),
    ]


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


def _drafts_in_stages(vllm_config: VllmConfig) -> list[str]:
    """vLLM's first model runner asks every stage for the draft, which the last one alone has.

    Source: v1/worker/gpu_model_runner.py, initialize_kv_cache_tensors and initialize_attn_backend.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if vllm_config.speculative_config is None or stages == 1:
        return []
    fault = (
        f"--speculative-config with --pipeline-parallel-size {stages}: vLLM's first model runner "
        "ends on the stages without the draft, and its second one was not run so with the plugin; "
        "drop one of the flags"
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
