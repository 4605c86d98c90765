"""vLLM adapter: the entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import logging
from functools import cache

_logger = logging.getLogger("vllm.dsa_plugin")


@cache
def register() -> None:
    """Offer our classes for the DSA architectures, where `DSA_PLUGIN` and the device say so.

    vLLM calls this in every process, whatever model it serves, and dies if it raises; so nothing
    here does. What is wrong with our settings is raised later, and only to a user of a DSA model:
    see `config_hook`.
    """
    try:
        from dsa_plugin.hosts.vllm.registration import register_with_vllm

        register_with_vllm()
    except Exception:
        _logger.exception(
            "dsa_plugin could not register with this vLLM; DeepSeek Sparse Attention models are "
            "left to the host. Other models are not affected. "
            "Set DSA_PLUGIN=off to silence this, or report it with the traceback."
        )
