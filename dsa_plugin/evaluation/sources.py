"""Where answers come from: transformers here, a host started here, or a server that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from dsa_plugin.evaluation.completions import Completions, Patience
from dsa_plugin.evaluation.hosts import Deployment, HostName, KvCacheDtype
from dsa_plugin.evaluation.results import Setting
from dsa_plugin.evaluation.run import Model, Under
from dsa_plugin.evaluation.transformers_model import Dtype, TransformersModel
from dsa_plugin.evaluation.variants import VARIANTS, Variant, find_variants
from dsa_plugin.planning.model import ModelShape

# Another tokenizer may need more tokens for the words of an exam than its own does.
_MORE_TOKENS = 1.5


@dataclass(frozen=True)
class Source:
    """A model under its variants.

    Attributes:
        under: opens it.
        variants: names of all that it has.
    """

    under: Under
    variants: Sequence[str]

    def choose(self, names: Sequence[str] | None) -> list[Variant]:
        """Variants by name, or all.

        Raises:
            ValueError: one is not known, or not to be had here.
        """
        chosen = find_variants(self.variants if names is None else names)
        if missing := [variant for variant in chosen if variant.name not in self.variants]:
            raise ValueError(
                f"{missing[0].name} ({missing[0].text}) cannot be had here; "
                f"what can be: {', '.join(self.variants)}"
            )
        return chosen


def started(setting: Setting, shape: ModelShape, longest: int, patience: Patience) -> Source:
    """A checkpoint in transformers or in a host of this environment.

    Args:
        setting: names both.
        shape: the checkpoint's.
        longest: tokens of the longest request, by the exams' own count.
        patience: with a host.

    Raises:
        ValueError: the model has fewer positions than the longest request.
    """
    positions = shape.max_position_embeddings
    if longest > positions:
        raise ValueError(
            f"{shape.name} has {positions:,} positions, too few for --lengths with {longest:,}"
        )
    context = min(positions, int(_MORE_TOKENS * longest))
    if setting.through == "transformers":
        shares = "shared" in shape.indexer_types
        names = [name for name in VARIANTS if shares or name != "shared_selection_lost"]
        return Source(_in_transformers(setting, context), names)
    deployment = Deployment(
        host=cast(HostName, setting.through),
        checkpoint=Path(setting.model),
        dtype=setting.dtype,
        kv_cache_dtype=cast(KvCacheDtype, setting.kv_cache_dtype),
        index_topk=shape.index_topk,
        context=context,
        flags=tuple(setting.flags),
    )
    by_flag = [name for name, variant in VARIANTS.items() if variant.by_flag]
    return Source(lambda variant: deployment.under(variant, patience), by_flag)


def running(url: str, model: str | None, api_key: str | None, patience: Patience) -> Source:
    """A server that somebody else started; the variant is a label of what it serves.

    Raises:
        ValueError: it has no such model.
        OSError: it cannot be reached.
    """
    server = Completions(url, model, api_key, patience)

    @contextmanager
    def under(_variant: Variant) -> Iterator[Model]:
        yield server

    return Source(under, tuple(VARIANTS))


def _in_transformers(setting: Setting, context: int) -> Under:
    @cache
    def load() -> TransformersModel:
        return TransformersModel(Path(setting.model), cast(Dtype, setting.dtype), context)

    return lambda variant: load().under(variant)
