"""The one reader of config.json: what a model says of itself, checked.

A config is config.json's mapping, or an object with its keys as attributes, as hosts hand over.
Every function raises ValueError that names key, value, what is allowed and what to do.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from dsa_registry import lookup
from dsa_registry.schema import AttentionSizes, IndexerType, ModelEntry, resolve_indexer_types

_logger = logging.getLogger(__name__)

# What may be left out for none of it.
_COUNTS = {
    "num_nextn_predict_layers": "MTP layers",
    "first_k_dense_replace": "layers without experts",
    "n_shared_experts": "shared experts",
}
_SHARING = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
_DENSE = (
    "Dense attention: an index_topk of the longest context selects all of it; or, of "
    "DeepSeek-V3.2, a config.json without its index_* keys, whose model_type is deepseek_v3 and "
    "whose architectures are [DeepseekV3ForCausalLM], as which vLLM serves the weights by itself"
)

Sizes = TypeVar("Sizes", bound=AttentionSizes)


def read_entry(config: object, model_type: str | None = None) -> ModelEntry:
    """What is known of the config's model; `model_type` overrides the config's own."""
    if model_type is None:
        model_type = _get(config, "model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"config.json's model_type is {model_type!r}; it must name a DSA model, such as "
            "'deepseek_v32': take config.json from the original checkpoint"
        )
    return lookup(model_type)


def read_sizes(
    config: object, entry: ModelEntry, kind: type[Sizes], fixed: Mapping[str, int]
) -> Sizes:
    """Every number of `kind`; missing keys are named all at once.

    Args:
        config: see above.
        entry: of its model; a message says what was published.
        kind: AttentionSizes or ModelSizes.
        fixed: the one value that a key may have, where the cache layouts fix it.
    """
    given = {field.name: _get(config, field.name) for field in fields(kind)}
    missing = [key for key, value in given.items() if value is None and key not in _COUNTS]
    if missing:
        published = ", ".join(f"{key}={entry.published(key)}" for key in missing)
        raise ValueError(
            f"config.json of this {entry.model_type} model lacks {', '.join(missing)}; add what "
            f"the checkpoint was trained with (released models: {published})"
        )
    return kind(**{key: _size(key, value, fixed) for key, value in given.items()})


def read_indexer_types(config: object, num_hidden_layers: int) -> tuple[IndexerType, ...]:
    """Which backbone layers run an indexer; warns of a key that says otherwise, and is ignored."""
    given = {key: _get(config, key) for key in _SHARING}
    types = resolve_indexer_types(num_hidden_layers, **given)
    # Hugging Face fills indexer_types in while it loads a GLM config, so an override of a key that
    # ranks below it, made after that, has no effect: say so.
    deciding = next((key for key, value in given.items() if value is not None), None)
    for key in ("index_topk_pattern", "index_topk_freq"):
        if key == deciding or given[key] is None:
            continue
        lower = {"index_skip_topk_offset": given["index_skip_topk_offset"], key: given[key]}
        if resolve_indexer_types(num_hidden_layers, **lower) != types:
            _logger.warning(
                "%s=%r is ignored, because %s says otherwise: change %s instead",
                key,
                given[key],
                deciding,
                deciding,
            )
    return types


def read_flag(config: object, key: str, *, default: bool) -> bool:
    """True or false; `default` where the config does not say."""
    value = _get(config, key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(
            f"{key} is {value!r}; allowed: true or false; leave it out for this model type's own "
            f"{str(default).lower()}"
        )
    return value


def _get(config: object, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _size(key: str, value: Any, fixed: Mapping[str, int]) -> int:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if key in fixed and not (is_int and value == fixed[key]):
        raise ValueError(
            f"{key} is {value!r}; allowed: {fixed[key]}, the size that the cache layout is made "
            "for. If config.json is the checkpoint's own, this model needs a layout of its own "
            "(dsa_kernels/layout.py)"
        )
    if key in _COUNTS:
        if value is None:
            return 0
        if not is_int or value < 0:
            raise ValueError(
                f"{key} is {value!r}; allowed: an integer >= 0, the number of {_COUNTS[key]} in "
                "the checkpoint; leave it out for none"
            )
    elif not is_int or value < 1:
        dense = f". {_DENSE}" if key == "index_topk" and value == 0 else ""
        raise ValueError(
            f"{key} is {value!r}; allowed: an integer >= 1; restore the checkpoint's own value in "
            f"config.json{dense}"
        )
    return int(value)
