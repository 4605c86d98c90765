"""SGLang's DSA models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding. Classes
have the architectures' names, by which SGLang finds them. Where the resolved attention backend is
not ours (another device, `--attention-backend`, a dense draft), they are the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from sglang.srt.models import deepseek_nextn, deepseek_v2, glm4_moe
from sglang.srt.runtime_context import attention_backends, get_parallel

from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.hosts.sglang.attention import DSAAttention, DSAIndexer
from dsa_plugin.hosts.sglang.compat import BACKEND
from dsa_plugin.replaced_names import replaced_names

_logger = logging.getLogger("dsa_plugin.hosts.sglang")


class _WithOurAttention:
    """Build the host's model with our attention classes; a mixin before the host's class."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        ours = BACKEND in attention_backends() and hasattr(config, "index_topk")
        # The decoder layer and the attention look these names up as globals of their module, and
        # take no class argument.
        swap = replaced_names(deepseek_v2, DeepseekV2AttentionMLA=DSAAttention, Indexer=DSAIndexer)
        with swap if ours else nullcontext():
            super().__init__(config, quant_config=quant_config, prefix=prefix)  # type: ignore[call-arg]
        self._log(config)

    def post_load_weights(
        self, is_nextn: bool = False, weight_names: Iterable[str] | None = None
    ) -> None:
        """After every load: the host splits kv_b_proj into W_UK and W_UV, which we then read."""
        super().post_load_weights(is_nextn=is_nextn, weight_names=weight_names)  # type: ignore[misc]
        for layer in self._our_layers():
            layer.read_weights()

    def _our_layers(self) -> list[DSAAttention]:
        return [m for m in self.modules() if isinstance(m, DSAAttention)]  # type: ignore[attr-defined]

    def _log(self, config: Any) -> None:
        """One line, counted from what was built: a plugin that did not take must not say it did."""
        parallel = get_parallel()
        if parallel.tp_rank != 0:
            return
        layers = self._our_layers()
        name = f"{type(self).__name__} ({config.model_type})"
        if not layers:
            _logger.info(
                "dsa_plugin leaves %s to SGLang: attention backend %s", name, attention_backends()
            )
            return
        device = str(layers[0].kv_b_proj.weight.device.type)
        _logger.info(
            "dsa_plugin serves %s: attention of %d layers replaced; %s",
            name,
            len(layers),
            DSAConfig.from_hf(config).summary(
                index_cache_fp8=Env.load().index_cache_is_fp8(device)
            ),
        )


class DeepseekV32ForCausalLM(_WithOurAttention, deepseek_v2.DeepseekV32ForCausalLM):
    """DeepSeek-V3.2."""


class GlmMoeDsaForCausalLM(_WithOurAttention, glm4_moe.GlmMoeDsaForCausalLM):
    """GLM-5 to 5.2."""


class DeepseekV3ForCausalLMNextN(_WithOurAttention, deepseek_nextn.DeepseekV3ForCausalLMNextN):
    """The MTP draft of DeepSeek models, dense ones too."""


class GlmMoeDsaForCausalLMNextN(_WithOurAttention, glm4_moe.GlmMoeDsaForCausalLMNextN):
    """The MTP draft of GLM's."""


EntryClass = [
    DeepseekV32ForCausalLM,
    GlmMoeDsaForCausalLM,
    DeepseekV3ForCausalLMNextN,
    GlmMoeDsaForCausalLMNextN,
]
