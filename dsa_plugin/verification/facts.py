"""What of DSA's variants a checkpoint uses, as the plugin reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsa_plugin.config import DSAConfig
from dsa_plugin.doctor.checkpoint import decisions
from dsa_plugin.env import Env
from dsa_plugin.training.sizes import read_rope, yarn_mscale
from dsa_plugin.verification.headers import Headers
from dsa_plugin.verification.reference import softmax_scale

_PROJECTIONS = ("q_b_proj", "indexer.wq_b", "indexer.wk", "indexer.weights_proj")


def facts_of(config: Mapping[str, Any], headers: Headers) -> dict[str, str]:
    """Name -> value, for people.

    Raises:
        ValueError: config.json is not a DSA model's.
    """
    dsa, decided = DSAConfig.from_hf(config), decisions(config, Env.load())
    theta, scaling = read_rope(config)
    mscale = yarn_mscale(scaling)
    head_dim = dsa.qk_nope_head_dim + dsa.qk_rope_head_dim
    scale = softmax_scale(head_dim, mscale)
    yarn = "no scaling" if scaling is None else f"YaRN factor {scaling.get('factor'):g}"
    sharing = decided["sharing"] if "S" in decided["sharing"] else "none"
    return {
        "model": dsa.model_type,
        "indexer RoPE": f"{decided['indexer_rope']} (from {decided['indexer_rope_from']})",
        "MLA RoPE": f"interleaved, theta {theta or 0:g}, {yarn}",
        "softmax scale": f"{scale:.6g} = {head_dim}^-0.5 * {mscale:.6g}^2",
        "index_topk": str(dsa.index_topk),
        "sharing": sharing,
        "weights": ", ".join(f"{name} {_stored(headers, name)}" for name in _PROJECTIONS),
        "index cache here": decided["index_cache"],
    }


def _stored(headers: Headers, projection: str) -> str:
    """Dtypes of a projection in all layers, the commonest first."""
    found = Counter(
        tensor["dtype"]
        for name, tensor in headers.tensors.items()
        if f".self_attn.{projection}." in name and "scale" not in name and "bias" not in name
    )
    return "/".join(dtype for dtype, _ in found.most_common()) or "none"
