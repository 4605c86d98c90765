"""What the plugin checks and settles before vLLM builds anything for a DSA model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.hosts.checkpoint import check_checkpoint
from dsa_plugin.hosts.vllm.compat import leave_cpu_mla_backend

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig

_logger = init_logger("vllm.dsa_plugin")

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8_ds_mla")


def verify_and_update_config(vllm_config: VllmConfig, reason: str) -> None:
    """Refuse what we cannot serve, with every reason at once, and tell the host what we decided.

    Raises:
        ValueError: a setting, the model's config or its files rule out serving it.
    """
    Env.load()
    model_config = vllm_config.model_config
    hf_config = model_config.hf_config
    config = DSAConfig.from_hf(hf_config)
    reasons = [
        *config.tensor_parallel_faults(vllm_config.parallel_config.tensor_parallel_size),
        *_unsupported_parallelism(vllm_config.parallel_config, config),
        *_unsupported_cache(vllm_config.cache_config, str(model_config.dtype)),
    ]
    if reasons:
        raise ValueError("dsa_plugin cannot serve this model as asked:\n- " + "\n- ".join(reasons))
    if Path(model_config.model).is_dir():
        check_checkpoint(Path(model_config.model), config)

    for served in _model_configs(vllm_config):
        # In the host's own config language, so that the layers it builds agree with the registry:
        # it ignores HF's `indexer_types`, and HF drops the RoPE key on save.
        served.hf_config.indexer_rope_interleave = config.indexer_rope_interleave
        served.hf_config.index_topk_pattern = config.index_topk_pattern
        leave_cpu_mla_backend(served)
    if not vllm_config.cache_config.user_specified_block_size:
        vllm_config.cache_config.block_size = INDEX_PAGE
        vllm_config.cache_config.user_specified_block_size = True
    _logger.info(
        "dsa_plugin serves %s, as %s: %s",
        config.model_type,
        reason,
        config.summary(index_cache_fp8=index_cache_is_fp8()),
    )


def _model_configs(vllm_config: VllmConfig) -> list[ModelConfig]:
    """The model's own, and its MTP draft's."""
    speculative = vllm_config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    if draft is None or not hasattr(draft.hf_config, "index_topk"):
        return [vllm_config.model_config]
    return [vllm_config.model_config, draft]


def index_cache_is_fp8() -> bool:
    """`DSA_INDEX_CACHE_DTYPE`; auto is fp8 on an accelerator, the model's dtype on a CPU."""
    from vllm.platforms import current_platform

    return Env.load().index_cache_is_fp8("cpu" if current_platform.is_cpu() else "cuda")


def _unsupported_parallelism(parallel: ParallelConfig, config: DSAConfig) -> list[str]:
    from vllm.distributed.utils import get_pp_indices

    reasons = []
    stages = parallel.pipeline_parallel_size
    for stage in range(1, stages):
        first, _ = get_pp_indices(config.num_hidden_layers, stage, stages)
        if config.indexer_types[first] == "shared":
            reasons.append(
                f"--pipeline-parallel-size {stages}: stage {stage} would start at layer {first}, "
                "which reuses the selection of a layer on the stage before; choose another size, "
                "or VLLM_PP_LAYER_PARTITION so that each stage starts at a layer with an indexer"
            )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            flag = name.replace("_", "-")
            reasons.append(
                f"--{flag} {size}: the plugin keeps whole contexts on each rank; use --{flag} 1 "
                "and more tensor or data parallelism"
            )
    return reasons


def _unsupported_cache(cache: CacheConfig, model_dtype: str) -> list[str]:
    reasons = []
    dtype = cache.cache_dtype
    if dtype not in KV_CACHE_DTYPES or (
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
