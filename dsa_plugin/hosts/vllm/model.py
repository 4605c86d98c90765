"""vLLM's DeepSeek-V3.2 / GLM-5 models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import vllm
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2ForCausalLM

from dsa_plugin.hosts.vllm.attention import DSAAttention, DSAIndexer
from dsa_plugin.hosts.vllm.compat import attention_classes

NamedTensor = tuple[str, Tensor]


def _owning_key_projections(weights: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """The weights, with what the host keeps until its other half comes in memory of its own.

    deepseek_v2._try_load_fp8_indexer_wk holds an fp8 wk and its scale from one step of the iterator
    to a later one, while streaming loaders reuse their buffers (vllm#43163).
    """
    for name, tensor in weights:
        yield name, tensor.clone() if ".indexer.wk." in name else tensor


class DSAForCausalLM(DeepseekV2ForCausalLM):
    """DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with _our_attention():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_that_it_took(self)
        # The host refuses adapters of what this maps to nothing. One of kv_b_proj would be loaded
        # and change nothing: attention reads the matrices derived from it (vllm#48974).
        packed = DeepseekV2ForCausalLM.packed_modules_mapping
        self.packed_modules_mapping = {**packed, "kv_b_proj": []}

    def load_weights(self, weights: Iterable[NamedTensor]) -> set[str]:
        """The host's."""
        loaded: set[str] = super().load_weights(_owning_key_projections(weights))
        return loaded


class DSAMTP(DeepSeekMTP):
    """The multi-token-prediction draft; before 0.30 its architecture name covers dense V3 too."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa = hasattr(vllm_config.model_config.hf_config, "index_topk")
        with _our_attention() if dsa else nullcontext():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if dsa:
            check_that_it_took(self)

    def load_weights(self, weights: Iterable[NamedTensor]) -> set[str]:
        """The host's."""
        loaded: set[str] = super().load_weights(_owning_key_projections(weights))
        return loaded


def _our_attention() -> AbstractContextManager[None]:
    return attention_classes(Indexer=DSAIndexer, MultiHeadLatentAttentionWrapper=DSAAttention)


def check_that_it_took(model: nn.Module) -> None:
    """Refuse a model in which the host built a layer's attention in another way.

    Raises:
        RuntimeError: before weights load; such a layer would be served by nobody, or by the host.
    """
    layers = [m for m in model.modules() if isinstance(m, DeepseekV2DecoderLayer)]
    ours = [m for m in model.modules() if isinstance(m, DSAAttention)]
    if len(ours) != len(layers) or not layers:
        names = DeepseekV2DecoderLayer.__module__
        raise RuntimeError(
            f"dsa_plugin replaced the attention of {len(ours)} of {len(layers)} layers: vLLM "
            f"{vllm.__version__} no longer builds them by the names in {names} that the plugin "
            "replaces; install releases that go together, or set DSA_PLUGIN=off"
        )
