"""DSAConfig: registry entry + Hugging Face config -> the numbers of one run, validated once."""

import logging
from dataclasses import dataclass
from typing import Any

from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, ROPE_DIM
from dsa_registry import IndexerType, ModelEntry, lookup, resolve_indexer_types

logger = logging.getLogger(__name__)

# The indexer's heads are the rows of one MMA tile, whose largest M is 128.
_MAX_INDEX_HEADS = 128

_POSITIVE = (
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_topk",
)
# The two cache layouts are built on these numbers; every released DSA model has them.
_FIXED = {
    "kv_lora_rank": KV_LORA_RANK,
    "qk_rope_head_dim": ROPE_DIM,
    "index_head_dim": INDEX_HEAD_DIM,
}


@dataclass(frozen=True, kw_only=True)
class DSAConfig:
    """The attention numbers of one model, before any split over ranks.

    Names are config.json's, but for `num_heads` (num_attention_heads).
    """

    model_type: str
    num_heads: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_rope_interleave: bool
    """RoPE of the indexer: True rotates pairs (2i, 2i+1), False pairs (i, i + 32)."""
    indexer_types: tuple[IndexerType, ...]
    """Per backbone layer: "full" runs an indexer, "shared" reuses the last full layer's top-k."""
    index_share_for_mtp_iteration: bool
    """MTP steps after the first reuse the first step's top-k."""

    @classmethod
    def from_hf(cls, hf_config: Any, *, model_type: str | None = None) -> "DSAConfig":
        """Read and check a model's config.

        Args:
            hf_config: any object with config.json's keys as attributes.
            model_type: overrides hf_config's own. A speculative draft needs it: vLLM renames a
                draft's model_type to "deepseek_mtp", which no longer says which model it is.

        Raises:
            ValueError: unknown model, missing keys (all of them at once), or a value that no op
                supports; names key, value, what is allowed and what to do.
        """
        if model_type is None:
            model_type = getattr(hf_config, "model_type", None)
        if not isinstance(model_type, str):
            raise ValueError(
                f"config.json's model_type is {model_type!r}; it must name a DSA model, such as "
                "'deepseek_v32': take config.json from the original checkpoint"
            )
        entry = lookup(model_type)
        _check_present(hf_config, entry)
        numbers = {key: _positive(hf_config, key) for key in _POSITIVE}
        numbers |= {key: _fixed(hf_config, key, value) for key, value in _FIXED.items()}
        if numbers["index_n_heads"] > _MAX_INDEX_HEADS:
            raise ValueError(
                f"index_n_heads is {numbers['index_n_heads']}; allowed: 1 to {_MAX_INDEX_HEADS} "
                f"(released models: {_published(entry, 'index_n_heads')}); restore the "
                "checkpoint's own value in config.json"
            )
        return cls(
            model_type=model_type,
            num_heads=numbers.pop("num_attention_heads"),
            num_nextn_predict_layers=_nextn(hf_config),
            indexer_rope_interleave=_flag(
                hf_config, "indexer_rope_interleave", entry.indexer_rope_interleave
            ),
            indexer_types=_indexer_types(hf_config, numbers["num_hidden_layers"]),
            index_share_for_mtp_iteration=_flag(hf_config, "index_share_for_mtp_iteration", False),
            **numbers,
        )

    @property
    def index_topk_pattern(self) -> str:
        """`indexer_types` in one word, such as "FSSF": F for full, S for shared."""
        return "".join("F" if kind == "full" else "S" for kind in self.indexer_types)

    def summary(self, *, index_cache_fp8: bool) -> str:
        """What a host's log says of a model that the plugin serves."""
        return (
            f"{self.num_hidden_layers} layers ({self.indexer_types.count('full')} with an "
            f"indexer), index_topk {self.index_topk}, "
            f"{'interleaved' if self.indexer_rope_interleave else 'half-split'} indexer RoPE, "
            f"index cache {'fp8' if index_cache_fp8 else 'in the model dtype'}"
        )

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer runs an indexer; MTP layers (>= num_hidden_layers) always do."""
        return layer >= self.num_hidden_layers or self.indexer_types[layer] == "full"

    def tensor_parallel_faults(self, tensor_parallel_size: int) -> list[str]:
        """Why so many ranks will not do: attention heads must divide evenly over them.

        The indexer is replicated, so its heads do not matter here.
        """
        if tensor_parallel_size >= 1 and self.num_heads % tensor_parallel_size == 0:
            return []
        works = [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128) if self.num_heads % n == 0]
        fault = (
            f"tensor parallel size {tensor_parallel_size} does not divide "
            f"num_attention_heads={self.num_heads}; use --tensor-parallel-size "
            f"{', '.join(works)} or another divisor of {self.num_heads}"
        )
        return [fault]


def _check_present(hf_config: Any, entry: ModelEntry) -> None:
    missing = [k for k in (*_POSITIVE, *_FIXED) if getattr(hf_config, k, None) is None]
    if missing:
        published = ", ".join(f"{key}={_published(entry, key)}" for key in missing)
        raise ValueError(
            f"config.json of this {entry.model_type} model lacks {', '.join(missing)}; add what "
            f"the checkpoint was trained with (released models: {published})"
        )


def _positive(hf_config: Any, key: str) -> int:
    value = getattr(hf_config, key)
    if not _is_int(value) or value < 1:
        raise ValueError(
            f"{key} is {value!r}; allowed: an integer >= 1; restore the checkpoint's own value in "
            "config.json"
        )
    return int(value)


def _fixed(hf_config: Any, key: str, allowed: int) -> int:
    value = getattr(hf_config, key)
    if not _is_int(value) or value != allowed:
        raise ValueError(
            f"{key} is {value!r}; allowed: {allowed}, the size that the cache layout is made for. "
            "If config.json is the checkpoint's own, this model needs a layout of its own "
            "(dsa_kernels/layout.py)"
        )
    return allowed


def _nextn(hf_config: Any) -> int:
    value = getattr(hf_config, "num_nextn_predict_layers", None)
    if value is None:
        return 0
    if not _is_int(value) or value < 0:
        raise ValueError(
            f"num_nextn_predict_layers is {value!r}; allowed: an integer >= 0, the number of MTP "
            "layers in the checkpoint; leave it out for none"
        )
    return int(value)


def _flag(hf_config: Any, key: str, default: bool) -> bool:
    value = getattr(hf_config, key, None)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(
            f"{key} is {value!r}; allowed: true or false; leave it out for this model type's own "
            f"{str(default).lower()}"
        )
    return value


def _indexer_types(hf_config: Any, num_hidden_layers: int) -> tuple[IndexerType, ...]:
    given = {
        key: getattr(hf_config, key, None)
        for key in (
            "indexer_types",
            "index_topk_pattern",
            "index_topk_freq",
            "index_skip_topk_offset",
        )
    }
    types = resolve_indexer_types(num_hidden_layers, **given)
    # Hugging Face fills indexer_types in while it loads a GLM config, so an override of a key that
    # ranks below it, made after that, has no effect: say so.
    deciding = next((key for key, value in given.items() if value is not None), None)
    for key in ("index_topk_pattern", "index_topk_freq"):
        if key == deciding or given[key] is None:
            continue
        lower = {"index_skip_topk_offset": given["index_skip_topk_offset"], key: given[key]}
        if resolve_indexer_types(num_hidden_layers, **lower) != types:
            logger.warning(
                "%s=%r is ignored, because %s says otherwise: change %s instead",
                key,
                given[key],
                deciding,
                deciding,
            )
    return types


def _published(entry: ModelEntry, key: str) -> str:
    values = {getattr(checkpoint, key) for checkpoint in entry.checkpoints}
    return " or ".join(str(value) for value in sorted(values))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
