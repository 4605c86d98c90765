"""ModelShape: the numbers of a DSA model's config.json from which sizes and work follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from dsa_registry import IndexerType, all_entries, lookup, resolve_indexer_types

WeightsDtype = Literal["fp8", "bf16", "w4a16"]
"""fp8: linear layers in fp8 with one fp32 scale for each 128 x 128 block. w4a16: routed experts in
4 bits with one bf16 scale for 128 values, the rest bf16."""

_MAY_BE_ZERO = {"num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts"}
# The cache layouts are built on these (dsa_kernels/layout.py).
_FIXED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Names are config.json's, but for the first two and the last two."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    indexer_types: tuple[IndexerType, ...]
    """Per backbone layer; MTP layers come on top and are always full."""
    weights_dtype: WeightsDtype | None
    """None: quantised in a way that we cannot size."""

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelShape:
        """Read config.json.

        Raises:
            ValueError: not a DSA model, missing keys (all of them at once), or a bad value.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise ValueError(
                f"config.json of {name} has no model_type, so it describes no model; take it from "
                "the original checkpoint"
            )
        lookup(model_type)
        keys = _number_keys()
        missing = [key for key in keys if key not in config and key not in _MAY_BE_ZERO]
        if missing:
            raise ValueError(
                f"config.json of {name} lacks {', '.join(missing)}; take it from the original "
                "checkpoint"
            )
        numbers = {key: _integer(name, key, config.get(key)) for key in keys}
        types = resolve_indexer_types(
            numbers["num_hidden_layers"],
            indexer_types=config.get("indexer_types"),
            index_topk_pattern=config.get("index_topk_pattern"),
            index_topk_freq=config.get("index_topk_freq"),
            index_skip_topk_offset=config.get("index_skip_topk_offset"),
        )
        return cls(
            name=name,
            model_type=model_type,
            indexer_types=types,
            weights_dtype=_weights_dtype(config.get("quantization_config")),
            **numbers,
        )

    @property
    def num_indexers(self) -> int:
        """Backbone layers that run an indexer, and keep index keys."""
        return self.indexer_types.count("full")


def registered_models() -> dict[str, ModelShape]:
    """Every published repository that the registry knows, by its name on the Hub."""
    return {
        repository: ModelShape(
            name=repository,
            model_type=entry.model_type,
            weights_dtype="fp8" if repository in checkpoint.fp8_repositories else "bf16",
            indexer_types=checkpoint.indexer_types,
            **{key: getattr(checkpoint, key) for key in _number_keys()},
        )
        for entry in all_entries()
        for checkpoint in entry.checkpoints
        for repository in checkpoint.repositories
    }


def find_registered(name: str) -> ModelShape | None:
    """A registered model by its repository, or that name without the organisation; else None."""
    wanted = name.lower()
    for repository, model in registered_models().items():
        if wanted in (repository.lower(), repository.partition("/")[2].lower()):
            return model
    return None


def nearest_registered(name: str) -> str | None:
    """The registered repository whose name is most like a misspelt one; None: none is like it."""
    repositories = list(registered_models())
    short = {repository.partition("/")[2].lower(): repository for repository in repositories}
    candidates = {repository.lower(): repository for repository in repositories} | short
    near = get_close_matches(name.lower(), candidates, n=1)
    return candidates[near[0]] if near else None


def _number_keys() -> list[str]:
    """The fields that config.json and Checkpoint have under the same name."""
    return [field.name for field in fields(ModelShape) if field.type == "int"]


def _integer(name: str, key: str, value: Any) -> int:
    least = 0 if key in _MAY_BE_ZERO else 1
    if value is None and least == 0:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"an integer >= {least}"
    elif value != _FIXED.get(key, value):
        allowed = f"{_FIXED[key]}, which the cache layouts are made for"
    else:
        return value
    raise ValueError(f"config.json of {name}: {key} is {value!r}; allowed: {allowed}")


def _weights_dtype(quantization: Any) -> WeightsDtype | None:
    if quantization is None:
        return "bf16"
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8"
    groups = (quantization.get("config_groups") or {}).values()
    bits = {quantization.get("bits"), *(g.get("weights", {}).get("num_bits") for g in groups)}
    if method in ("awq", "gptq", "compressed-tensors") and bits - {None} == {4}:
        return "w4a16"
    return None
