"""What a checkpoint's config.json contradicts: the registry, and what was published of its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from dsa_plugin.config import DSAConfig
from dsa_plugin.training.sizes import read_rope
from dsa_plugin.verification.findings import Finding
from dsa_registry import Checkpoint, lookup
from dsa_registry.schema import AttentionSizes

_RESTORE = "restore the checkpoint's own config.json"
_STYLES = {True: "interleaved", False: "half-split"}
# Of a release's sizes, what a user may have changed without its weights.
_CHANGEABLE = {"index_topk", "num_nextn_predict_layers"}


def check_settings(config: Mapping[str, Any], dsa: DSAConfig) -> list[Finding]:
    """Contradictions; a model of no published size is compared with its family alone.

    Raises:
        ValueError: RoPE is scaled in a way that no DSA model has.
    """
    entry = lookup(dsa.model_type)
    found = []
    if dsa.indexer_rope_interleave != entry.indexer_rope_interleave:
        given, right = (
            _STYLES[style] for style in (dsa.indexer_rope_interleave, entry.indexer_rope_interleave)
        )
        what = f"says {given}; every {dsa.model_type} indexer was trained {right}"
        found.append(Finding("wrong", "indexer_rope_interleave", what, _RESTORE))
    if (style := config.get("rope_interleave")) is False:
        what = f"is {style}; MLA's own RoPE is interleaved in every DSA model"
        found.append(Finding("wrong", "rope_interleave", what, _RESTORE))
    found += _rope_faults(config)
    published = [c for c in entry.checkpoints if _same_size(c, dsa)]
    differences = [list(_differences(config, dsa, checkpoint)) for checkpoint in published]
    return found + min(differences, key=len, default=[])


def _rope_faults(config: Mapping[str, Any]) -> Iterator[Finding]:
    theta, scaling = read_rope(config)
    told = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is None:
        what = "is in config.json nowhere; engines then take one of their own"
        yield Finding("wrong", "rope_theta", what, _RESTORE)
    elif told is not None and config.get("rope_theta") not in (None, told):
        what = f"is {config['rope_theta']} beside {told} in rope_parameters"
        yield Finding("wrong", "rope_theta", what, _RESTORE)
    if scaling is None:
        return
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in scaling]
    if missing:
        raise ValueError(f"config.json scales RoPE by YaRN and lacks {', '.join(missing)}")
    if scaling.get("mscale", 1.0) != scaling.get("mscale_all_dim", 1.0):
        what = "mscale and mscale_all_dim differ, which would scale cosines, as no DSA model does"
        yield Finding("wrong", "rope_scaling", what, _RESTORE)
    if not scaling.get("mscale_all_dim"):
        what = "lacks mscale_all_dim, without which the softmax scale has no YaRN factor"
        yield Finding("wrong", "rope_scaling", what, _RESTORE)


def _same_size(checkpoint: Checkpoint, dsa: DSAConfig) -> bool:
    names = {field.name for field in fields(AttentionSizes)} - _CHANGEABLE
    return all(getattr(checkpoint, name) == getattr(dsa, name) for name in names)


def _differences(
    config: Mapping[str, Any], dsa: DSAConfig, checkpoint: Checkpoint
) -> Iterator[Finding]:
    """From a release of the same size."""
    theta, scaling = read_rope(config)
    factor = None if scaling is None else float(scaling["factor"])
    pairs = (
        ("index_topk", dsa.index_topk, checkpoint.index_topk),
        ("rope_theta", None if theta is None else float(theta), checkpoint.rope_theta),
        ("rope_scaling's factor", factor, checkpoint.rope_scaling_factor),
        ("the sharing pattern", dsa.index_topk_pattern, _pattern(checkpoint)),
    )
    for name, given, right in pairs:
        if given != right:
            what = f"is {given}; {checkpoint.repositories[-1]} has {right}"
            yield Finding("wrong", name, what, _RESTORE)


def _pattern(checkpoint: Checkpoint) -> str:
    return "".join("F" if kind == "full" else "S" for kind in checkpoint.indexer_types)
