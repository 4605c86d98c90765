"""What of SGLang's settings the plugin does not serve, each with what would work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.hosts.refusal import read_path, refused_flags, refused_variables
from dsa_plugin.hosts.sglang.compat import attention_tp_size, has_pool_hook
from dsa_plugin.hosts.sglang.refused import REFUSED

_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def refused(view: Any, given: Mapping[str, Any]) -> list[str]:
    """Every flag and variable that is refused whatever the model.

    Args:
        view: the arguments as resolved so far.
        given: the arguments as the user gave them.
    """
    places = SimpleNamespace(view=view, given=SimpleNamespace(**given))
    return [
        *refused_flags(REFUSED, lambda path: read_path(places, path)),
        *refused_variables(REFUSED, os.environ),
    ]


def unsupported(
    view: Any,
    raw: Mapping[str, Any],
    config: DSAConfig,
    *,
    model_dtype: torch.dtype,
    index_cache_fp8: bool,
) -> list[str]:
    """Every reason that depends on the model or on two settings; empty if there is none.

    Args:
        view: the arguments as resolved so far.
        raw: the arguments as the user gave them.
        config: the model's numbers.
        model_dtype: of activations.
        index_cache_fp8: whether index keys are cached in fp8.
    """
    return [
        *config.tensor_parallel_faults(attention_tp_size(view)),
        *_drafts_in_stages(view, raw),
        *_recording(view, raw),
        *_caches(raw, model_dtype, index_cache_fp8),
    ]


def _drafts_in_stages(view: Any, raw: Mapping[str, Any]) -> list[str]:
    """SGLang refuses them too, where SGLANG_ENABLE_PP_SPEC is not set.

    Source: arg_groups/validation_hook.py, check_pipeline_parallel_compat.
    """
    if raw["speculative_algorithm"] is None or view.pp_size == 1:
        return []
    fault = (
        f"--speculative-algorithm {raw['speculative_algorithm']} with --pp-size {view.pp_size}: "
        "drafts were not run on pipeline stages with the plugin; drop one of the flags"
    )
    return [fault]


def _recording(view: Any, raw: Mapping[str, Any]) -> list[str]:
    """What the host's recorder of selections, one of a rank's own layers and rows, leaves out."""
    if not getattr(view, "enable_return_indexer_topk", False):
        return []
    ranks = attention_tp_size(view)
    reasons = {
        f"with {ranks} ranks to an attention: the host records on ranks of their own alone; use "
        "--enable-dp-attention with --dp as large as --tp": ranks > 1,
        f"with --pp-size {view.pp_size}: the last stage would return its own layers' alone; use "
        "--pp-size 1": view.pp_size > 1,
        "with --speculative-algorithm: a draft's selection would take layer 0's place; drop one": (
            raw["speculative_algorithm"] is not None
        ),
    }
    return [f"--enable-return-indexer-topk {why}" for why, holds in reasons.items() if holds]


def _caches(raw: Mapping[str, Any], model_dtype: torch.dtype, index_cache_fp8: bool) -> list[str]:
    reasons = []
    dtype = raw["kv_cache_dtype"]
    if dtype not in ("auto", "fp8_e4m3") and _DTYPES.get(dtype) != model_dtype:
        reasons.append(
            f"--kv-cache-dtype {dtype} with a {model_dtype} model: the latent cache is kept in the "
            "model's dtype (auto) or in 656 bytes a token (fp8_e4m3); choose one of these"
        )
    if raw["page_size"] not in (None, INDEX_PAGE):
        reasons.append(
            f"--page-size {raw['page_size']}: pages hold {INDEX_PAGE} tokens; drop the flag"
        )
    if not index_cache_fp8 and not has_pool_hook():
        reasons.append(
            "DSA_INDEX_CACHE_DTYPE=model: this SGLang has no hook for the cache pool; use fp8, or "
            "SGLang 0.5.22 or later"
        )
    return reasons
