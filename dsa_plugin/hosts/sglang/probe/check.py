"""Prove that the plugin took: `python -m dsa_plugin.hosts.sglang.probe.check`.

SGLang logs a plugin's failure and serves without it. This loads plugins as every SGLang process
does and asks the host, not us, for each thing that was registered. Exit code 0: all of it is there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dsa_plugin.probe.checks import left_out, run_checks
from dsa_registry import all_entries


def entry_point() -> str | None:
    """SGLang finds us and is not told to leave us out."""
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins

    if os.environ.get("DSA_PLUGIN") == "off":
        return "DSA_PLUGIN=off: unset it"
    allowed = os.environ.get("SGLANG_PLUGINS")
    names = allowed.split(",") if allowed else None
    if reason := left_out(GENERAL_PLUGINS_GROUP, "SGLANG_PLUGINS", names):
        return reason
    load_plugins()
    return None


def resolution_hook() -> str | None:
    """Our step is in the resolution of arguments."""
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS

    from dsa_plugin.hosts.sglang.names import RESOLUTION_STEP
    from dsa_plugin.hosts.sglang.registration import _resolve

    return None if _resolve in _HOOKS.get(RESOLUTION_STEP, []) else f"not in {RESOLUTION_STEP}"


def pool_hook() -> str | None:
    """SGLang's platform asks us for the cache pool."""
    from sglang.srt.platforms.interface import SRTPlatform
    from sglang.srt.plugins.hook_registry import HookRegistry

    from dsa_plugin.hosts.sglang.compat import POOL_HOOK

    if POOL_HOOK not in HookRegistry._patched:
        return f"{POOL_HOOK} was not patched"
    wrapped = hasattr(getattr(SRTPlatform, POOL_HOOK.rpartition(".")[2]), "__wrapped__")
    return None if wrapped else f"{POOL_HOOK} is the host's own"


def model_classes() -> str | None:
    """The host's model registry resolves every DSA architecture to our class."""
    from sglang.srt.models.registry import ModelRegistry

    from dsa_plugin.hosts.sglang.names import MODELS

    for name in (name for entry in all_entries() for name in entry.architectures):
        cls, _ = ModelRegistry.resolve_model_cls(name)
        if not cls.__module__.startswith(MODELS):
            package = os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS)
            remedy = "" if package == MODELS else f": unset SGLANG_EXTERNAL_MODEL_PACKAGE={package}"
            return f"{name} is {cls.__module__}.{cls.__name__}{remedy}"
    return None


def attention_backend() -> str | None:
    """The host can build our attention backend by its name."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from dsa_plugin.hosts.sglang.names import BACKEND

    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        return f"{BACKEND} is not among the choices of --attention-backend"
    return None if BACKEND in ATTENTION_BACKENDS else f"{BACKEND} is not registered"


def draft_backends() -> str | None:
    """The MTP draft can run on our backend."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    from dsa_plugin.hosts.sglang.install import install

    install()
    wrapped = hasattr(DraftBackendFactory._create_backend, "__wrapped__")
    return None if wrapped else "DraftBackendFactory is the host's own"


CHECKS: dict[str, Callable[[], str | None]] = {
    "entry point": entry_point,
    "resolution hook": resolution_hook,
    "cache pool hook": pool_hook,
    "model classes": model_classes,
    "attention backend": attention_backend,
    "draft backends": draft_backends,
}

if __name__ == "__main__":
    sys.exit(run_checks(CHECKS))
