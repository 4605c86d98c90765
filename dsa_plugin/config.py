"""DSAConfig: registry entry + Hugging Face config -> the numbers of one run, validated once."""

from dataclasses import dataclass

from dsa_kernels.dims import CONFIG_SIZES
from dsa_registry import IndexerType
from dsa_registry.reader import read_entry, read_flag, read_indexer_types, read_sizes
from dsa_registry.schema import AttentionSizes

# The indexer's heads are the rows of one MMA tile, whose largest M is 128.
_MAX_INDEX_HEADS = 128


@dataclass(frozen=True, kw_only=True)
class DSAConfig(AttentionSizes):
    """The attention of one model, before any split over ranks; names are config.json's."""

    model_type: str
    indexer_rope_interleave: bool
    """RoPE of the indexer: True rotates pairs (2i, 2i+1), False pairs (i, i + 32)."""
    indexer_types: tuple[IndexerType, ...]
    """Per backbone layer: "full" runs an indexer, "shared" reuses the last full layer's top-k."""

    @classmethod
    def from_hf(cls, hf_config: object, *, model_type: str | None = None) -> "DSAConfig":
        """Read and check a model's config.

        Args:
            hf_config: any object with config.json's keys as attributes, or their mapping.
            model_type: overrides hf_config's own. A speculative draft needs it: vLLM renames a
                draft's model_type to "deepseek_mtp", which no longer says which model it is.

        Raises:
            ValueError: unknown model, missing keys (all of them at once), or a value that no op
                supports; names key, value, what is allowed and what to do.
        """
        entry = read_entry(hf_config, model_type)
        sizes = read_sizes(hf_config, entry, AttentionSizes, CONFIG_SIZES)
        if sizes.index_n_heads > _MAX_INDEX_HEADS:
            raise ValueError(
                f"index_n_heads is {sizes.index_n_heads}; allowed: 1 to {_MAX_INDEX_HEADS} "
                f"(released models: {entry.published('index_n_heads')}); restore the "
                "checkpoint's own value in config.json"
            )
        # Hosts use it, and would take "false", a word, for true.
        read_flag(hf_config, "index_share_for_mtp_iteration", default=False)
        return cls(
            **vars(sizes),
            model_type=entry.model_type,
            indexer_rope_interleave=read_flag(
                hf_config, "indexer_rope_interleave", default=entry.indexer_rope_interleave
            ),
            indexer_types=read_indexer_types(hf_config, sizes.num_hidden_layers),
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

    def pipeline_partition(self, stages: int) -> list[int] | None:
        """Layers of each pipeline stage, about equally many; None where there is no such split.

        Each stage starts at a layer with an indexer: selections do not travel between stages.
        """
        full = [layer for layer, kind in enumerate(self.indexer_types) if kind == "full"]
        if stages > len(full):
            return None
        starts = [0]
        for stage in range(1, stages):
            even = stage * self.num_hidden_layers / stages
            later_stages = stages - stage - 1
            free = [layer for layer in full[: len(full) - later_stages] if layer > starts[-1]]
            starts.append(min(free, key=lambda layer: abs(layer - even)))
        ends = [*starts[1:], self.num_hidden_layers]
        return [end - start for start, end in zip(starts, ends, strict=True)]

    def tensor_parallel_faults(self, tensor_parallel_size: int) -> list[str]:
        """Why so many ranks will not do: attention heads must divide evenly over them.

        The indexer is replicated, so its heads do not matter here.
        """
        if tensor_parallel_size >= 1 and self.num_attention_heads % tensor_parallel_size == 0:
            return []
        works = [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128) if self.num_attention_heads % n == 0]
        fault = (
            f"tensor parallel size {tensor_parallel_size} does not divide "
            f"num_attention_heads={self.num_attention_heads}; use --tensor-parallel-size "
            f"{', '.join(works)} or another divisor of {self.num_attention_heads}"
        )
        return [fault]
