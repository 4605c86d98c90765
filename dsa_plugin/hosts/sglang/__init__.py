"""SGLang adapter: the entry point that SGLang calls in each of its processes."""

from __future__ import annotations

import logging
from functools import cache

# SGLang's loggers have their modules' names; its handlers are the root logger's.
_logger = logging.getLogger(__name__)


@cache
def register() -> None:
    """Offer our model classes and attention backend for the DSA architectures.

    SGLang calls this in every process, whatever model it serves, before it reads its arguments. It
    logs an exception and goes on without the plugin, so nothing that concerns one model is raised
    here: see `config_hook`. `python -m dsa_plugin.hosts.sglang.probe.check` tells whether all of it
    took.
    """
    try:
        from dsa_plugin.hosts.sglang.registration import register_with_sglang

        register_with_sglang()
    except Exception:
        _logger.exception(
            "dsa_plugin could not register with this SGLang; DeepSeek Sparse Attention models are "
            "left to the host. Other models are not affected. "
            "Set DSA_PLUGIN=off to silence this, or report it with the traceback."
        )
