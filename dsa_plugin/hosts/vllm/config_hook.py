"""What the plugin checks and settles before vLLM builds anything for a DSA model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.hosts.checkpoint import check_checkpoint
from dsa_plugin.hosts.refusal import attempt, refuse
from dsa_plugin.hosts.vllm.backend import index_cache_is_fp8
from dsa_plugin.hosts.vllm.compat import leave_cpu_mla_backend, split_at_attention
from dsa_plugin.hosts.vllm.refusals import refused, unsupported
from dsa_plugin.hosts.vllm.rope import cover_context

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

_logger = init_logger("vllm.dsa_plugin")


def verify_and_update_config(vllm_config: VllmConfig, reason: str) -> None:
    """Refuse what we cannot serve, with every reason at once, and tell the host what we decided.

    Raises:
        ValueError: a setting, the model's config or its files rule out serving it.
    """
    model_config = vllm_config.model_config
    hf_config = model_config.hf_config
    _settle_cache_dtype(vllm_config.cache_config)
    reasons: list[str] = []
    env = attempt(reasons, Env.load)
    config = attempt(reasons, lambda: DSAConfig.from_hf(hf_config))
    reasons += refused(vllm_config)
    if env and config:
        reasons += unsupported(vllm_config, config)
        folder = Path(model_config.model)
        if folder.is_dir():
            # The host joins the two in one bf16 parameter, and dequantises an fp8 wk for it.
            fused = {"wk": True, "weights_proj": False}
            attempt(reasons, lambda: check_checkpoint(folder, config, unquantised=fused))
    refuse(reasons)
    assert config is not None

    for served in _model_configs(vllm_config):
        # In the host's own config language, so that the layers it builds agree with the registry:
        # it ignores HF's `indexer_types`, and HF drops the RoPE key on save.
        served.hf_config.indexer_rope_interleave = config.indexer_rope_interleave
        served.hf_config.index_topk_pattern = config.index_topk_pattern
        cover_context(served)
        leave_cpu_mla_backend(served)
    if not vllm_config.cache_config.user_specified_block_size:
        vllm_config.cache_config.block_size = INDEX_PAGE
        vllm_config.cache_config.user_specified_block_size = True
    split_at_attention(vllm_config.compilation_config)
    _logger.info(
        "dsa_plugin serves %s, as %s: %s",
        config.model_type,
        reason,
        config.summary(index_cache_fp8=index_cache_is_fp8()),
    )


def _settle_cache_dtype(cache: CacheConfig) -> None:
    """vLLM's sparse backends take these names for their own layout, and users for any fp8."""
    if cache.cache_dtype in ("fp8", "fp8_e4m3"):
        _logger.info(
            "--kv-cache-dtype %s is fp8_ds_mla here: 656 bytes a token, with scales of its own",
            cache.cache_dtype,
        )
        cache.cache_dtype = "fp8_ds_mla"


def _model_configs(vllm_config: VllmConfig) -> list[ModelConfig]:
    """The model's own, and its MTP draft's."""
    speculative = vllm_config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    if draft is None or not hasattr(draft.hf_config, "index_topk"):
        return [vllm_config.model_config]
    return [vllm_config.model_config, draft]
