"""vLLM's DeepSeek-V3.2 / GLM-5 models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

from dsa_plugin.hosts.vllm.attention import DSAAttention, DSAIndexer
from dsa_plugin.hosts.vllm.compat import attention_classes


class DSAForCausalLM(DeepseekV2ForCausalLM):
    """DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with _our_attention():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class DSAMTP(DeepSeekMTP):
    """The multi-token-prediction draft; before 0.30 its architecture name covers dense V3 too."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa = hasattr(vllm_config.model_config.hf_config, "index_topk")
        with _our_attention() if dsa else nullcontext():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


def _our_attention() -> AbstractContextManager[None]:
    return attention_classes(Indexer=DSAIndexer, MultiHeadLatentAttentionWrapper=DSAAttention)
