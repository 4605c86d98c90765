"""ModelEntry: what is true of a model on every host; how layers share their top-k.

Sizes have the names of config.json, which `reader.py` reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

IndexerType = Literal["full", "shared"]
"""A "full" layer runs its indexer; a "shared" one takes the top-k of the last full layer below."""

_OF_LETTER: dict[str, IndexerType] = {"F": "full", "S": "shared"}
_DEFAULT_SKIP_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """What attention and its caches depend on, before any split over ranks."""

    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int


@dataclass(frozen=True, kw_only=True)
class ModelSizes(AttentionSizes):
    """What the whole model's parameters depend on."""

    vocab_size: int
    max_position_embeddings: int
    intermediate_size: int
    """Of the dense MLP in the first `first_k_dense_replace` layers; the others have experts."""
    first_k_dense_replace: int
    moe_intermediate_size: int
    """Of one expert."""
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelSizes):
    """Published numbers of released weights.

    For documentation and planning; a run takes its numbers from the checkpoint's own config.
    """

    repositories: tuple[str, ...]
    """Names on the Hugging Face Hub."""
    fp8_repositories: tuple[str, ...]
    """Those whose weights are fp8, with one scale for each 128 x 128 block; the others are bf16."""
    rope_theta: float
    rope_scaling_factor: float | None
    """YaRN's factor; None: plain RoPE."""
    index_topk_freq: int = 1
    index_skip_topk_offset: int = _DEFAULT_SKIP_OFFSET
    index_share_for_mtp_iteration: bool = False

    @property
    def indexer_types(self) -> tuple[IndexerType, ...]:
        """Per backbone layer; MTP layers come on top and are always full."""
        return resolve_indexer_types(
            self.num_hidden_layers,
            index_topk_freq=self.index_topk_freq,
            index_skip_topk_offset=self.index_skip_topk_offset,
        )


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One family of DSA models."""

    model_type: str
    architectures: tuple[str, ...]
    """Class names in config.json."""
    mtp_architectures: tuple[str, ...]
    """Class names that hosts give to its MTP layers; models may share them."""
    indexer_rope_interleave: bool
    """RoPE of the *indexer*: True rotates pairs (2i, 2i+1), GPT-J; False pairs (i, i+32), NeoX.

    MLA's own RoPE is interleaved in every DSA model. The wrong style degrades long answers without
    an error, and config.json cannot be trusted to say: Hugging Face drops the key on save.
    """
    mtp_repeats_vocab: bool
    """Whether checkpoints store embedding and head once more in each MTP layer."""
    message_encoding: Literal["deepseek_v32"] | None
    """How conversations are written where a checkpoint has no chat template; None: all have one."""
    checkpoints: tuple[Checkpoint, ...]

    def published(self, key: str) -> str:
        """The values of released models, for messages."""
        values = {getattr(checkpoint, key) for checkpoint in self.checkpoints}
        return " or ".join(str(value) for value in sorted(values))


def resolve_indexer_types(
    num_hidden_layers: int,
    *,
    indexer_types: Sequence[str] | None = None,
    index_topk_pattern: str | Sequence[str] | None = None,
    index_topk_freq: int | None = None,
    index_skip_topk_offset: int | None = None,
) -> tuple[IndexerType, ...]:
    """Which backbone layers run an indexer, from the three ways in which a config may say so.

    The first that is given decides: `indexer_types` ("full" / "shared" a layer), then
    `index_topk_pattern` ("F" / "S" a layer, a string or a list; the long words too), then
    `index_topk_freq` with `index_skip_topk_offset` (default 2), where layer i is shared iff
    max(i - offset + 1, 0) % freq != 0. Nothing given: every layer is full.

    This is the order of SGLang's model_config.dsa_layer_skips_topk; the formula is IndexCache's
    (arXiv 2603.12201), as in transformers' GlmMoeDsaConfig and vLLM's deepseek_v2.py. MTP layers
    are not part of it: they always run an indexer.

    Raises:
        ValueError: a wrong length or word, freq < 1, or a first layer that has nothing to share.
    """
    if indexer_types is not None:
        types = _parse("indexer_types", indexer_types, num_hidden_layers)
    elif index_topk_pattern is not None:
        types = _parse("index_topk_pattern", index_topk_pattern, num_hidden_layers)
    else:
        freq = _integer("index_topk_freq", index_topk_freq, default=1, least=1)
        offset = _integer(
            "index_skip_topk_offset", index_skip_topk_offset, default=_DEFAULT_SKIP_OFFSET, least=0
        )
        types = tuple[IndexerType, ...](
            "full" if max(layer - offset + 1, 0) % freq == 0 else "shared"
            for layer in range(num_hidden_layers)
        )
    if types and types[0] != "full":
        raise ValueError(
            "layer 0 would be 'shared', but has no layer below it to take the top-k from: make the "
            "first entry of indexer_types 'full' (of index_topk_pattern 'F'), or "
            "index_skip_topk_offset >= 1"
        )
    return types


def _parse(key: str, given: str | Sequence[str], num_hidden_layers: int) -> tuple[IndexerType, ...]:
    if not isinstance(given, Sequence):
        raise ValueError(f"{key} is {given!r}; allowed: one entry a layer, 'full' or 'shared'")
    words = [_OF_LETTER.get(word, word) for word in given]
    for layer, word in enumerate(words):
        if word not in get_args(IndexerType):
            raise ValueError(
                f"{key}[{layer}] is {word!r}; allowed: 'full' or 'shared' ('F' or 'S')"
            )
    if len(words) != num_hidden_layers:
        raise ValueError(
            f"{key} has {len(words)} entries for num_hidden_layers={num_hidden_layers}; give one "
            "entry for each backbone layer and none for MTP layers"
        )
    return cast(tuple[IndexerType, ...], tuple(words))


def _integer(key: str, given: int | None, *, default: int, least: int) -> int:
    if given is None:
        return default
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(
            f"{key} is {given!r}; allowed: an integer >= {least}; leave it out for {default}"
        )
    return given
