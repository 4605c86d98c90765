"""ModelShape: the numbers of a DSA model's config.json from which sizes and work follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from dsa_kernels.dims import CONFIG_SIZES
from dsa_plugin.packed_weights import BITS, quantization_config
from dsa_registry import IndexerType, all_entries
from dsa_registry.reader import read_entry, read_indexer_types, read_sizes
from dsa_registry.schema import ModelSizes

WeightsDtype = Literal["fp8", "bf16", "w8a16", "w4a16"]
"""fp8: linear layers in fp8 with one fp32 scale for each 128 x 128 block. w8a16, w4a16: routed
experts, and what `ModelShape.packs_more` adds, in 8 or 4 bits with one bf16 scale for 128 values;
the rest bf16."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(ModelSizes):
    """Sizes have the names of config.json."""

    name: str
    model_type: str
    indexer_types: tuple[IndexerType, ...]
    """Per backbone layer; MTP layers come on top and are always full."""
    weights_dtype: WeightsDtype | None
    """None: quantised in a way that we cannot size."""
    packs_more: bool = False
    """w8a16 and w4a16 are of dense layers too, those that `dsa convert` packs."""

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelShape:
        """Read config.json.

        Raises:
            ValueError: not a DSA model, missing keys (all of them at once), or a bad value.
        """
        try:
            entry = read_entry(config)
            sizes = read_sizes(config, entry, ModelSizes, CONFIG_SIZES)
            types = read_indexer_types(config, sizes.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        quantization = config.get("quantization_config")
        return cls(
            **vars(sizes),
            name=name,
            model_type=entry.model_type,
            indexer_types=types,
            weights_dtype=_weights_dtype(quantization),
            packs_more=any(quantization == quantization_config(bits) for bits in BITS.values()),
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
            **{field.name: getattr(checkpoint, field.name) for field in fields(ModelSizes)},
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


def _weights_dtype(quantization: Any) -> WeightsDtype | None:
    if quantization is None:
        return "bf16"
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8"
    if method not in ("awq", "gptq", "compressed-tensors"):
        return None
    groups = list((quantization.get("config_groups") or {}).values())
    weights = [group.get("weights", {}) for group in groups]
    if any(of.get("type") == "float" for of in weights) or any(
        group.get("input_activations") for group in groups
    ):
        return None
    bits = {quantization.get("bits"), *(of.get("num_bits") for of in weights)} - {None}
    return next((dtype for dtype in get_args(WeightsDtype) if bits == {BITS.get(dtype)}), None)
