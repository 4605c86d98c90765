"""What is registered in each process, before SGLang reads its arguments.

Nothing here asks for the device or the model: both are known when `config_hook` resolves the
arguments, and its decision, the attention backend's name, is what every other part goes by.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsa_plugin.hosts.sglang.compat import POOL_HOOK
from dsa_plugin.hosts.sglang.names import BACKEND, MODELS, RESOLUTION_STEP

if TYPE_CHECKING:
    from collections.abc import Callable


def register_with_sglang() -> None:
    """Register model classes, attention backend, resolution hook and cache pool.

    The architectures keep the host's names, since it keys whether a model has DSA at all, its MTP
    draft and its MoE settings by them.
    """
    if os.environ.get("DSA_PLUGIN") == "off":
        return
    # One package alone can be named; a user's own is not replaced, and config_hook says so.
    if not envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get():
        envs.SGLANG_EXTERNAL_MODEL_PACKAGE.set(MODELS)
    add_attention_backend_choices([BACKEND])
    register_resolution_hook(RESOLUTION_STEP)(_resolve)
    HookRegistry.register(POOL_HOOK, _pool_class, HookType.AROUND)


def _resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    from dsa_plugin.hosts.sglang.config_hook import resolve

    resolve(server_args, previous)


def _pool_class(hosts: Callable[..., type | None], platform: Any, **kind: str) -> type | None:
    if kind in ({"kind": "dsa"}, {}):
        from dsa_plugin.hosts.sglang.pool import pool_class

        ours = pool_class()
        if ours is not None:
            return ours
    return hosts(platform, **kind)
