"""vLLM's DeepSeek-V3.2 / GLM-5 models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import vllm
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2ForCausalLM

from dsa_plugin.hosts.vllm.attention import DSAAttention, DSAIndexer
from dsa_plugin.hosts.vllm.compat import attention_classes

NamedTensor = tuple[str, Tensor]
LoadWeights = Callable[[Any, Iterable[NamedTensor]], set[str]]


def _owning_key_projections(host_load_weights: LoadWeights) -> LoadWeights:
    """The host's, with what it keeps until its other half comes in memory of its own.

    deepseek_v2._try_load_fp8_indexer_wk holds an fp8 wk and its scale from one step of the iterator
    to a later one, while streaming loaders reuse their buffers (vllm#43163).
    """

    def load_weights(self: Any, weights: Iterable[NamedTensor]) -> set[str]:
        owned = ((name, t.clone() if ".indexer.wk." in name else t) for name, t in weights)
        return host_load_weights(self, owned)

    return load_weights


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

    load_weights = _owning_key_projections(DeepseekV2ForCausalLM.load_weights)


class DSAMTP(DeepSeekMTP):
    """The multi-token-prediction draft; before 0.30 its architecture name covers dense V3 too."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa = hasattr(vllm_config.model_config.hf_config, "index_topk")
        with _our_attention() if dsa else nullcontext():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if dsa:
            check_that_it_took(self)

    load_weights = _owning_key_projections(DeepSeekMTP.load_weights)


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
