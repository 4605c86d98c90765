"""What the plugin checks and settles while SGLang resolves its arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.connector import ConnectorType
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.utils.common import parse_connector_type

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.hosts.checkpoint import check_checkpoint
from dsa_plugin.hosts.refusal import attempt, refuse
from dsa_plugin.hosts.sglang.compat import native_path
from dsa_plugin.hosts.sglang.names import BACKEND, MODELS
from dsa_plugin.hosts.sglang.refusals import refused, unsupported
from dsa_plugin.hosts.takeover import decide
from dsa_registry import all_entries

_logger = logging.getLogger("dsa_plugin.hosts.sglang")


def resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's step `handle_model_specific_adjustments`, around the host's own.

    Raises:
        ValueError: a setting, the model's config or its files rule out serving it; all reasons at
            once.
    """
    hf_config = _dsa_config(server_args)
    if hf_config is None:
        previous(server_args)
        return
    active, reason = _decide(server_args, hf_config.model_type)
    if not active:
        _logger.info("dsa_plugin leaves this model to SGLang: %s", reason)
        previous(server_args)
        return
    config = _checked(server_args, hf_config)

    def declare(**fields: Any) -> None:
        declare_resolution(server_args, "dsa_plugin", **fields)

    # Before the host's step, which fills in its own where none is set.
    declare(
        attention_backend=BACKEND, prefill_attention_backend=None, decode_attention_backend=None
    )
    previous(server_args)
    # After it, which chose caches and kernels for its own backend.
    declare(
        page_size=INDEX_PAGE,
        kv_cache_dtype=server_args._raw_input["kv_cache_dtype"],
        dsa_prefill_backend=None,
        dsa_decode_backend=None,
        # The indexer's launches depend on the lengths of the requests.
        cuda_graph_config=with_phase(
            resolving_view(server_args).cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED
        ),
    )
    _logger.info("dsa_plugin will serve %s, as %s", config.model_type, reason)


def _dsa_config(server_args: Any) -> Any | None:
    """The model's HF config if it is a DSA model."""
    if parse_connector_type(resolving_view(server_args).model_path) == ConnectorType.INSTANCE:
        return None
    hf_config = model_config_of(server_args).hf_config
    architectures = {name for entry in all_entries() for name in entry.architectures}
    return hf_config if architectures & set(hf_config.architectures or ()) else None


def _decide(server_args: Any, model_type: str) -> tuple[bool, str]:
    """Whether we serve it, and why: a backend that the user named decides before DSA_PLUGIN=auto.

    Raises:
        ValueError: DSA_PLUGIN=on, and a backend of the host's was named.
    """
    active, reason = decide("SGLang", lambda: native_path(model_type))
    # The user's own: on a CPU the host has filled one in by now.
    raw = server_args._raw_input
    fields = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    named = sorted({raw[field] for field in fields} - {None})
    if not named:
        return active, reason
    flag = f"--attention-backend {', '.join(named)}"
    if named == [BACKEND]:
        return True, flag
    if reason == "DSA_PLUGIN=on":
        raise ValueError(
            f"DSA_PLUGIN=on and {flag} contradict each other: drop the flag, name {BACKEND}, or "
            "unset DSA_PLUGIN"
        )
    return False, flag


def _checked(server_args: Any, hf_config: Any) -> DSAConfig:
    view = resolving_view(server_args)
    model = model_config_of(server_args)
    reasons: list[str] = []
    env = attempt(reasons, Env.load)
    config = attempt(reasons, lambda: DSAConfig.from_hf(hf_config))
    reasons += refused(view, server_args._raw_input)
    if env and config:
        reasons += unsupported(
            view,
            server_args._raw_input,
            config,
            model_dtype=model.dtype,
            index_cache_fp8=env.index_cache_is_fp8(torch.device(view.device).type),
        )
    package = envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get()
    if package != MODELS:
        reasons.append(
            f"SGLANG_EXTERNAL_MODEL_PACKAGE={package}: SGLang takes model classes from one package "
            "alone, and this one would hide the plugin's; unset it, or set DSA_PLUGIN=off"
        )
    folder = Path(model.model_path)
    if config and folder.is_dir():
        unquantised = {"wk": True, "weights_proj": True}
        attempt(reasons, lambda: check_checkpoint(folder, config, unquantised=unquantised))
    refuse(reasons)
    assert config is not None
    return config
