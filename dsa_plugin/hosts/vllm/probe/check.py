"""Prove that the plugin took: `python -m dsa_plugin.hosts.vllm.probe.check`.

This loads plugins as every vLLM process does and asks the host, not us, for each thing that was
registered. Exit code 0: all of it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from dsa_plugin.probe.checks import left_out, run_checks
from dsa_registry import all_entries


def entry_point() -> str | None:
    """vLLM finds us and is not told to leave us out."""
    from vllm import envs
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_general_plugins

    if reason := left_out(DEFAULT_PLUGINS_GROUP, "VLLM_PLUGINS", envs.VLLM_PLUGINS):
        return reason
    load_general_plugins()
    return None


def model_classes() -> str | None:
    """vLLM resolves every DSA architecture to our class, where we are to serve it."""
    from vllm.model_executor.models import ModelRegistry

    from dsa_plugin.hosts.takeover import decide
    from dsa_plugin.hosts.vllm.compat import native_path

    active, reason = decide("vLLM", native_path)
    for name in (name for entry in all_entries() for name in entry.architectures):
        registered: Any = ModelRegistry.models[name]
        if active != registered.module_name.startswith("dsa_plugin."):
            return f"{name} is {registered.module_name}, though {reason}"
    return None


def config_hooks() -> str | None:
    """vLLM asks us to check the configuration of every DSA architecture."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in (name for entry in all_entries() for name in entry.architectures):
        hook = MODELS_CONFIG_MAP[name]
        if not hook.__module__.startswith("dsa_plugin."):
            return f"{name} has {hook.__module__}.{hook.__name__}"
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "entry point": entry_point,
    "model classes": model_classes,
    "config hooks": config_hooks,
}

if __name__ == "__main__":
    sys.exit(run_checks(CHECKS))
