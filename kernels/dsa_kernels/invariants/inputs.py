"""What the checks look at: a pass's rows, a layer's memory, and what attention goes by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """A pass's T rows; all layers of the pass share one, and what the reference derives of it.

    Attributes:
        requests: [T] int, row of `block_table`.
        positions: [T] int.
        lens: [T] int, tokens that a row sees, itself among them.
        slots: [T] int; of padding negative or in block 0, which hosts keep free.
        block_table: [num_requests, max_blocks] int.
        block_size: tokens a block.
        num_blocks: of the latent cache.
    """

    requests: Tensor
    positions: Tensor
    lens: Tensor
    slots: Tensor
    block_table: Tensor
    block_size: int
    num_blocks: int

    @cached_property
    def real(self) -> Tensor:
        """[T] bool, whether a row is checked."""
        return self.slots >= self.block_size

    @cached_property
    def stored(self) -> Tensor:
        """[T] bool, whether it is real and its slot lies in the cache."""
        return self.real & (self.slots < self.num_blocks * self.block_size)

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Blocks and offsets [T] int64 of the slots; 0 and 0 of rows that are not stored."""
        inside = self.slots.long().where(self.stored, 0)
        return inside // self.block_size, inside % self.block_size

    @cached_property
    def misplaced(self) -> Tensor:
        """[T] bool, whether slot, position and length do not agree."""
        size, positions = self.block_size, self.positions.long()
        place = self.blocks(slice(None), positions // size) * size + positions % size
        agree = (self.slots == place) & (self.lens == positions + 1)
        return (positions < 0) | ~agree

    @cached_property
    def page_blocks(self) -> Tensor:
        """[T], the block of one page of its request, as `blocks` gives it."""
        return self.blocks(slice(None), self._page)

    @cached_property
    def page_positions(self) -> Tensor:
        """[T, block_size], that page's."""
        first = self._page[:, None] * self.block_size
        return first + torch.arange(self.block_size, device=first.device)

    @cached_property
    def page_visible(self) -> Tensor:
        """[T, block_size] bool, which of them the row sees."""
        return self.page_positions < self.lens[:, None]

    @cached_property
    def _page(self) -> Tensor:
        """The length says which, so that a growing request's are looked at in turn."""
        lens = self.lens.long()
        return lens % ((lens + self.block_size - 1) // self.block_size).clamp(min=1)

    def blocks(self, rows: slice, pages: Tensor) -> Tensor:
        """Blocks of pages [rows] or [rows, columns] of these rows' requests.

        `num_blocks` or 0, which is nobody's, for one outside of the cache.
        """
        requests = self._requests[rows].view(-1, *[1] * (pages.dim() - 1))
        pages = pages.clamp(0, self.block_table.shape[1] - 1)
        return self.block_table[requests, pages].clamp(0, self.num_blocks)

    @cached_property
    def _requests(self) -> Tensor:
        return self.requests.long()


@dataclass(frozen=True)
class LayerMemory:
    """What a layer writes to, and what is known of it.

    Attributes:
        latent_cache: layouts of both: `dsa_kernels.layout`.
        key_cache: of at least as many blocks, of the same size; None in a layer without indexer.
        written: [num_blocks + 1, block_size] int32, dense: the position that each slot was last
            written for, -1 for none, as in the first and the last block.
        ours_alone: nothing else writes to the caches; or else positions are not compared.
    """

    latent_cache: Tensor
    key_cache: Tensor | None
    written: Tensor
    ours_alone: bool


@dataclass(frozen=True)
class Used:
    """What attention goes by in some rows of a pass.

    Attributes:
        rows: which, of T.
        topk_indices: [>= T, index_topk] int32.
        slots: [rows, index_topk] int64, where it looks for them; None where page by page.
        selected: by this layer, in this pass: then it is checked how many there are.
        query: of the indexer, [>= T, index heads, 128], and its weights [>= T, index heads] fp32.
    """

    rows: slice
    topk_indices: Tensor
    slots: Tensor | None
    selected: bool
    query: tuple[Tensor, Tensor] | None
