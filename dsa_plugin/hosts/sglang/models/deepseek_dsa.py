"""SGLang's DSA models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding. Classes
have the architectures' names, by which SGLang finds them. Where the resolved attention backend is
not ours (another device, `--attention-backend`, a dense draft), they are the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from sglang.srt.models import deepseek_nextn, deepseek_v2, glm4_moe
from sglang.srt.runtime_context import attention_backends, get_parallel
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.hosts.replaced_names import replaced_names
from dsa_plugin.hosts.sglang.attention import DSAAttention, DSAIndexer
from dsa_plugin.hosts.sglang.indexer_weights import FP8_BLOCK, load_projections
from dsa_plugin.hosts.sglang.install import install
from dsa_plugin.hosts.sglang.names import BACKEND

_logger = logging.getLogger("dsa_plugin.hosts.sglang")


class _WithOurAttention:
    """Build the host's model with our attention classes; a mixin before the host's class."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        is_dsa = getattr(config, "index_topk", None) is not None
        ours = is_dsa and BACKEND in attention_backends()
        if ours:
            install()
        # The decoder layer and the attention look these names up as globals of their module, and
        # take no class argument.
        names = {"DeepseekV2AttentionMLA": DSAAttention, "Indexer": DSAIndexer} if ours else {}
        with replaced_names(deepseek_v2, **names):
            super().__init__(config, quant_config=quant_config, prefix=prefix)  # type: ignore[call-arg]
        if ours:
            self._say_what_was_built(DSAConfig.from_hf(config))
        elif is_dsa:
            _say(f"leaves {self._describe()} to SGLang: attention backends {attention_backends()}")

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint's tensors, or an update's; those of indexers are not left to the host."""
        block = getattr(self.quant_config, "weight_block_size", None)  # type: ignore[attr-defined]
        weights = load_projections(weights, self._indexers(), block or FP8_BLOCK)
        super().load_weights(weights, *args, **kwargs)  # type: ignore[misc]

    def post_load_weights(
        self, is_nextn: bool = False, weight_names: Iterable[str] | None = None
    ) -> None:
        """After every load: the host splits kv_b_proj into W_UK and W_UV, which we then read."""
        super().post_load_weights(is_nextn=is_nextn, weight_names=weight_names)  # type: ignore[misc]
        for layer in self._modules_of(DSAAttention):
            layer.read_weights()

    def _modules_of(self, cls: type) -> list[Any]:
        return [m for m in self.modules() if isinstance(m, cls)]  # type: ignore[attr-defined]

    def _indexers(self) -> dict[str, DSAIndexer]:
        """By their names in a checkpoint, where the MTP layer comes after all others."""
        draft = f"model.layers.{self.config.num_hidden_layers}."  # type: ignore[attr-defined]
        return {
            name.replace("model.decoder.", draft): module
            for name, module in self.named_modules()  # type: ignore[attr-defined]
            if isinstance(module, DSAIndexer)
        }

    def _describe(self) -> str:
        return f"{type(self).__name__} ({self.config.model_type})"  # type: ignore[attr-defined]

    def _say_what_was_built(self, config: DSAConfig) -> None:
        """Counted in the model: a plugin that did not take must not say that it did."""
        layers = self._modules_of(DSAAttention)
        if len(layers) != len(self._modules_of(deepseek_v2.DeepseekV2AttentionMLA)) or not layers:
            raise RuntimeError(
                f"dsa_plugin replaced the attention of {len(layers)} layers of {self._describe()}, "
                "not of all: this SGLang builds them in another way. Set DSA_PLUGIN=off"
            )
        fp8 = Env.load().index_cache_is_fp8(layers[0].kv_b_proj.weight.device.type)
        draft = isinstance(self, deepseek_nextn.DeepseekV3ForCausalLMNextN)
        of = "its MTP layer" if draft else config.summary(index_cache_fp8=fp8)
        _say(f"serves {self._describe()}: attention of {len(layers)} layers replaced; {of}")


def _say(what: str) -> None:
    """Once for all ranks."""
    if get_parallel().tp_rank == 0:
        _logger.info("dsa_plugin %s", what)


class DeepseekV32ForCausalLM(_WithOurAttention, deepseek_v2.DeepseekV32ForCausalLM):
    """DeepSeek-V3.2."""


class GlmMoeDsaForCausalLM(_WithOurAttention, glm4_moe.GlmMoeDsaForCausalLM):
    """GLM-5 to 5.3."""


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
