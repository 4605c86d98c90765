"""Who serves the DSA models in this process: the plugin or the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from dsa_plugin.hosts.takeover import decide
from dsa_plugin.hosts.vllm.compat import MTP_ARCHITECTURES, native_path
from dsa_registry import all_entries

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODELS = "dsa_plugin.hosts.vllm.model"
OUR_MODEL = (_MODELS, "DSAForCausalLM")
"""Module and class that serve a DSA model."""
_logger = init_logger("vllm.dsa_plugin")


def register_with_vllm() -> None:
    """Register model classes and config hooks under the architectures' own names.

    The names stay the host's because it keys tokenizer modes, CUDA-graph defaults and the MTP
    draft's config by them. The decision is logged by the hooks: vLLM loads its plugins before it
    sets up logging, and a user of another model need not hear of it.
    """
    active, reason = decide("vLLM", native_path)
    for architecture in (name for entry in all_entries() for name in entry.architectures):
        if active:
            ModelRegistry.register_model(architecture, ":".join(OUR_MODEL))
            MODELS_CONFIG_MAP[architecture] = _serving_hook(reason)
        else:
            MODELS_CONFIG_MAP[architecture] = _leaving_hook(
                reason, MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
            )
    if active:
        for architecture in MTP_ARCHITECTURES:
            ModelRegistry.register_model(architecture, f"{_MODELS}:DSAMTP")


def _serving_hook(reason: str) -> type[VerifyAndUpdateConfig]:
    class Serving(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            from dsa_plugin.hosts.vllm.config_hook import verify_and_update_config

            verify_and_update_config(vllm_config, reason)

    return Serving


def _leaving_hook(reason: str, hosts: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    class Leaving(hosts):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            _logger.info("dsa_plugin leaves this model to vLLM: %s", reason)
            hosts.verify_and_update_config(vllm_config)

    return Leaving
