"""Runs a model over a prompt and records what its indexers chose, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsa_plugin.in_transformers.cached_sequence import CachedSequence, end_tokens

MAX_TOKENS = 1 << 16  # positions are kept in 16 bits
KEPT_BYTES = 8 << 20


@dataclass(frozen=True)
class LayerSelections:
    """What one layer read.

    Attributes:
        layer: its index.
        source: the layer whose indexer chose; another one where a model shares selections.
        topk_indices: [len(tokens) - first_row, index_topk] int32, positions, best score first.
    """

    layer: int
    source: int
    topk_indices: Tensor


@dataclass(frozen=True)
class Selections:
    """A prompt, what the model said after it, and what each row read.

    Attributes:
        tokens: ids of the prompt, then of what was generated.
        prompt_tokens: how many of them are the prompt.
        index_topk: tokens that a row reads at most. Row p sees p + 1 tokens, so rows before
            index_topk read all they see.
        first_row: the first row whose indices were kept, at least index_topk.
        layers: in their order.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    index_topk: int
    first_row: int
    layers: tuple[LayerSelections, ...]

    @property
    def choosing_rows(self) -> range:
        """The rows that chose the generated tokens; the prompt's last row if there are none."""
        return range(self.prompt_tokens - 1, max(self.prompt_tokens, len(self.tokens) - 1))

    def read(self, layer: LayerSelections, row: int) -> Tensor:
        """Positions that a row read, [at most index_topk] int32.

        Raises:
            ValueError: the row's indices were not kept.
        """
        if row < self.index_topk:
            return torch.arange(row + 1, dtype=torch.int32)
        if row < self.first_row:
            raise ValueError(f"row {row} was not kept; kept are those from {self.first_row} on")
        return layer.topk_indices[row - self.first_row]

    def times_read(self, layer: LayerSelections) -> Tensor:
        """[tokens seen] int32: how many of the choosing rows read each position."""
        counts = torch.zeros(self.choosing_rows.stop, dtype=torch.int32)
        for row in self.choosing_rows:
            counts[self.read(layer, row).long()] += 1
        return counts

    def shares_read(self, positions: Sequence[int]) -> dict[int, float]:
        """Layer -> how much of some positions of the prompt the choosing rows read, 0 to 1."""
        whole = len(positions) * len(self.choosing_rows)
        return {
            layer.layer: int(self.times_read(layer)[list(positions)].sum()) / whole
            for layer in self.layers
        }


@torch.inference_mode()
def record_selections(
    model: Any,
    prompt: Sequence[int],
    new_tokens: int = 0,
    layers: Sequence[int] | None = None,
    kept_bytes: int = KEPT_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Selections:
    """Read a prompt in chunks, generate greedily, and record what each layer's indexer chose.

    Args:
        model: transformers' DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM, in eval mode and with
            eager attention; it is left as it was.
        prompt: token ids.
        new_tokens: tokens to generate, fewer where the model ends its answer.
        layers: indices of the layers to record; all of them by default.
        kept_bytes: bound on the indices kept, 2 bytes each; the last rows are.
        progress: called with the number of tokens done.

    Raises:
        ValueError: the prompt is empty or too long, a layer is none, or kept_bytes does not hold
            the rows of the generated tokens.
    """
    length = len(prompt) + new_tokens
    _check(model, prompt, length)
    sources = _sources(model, layers)
    index_topk = model.config.index_topk
    rows = kept_bytes // (2 * index_topk * len(set(sources.values())))
    first_row = max(index_topk, length - rows)
    if length > index_topk and rows < new_tokens + 1:
        raise ValueError(
            f"{new_tokens} new tokens in {len(sources)} layers of index_topk {index_topk} are "
            f"more than is kept: at most {max(0, rows - 1)}; ask for fewer tokens or layers"
        )
    run = _Run(model, first_row, progress)
    with run.recording(set(sources.values())):
        tokens = [*prompt, *run.generate(prompt, new_tokens)]
    none = torch.empty(0, index_topk, dtype=torch.int32)  # where every row is dense
    chosen = {source: torch.cat([none, *parts]) for source, parts in run.chosen.items()}
    return Selections(
        tokens=tuple(tokens),
        prompt_tokens=len(prompt),
        index_topk=index_topk,
        first_row=first_row,
        layers=tuple(
            LayerSelections(layer, source, chosen[source]) for layer, source in sources.items()
        ),
    )


class _Run(CachedSequence):
    """One sequence, its layers' selections recorded."""

    def __init__(self, model: Any, first_row: int, progress: Callable[[int], None] | None) -> None:
        super().__init__(model)
        self.first_row = first_row
        self.progress = progress
        self.chosen: dict[int, list[Tensor]] = {}

    @contextmanager
    def recording(self, layers: set[int]) -> Iterator[None]:
        """Their indexers' outputs go into `chosen`."""
        self.chosen = {layer: [] for layer in layers}
        hooks = [
            _indexer(self.model.model.layers[layer]).register_forward_hook(
                partial(self._record, layer)
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Greedy tokens; the last one's row is computed, too."""
        ends = end_tokens(self.model)
        best = self._read(prompt)
        for _ in range(new_tokens):
            token, best = best, self._read([best])
            yield token
            if token in ends:
                return

    def _read(self, tokens: Sequence[int]) -> int:
        """The best next token."""
        best = -1
        for _, logits in self.chunks(tokens, logits_to_keep=1):
            best = int(logits[-1].argmax())
            if self.progress:
                self.progress(self.length)
        return best

    def _record(self, layer: int, _module: Any, _inputs: Any, topk_indices: Tensor) -> None:
        """topk_indices: [1, rows, min(index_topk, context)], best score first."""
        kept = topk_indices[0, max(0, self.first_row - self.length) :]
        # A chunk that ends before first_row may be narrower than index_topk.
        if len(kept):
            self.chosen[layer].append(kept.int().cpu())


def _indexer(layer: Any) -> Any:
    return getattr(layer.self_attn, "indexer", None)


def _sources(model: Any, layers: Sequence[int] | None) -> dict[int, int]:
    """Layer -> the layer whose indexer chooses for it."""
    source, sources = 0, {}
    for index, layer in enumerate(model.model.layers):
        source = index if _indexer(layer) is not None else source
        sources[index] = source
    if layers is None:
        return sources
    if not layers or set(layers) - set(sources):
        raise ValueError(f"layers {list(layers)} are asked for; there are 0 to {len(sources) - 1}")
    return {layer: sources[layer] for layer in sorted(set(layers))}


def _check(model: Any, prompt: Sequence[int], length: int) -> None:
    if not prompt:
        raise ValueError("the prompt has no tokens; give some text")
    longest = min(MAX_TOKENS, model.config.max_position_embeddings)
    if length > longest:
        raise ValueError(
            f"prompt and answer are {length:,} tokens, and at most {longest:,} work; cut the prompt"
        )
