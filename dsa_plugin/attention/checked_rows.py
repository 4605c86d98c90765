"""What the checks of all layers of a pass have in common: its rows, and where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata


class CheckedRows:
    """A pass's T rows.

    Args:
        metadata: of the pass.
        positions: [T].
        num_blocks: of the caches.

    Attributes:
        requests, positions, lens, slots: [T] int64; of the metadata.
        real: [T] bool, whether it is checked: the slot of padding is negative or in block 0.
        stored: [T] bool, whether it is real and its slot lies in the cache.
        entries: blocks and offsets [T] of the slots; 0 and 0 of rows that are not stored.
        misplaced: [T] bool, whether slot, position and length do not agree.
        page_blocks: [T], the block of one page of its request, as `blocks` gives it. The length
            says which page, so that a growing request's are looked at in turn.
        page_positions: [T, block_size], that page's.
        page_visible: [T, block_size] bool, which of them the row sees.
    """

    def __init__(self, metadata: DSAMetadata, positions: Tensor, num_blocks: int) -> None:
        size = self.block_size = metadata.block_size
        self._table, self._num_blocks = metadata.block_table, num_blocks
        self.requests = metadata.request_ids.long()
        self.positions = positions.long()
        self.lens = metadata.context_lens.long()
        self.slots = metadata.slot_mapping.long()
        self.real = self.slots >= size
        self.stored = self.real & (self.slots < num_blocks * size)
        inside = self.slots.where(self.stored, 0)
        self.entries = inside // size, inside % size
        place = self.blocks(self.requests, self.positions // size) * size + self.positions % size
        self.misplaced = (self.slots != place) | (self.lens != self.positions + 1)
        page = self.lens % ((self.lens + size - 1) // size).clamp(min=1)
        self.page_blocks = self.blocks(self.requests, page)
        self.page_positions = page[:, None] * size + torch.arange(size, device=page.device)
        self.page_visible = self.page_positions < self.lens[:, None]

    def blocks(self, requests: Tensor, pages: Tensor) -> Tensor:
        """Blocks of pages of requests; `num_blocks` or 0, which is nobody's, for one outside."""
        pages = pages.clamp(max=self._table.shape[1] - 1)
        return self._table[requests, pages].clamp(0, self._num_blocks)


class LatestRows:
    """Keeps the last pass's rows for its other layers."""

    def __init__(self) -> None:
        self._of: tuple[DSAMetadata, int] | None = None
        self._rows: CheckedRows | None = None
        self._layers: set[object] = set()

    def of(
        self, layer: object, metadata: DSAMetadata, positions: Tensor, num_blocks: int
    ) -> CheckedRows:
        """Arguments are those of `CheckedRows`, and who asks.

        A layer that asks twice is in another pass, if of the same metadata.
        """
        known = self._of is not None and self._of[0] is metadata and self._of[1] == num_blocks
        if not known or self._rows is None or layer in self._layers:
            self._of = metadata, num_blocks
            self._rows = CheckedRows(metadata, positions, num_blocks)
            self._layers = set()
        self._layers.add(layer)
        return self._rows
