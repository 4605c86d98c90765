"""Who serves the DSA models in this process: the plugin or the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from dsa_plugin import env
from dsa_plugin.hosts.vllm.compat import MTP_ARCHITECTURES, native_path
from dsa_registry import all_entries

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODELS = "dsa_plugin.hosts.vllm.model"
_logger = init_logger("vllm.dsa_plugin")


def register_with_vllm() -> None:
    """Register model classes and config hooks under the architectures' own names.

    The names stay the host's because it keys tokenizer modes, CUDA-graph defaults and the MTP
    draft's config by them. The decision is logged by the hooks: vLLM loads its plugins before it
    sets up logging, and a user of another model need not hear of it.
    """
    active, reason = decide()
    for architecture in (name for entry in all_entries() for name in entry.architectures):
        if active:
            ModelRegistry.register_model(architecture, f"{_MODELS}:DSAForCausalLM")
            MODELS_CONFIG_MAP[architecture] = _serving_hook(reason)
        else:
            MODELS_CONFIG_MAP[architecture] = _leaving_hook(
                reason, MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
            )
    if active:
        for architecture in MTP_ARCHITECTURES:
            ModelRegistry.register_model(architecture, f"{_MODELS}:DSAMTP")


def decide() -> tuple[bool, str]:
    """Whether the plugin takes the DSA models, and why.

    A bad `DSA_PLUGIN` counts as active: the config hook then names it to a user of a DSA model.
    """
    try:
        mode = env.read(env.PLUGIN, os.environ)
    except ValueError as error:
        return True, str(error)
    if mode != "auto":
        return mode == "on", f"DSA_PLUGIN={mode}"
    native = native_path()
    if native is None:
        return True, "vLLM has no native path on this device (DSA_PLUGIN=auto)"
    return False, f"{native} (DSA_PLUGIN=auto; DSA_PLUGIN=on takes over)"


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
