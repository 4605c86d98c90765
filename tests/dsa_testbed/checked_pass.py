"""A sound pass of one layer as its checks see it, any part of which a test may spoil.

Request 0 has two rows, request 1 one, request 2 three; then padding of both hosts' kinds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsa_kernels.invariants import (
    FIELDS,
    LayerMemory,
    Rows,
    Used,
    check_rows,
    keep_first,
    mark_rows,
)
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_kernels.testing import make_index_cache, make_latent_cache

SIZE, BLOCKS, TOPK, HEADS, INDEX_HEADS = 6, 16, 10, 3, 5
LENS = (19, 6, 33)
ROWS_OF = (2, 1, 3)
PADDING = (-1, SIZE - 1)
REAL = sum(ROWS_OF)
LAYER, NUMBER = 4, 9


class CheckedPass:
    """Sound, if nothing is changed before `mark`, `write`, `check` and `keep` are called in turn.

    Attributes:
        rows: T of them, REAL that are checked; `place(row)` is block and offset of one.
        memory: caches with gaps, of poison where nothing was written.
        topk_indices, slots: of all rows.
        query: of the indexer, in fp8 if the caches are.
        out: [T, HEADS, width], of a dtype that the caches may have.
        findings, first: of the checks.
    """

    def __init__(
        self, cache_dtype: torch.dtype, *, ours_alone: bool = True, indexer: bool = True
    ) -> None:
        self.fp8 = cache_dtype == torch.uint8
        dtype = torch.bfloat16 if self.fp8 else cache_dtype
        pages = [-(-length // SIZE) for length in LENS]
        free = (torch.randperm(BLOCKS - 1) + 1).split([*pages, BLOCKS - 1 - sum(pages)])
        table = torch.zeros(len(LENS), max(pages) + 1, dtype=torch.int32)
        for request, blocks in enumerate(free[:-1]):
            table[request, : len(blocks)] = blocks
        # The least slot that is none of padding's is row 1's.
        page = (LENS[0] - 1) // SIZE
        table[table == 1], table[0, page] = table[0, page].clone(), 1
        self.rows = self._rows(table)
        tokens = len(self.rows.slots)
        self.memory = LayerMemory(
            make_latent_cache(cache_dtype, BLOCKS, SIZE, gap=64),
            make_index_cache(cache_dtype, BLOCKS, SIZE, gap=32) if indexer else None,
            torch.full((BLOCKS + 1, SIZE), -1, dtype=torch.int32),
            ours_alone,
        )
        for request, length in enumerate(LENS):
            before = torch.arange(length - ROWS_OF[request])
            blocks, offsets = table[request, before // SIZE], before % SIZE
            self.memory.written[blocks, offsets] = before.int()
            self._store(blocks, offsets)
        self.topk_indices = torch.full((tokens + 1, TOPK), -1, dtype=torch.int32)
        for row, length in enumerate(self.rows.lens[:REAL].tolist()):
            chosen = torch.randperm(length)[:TOPK].sort().values
            self.topk_indices[row, : len(chosen)] = chosen.int()
        self.topk_indices[REAL:] = 77
        self.select_slots()
        q, weights = torch.randn(tokens, INDEX_HEADS, 128), torch.randn(tokens, INDEX_HEADS)
        self.query = q.to(torch.float8_e4m3fn if self.fp8 else dtype), weights
        self.indexer = indexer
        self.out = torch.randn(tokens, HEADS, 48).to(dtype)
        self.first = torch.zeros(len(FIELDS), dtype=torch.int64)
        self.findings = torch.zeros(0)

    def change(self, **tensors: Any) -> None:
        """Rows with other tensors."""
        self.rows = replace(self.rows, **tensors)

    def place(self, row: int) -> tuple[int, int]:
        return self.place_of(int(self.rows.requests[row]), int(self.rows.positions[row]))

    def place_of(self, request: int, position: int) -> tuple[int, int]:
        return int(self.rows.block_table[request, position // SIZE]), position % SIZE

    def spots(self, row: int) -> dict[str, Tensor]:
        """A row's entry, by part: views of its values."""
        block, offset = self.place(row)
        return {name: part[block, offset] for name, part in self.parts().items()}

    def parts(self) -> dict[str, Tensor]:
        """Both caches [BLOCKS, SIZE, _], by dtype: views."""
        latents, keys = self.memory.latent_cache, self.memory.key_cache
        parts: dict[str, Tensor] = {"latent": latents}
        if self.fp8:
            parts = dict(zip(("nope", "scales", "rope"), latent_fp8_views(latents), strict=True))
        if keys is not None and self.fp8:
            key, scale = index_fp8_views(keys)
            parts |= {"key": key, "scale": scale[..., None]}
        elif keys is not None:
            parts["key"] = keys
        return parts

    def mark(self) -> None:
        self.findings = mark_rows(self.rows, self.memory)

    def write(self, rows: list[int] | None = None) -> None:
        """Entries of these rows, as the layer has to write; None: of all."""
        for row in range(REAL) if rows is None else rows:
            block, offset = self.place(row)
            self._store(torch.tensor([block]), torch.tensor([offset]))

    def select_slots(self) -> None:
        """Where the request's pages have what `topk_indices` selects."""
        indices = self.topk_indices[: len(self.rows.slots)]
        pages = indices.clamp(0, SIZE * self.rows.block_table.shape[1] - 1).long() // SIZE
        blocks = self.rows.block_table[self.rows.requests[:, None].long(), pages].long()
        self.slots = (blocks * SIZE + indices % SIZE).where(indices >= 0, -1)

    def check(self, *parts: slice, page_by_page: bool = False) -> None:
        """All rows, or these parts of them."""
        for part in parts or [slice(0, len(self.rows.slots))]:
            slots = None if page_by_page else self.slots[part]
            query = self.query if self.indexer else None
            used = Used(part, self.topk_indices, slots, self.indexer, query)
            check_rows(self.rows, self.memory, used, self.findings)

    def keep(self) -> dict[str, int]:
        """FIELDS of what is kept."""
        layer, number = torch.tensor([LAYER]), torch.tensor([NUMBER])
        keep_first(self.rows, self.findings, self.out, layer, number, self.first)
        return dict(zip(FIELDS, self.first.tolist(), strict=True))

    def found(self) -> dict[int, tuple[int, ...]]:
        """Check, kind, at and seen of each row that has any."""
        noted = enumerate(self.findings[:-1].tolist())
        return {row: tuple(values) for row, values in noted if values[0]}

    def _rows(self, table: Tensor) -> Rows:
        padding = len(PADDING)
        requests = torch.arange(len(LENS)).repeat_interleave(torch.tensor(ROWS_OF))
        spans = zip(LENS, ROWS_OF, strict=True)
        positions = torch.cat([torch.arange(end - new, end) for end, new in spans])
        slots = table[requests, positions // SIZE].long() * SIZE + positions % SIZE
        lens = (positions + 1).int()
        return Rows(
            requests=torch.cat((requests, requests.new_ones(padding))).int(),
            positions=torch.cat((positions, positions.new_zeros(padding))),
            lens=torch.cat((lens, lens.new_zeros(padding))),
            slots=torch.cat((slots, torch.tensor(PADDING))),
            block_table=table,
            block_size=SIZE,
            num_blocks=BLOCKS,
        )

    def _store(self, blocks: Tensor, offsets: Tensor) -> None:
        """Numbers into entries of both caches."""
        for part in self.parts().values():
            values = torch.randn(len(blocks), part.shape[2]).to(part.dtype)
            bits = torch.int8 if part.itemsize == 1 else part.dtype
            part.view(bits)[blocks.long(), offsets.long()] = values.view(bits)


def bits(value: Tensor) -> Tensor:
    return value.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[value.itemsize])


def set_nan(values: Tensor, at: Any, *, negative: bool = False) -> None:
    """In any dtype, the NaN next to infinity, or in fp8 to the greatest number."""
    limits = {1: 0x7F, 2: 0x7F81 if values.dtype == torch.bfloat16 else 0x7C01, 4: 0x7F800001}
    width = 8 * values.itemsize
    bits(values)[at] = limits[values.itemsize] - (1 << (width - 1)) * negative


def set_greatest(values: Tensor, at: Any) -> None:
    """Infinity, or in fp8 the greatest number: no NaN."""
    if values.itemsize == 1:
        bits(values)[at] = 0x7E
    else:
        values[at] = torch.inf


def row_of(row: int) -> slice:
    return slice(row, row + 1)
