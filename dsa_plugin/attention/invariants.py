"""What `DSA_CHECK=1` checks in every layer of every pass; violation.py says what becomes of it.

Nothing here waits for the device or has a shape that depends on values, so that all of it can be
captured in a CUDA graph.

Rows of which a host stores nothing are padding and are not checked: their slot is negative, or in
block 0, which both hosts keep free. Of all other rows:

    written   their slot is that of their position; their entries, filled before, are overwritten
    read      of one page of their request, another one each pass, every slot was last written for
              its position, and no index key is NaN
    selected  indices ascend, lie in the context and are as many as they have to be; their slots
              are in the request's pages and were last written for that position
    attended  no NaN
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_plugin.attention.cached_entries import any_nan, fill, nan_in_blocks, unwritten_and_nan
from dsa_plugin.attention.checked_rows import CheckedRows, LatestRows
from dsa_plugin.attention.violation import Kind, Record, record_of
from dsa_plugin.env import Env

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata

_ELEMENTS = 1 << 22  # that a check of many rows looks at at once
_NOT_WRITTEN = -1
_LAST = torch.iinfo(torch.int32).max

_logger = logging.getLogger(__name__)


class LayerCheck:
    """The checks of one layer, and what they have to remember from pass to pass.

    Args:
        name: of the layer, for messages.
        written_by_us_alone: whether nothing else, such as a KV connector, writes to the caches; if
            it does, positions that it wrote are not known, and so none is checked.

    Attributes:
        positions: [blocks + 1, block_size] int32, the position that each slot was last written for,
            -1 for none, as in the first and the last block; None before the first pass with caches.
        number: the layer's in the record.
    """

    def __init__(self, name: str, *, written_by_us_alone: bool) -> None:
        self.name = name
        self.written_by_us_alone = written_by_us_alone
        self.positions: Tensor | None = None
        self.number: Tensor | None = None

    def begin(
        self,
        latent_cache: Tensor,
        key_cache: Tensor | None,
        metadata: DSAMetadata,
        positions: Tensor,
    ) -> PassCheck:
        """Before the pass writes to the layer's caches; `positions` [T], T not 0.

        Raises:
            RuntimeError: a CUDA graph is captured before any pass was run.
        """
        blocks, size, _ = latent_cache.shape
        shape, device = (blocks + 1, size), latent_cache.device
        known = self.positions
        if known is None or known.shape != shape or known.device != device:
            if latent_cache.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"DSA_CHECK=1: layer {self.name} is captured in a CUDA graph before any pass "
                    "was run; capture none (vLLM: --enforce-eager, SGLang: --disable-cuda-graph)"
                )
            known = torch.full(shape, _NOT_WRITTEN, dtype=torch.int32, device=device)
            self.positions = known
            self.number = record_of(device).add_layer(self.name)
        caches = [latent_cache] if key_cache is None else [latent_cache, key_cache]
        return PassCheck(self, caches, _latest.of(self, metadata, positions, blocks))


def layer_check(name: str, *, written_by_us_alone: bool) -> LayerCheck | None:
    """None, unless `DSA_CHECK` asks; arguments are those of `LayerCheck`."""
    if not Env.load().check:
        return None
    _announce(written_by_us_alone)
    return LayerCheck(name, written_by_us_alone=written_by_us_alone)


def pass_record(device: torch.device) -> Record | None:
    """What a host tells of each pass, outside of any graph; None, unless `DSA_CHECK` asks."""
    return record_of(device) if Env.load().check else None


_announced: set[bool] = set()
_latest = LatestRows()


def _announce(written_by_us_alone: bool) -> None:
    if written_by_us_alone in _announced:
        return
    _announced.add(written_by_us_alone)
    _logger.warning(
        "DSA_CHECK=1: every pass of every layer is checked, which takes time and 4 bytes a token "
        "and layer. A violation ends the server: on a CPU at once, on a GPU a pass or two later.%s",
        "" if written_by_us_alone else " What a KV connector loads is not told from stale pages.",
    )


class PassCheck:
    """The checks of one layer in one pass; its methods are called in their order here."""

    def __init__(self, check: LayerCheck, caches: list[Tensor], rows: CheckedRows) -> None:
        assert check.positions is not None
        assert check.number is not None
        self._written = check.positions
        self._number = check.number
        self._trusted = check.written_by_us_alone
        self._caches = caches
        self._rows = rows
        self._findings: list[list[Tensor]] = []
        for cache in caches:
            fill(cache, *rows.entries, rows.stored)

    def written(self) -> None:
        """After the pass has written: each row's place, and its entries."""
        rows = self._rows
        self._note(rows.misplaced * Kind.PLACE, rows.slots, rows.lens)
        kinds = [(Kind.LATENT_UNWRITTEN, Kind.LATENT_NAN), (Kind.KEY_UNWRITTEN, Kind.KEY_NAN)]
        for cache, (unwritten_kind, nan_kind) in zip(self._caches, kinds, strict=False):
            unwritten, nan = unwritten_and_nan(cache, *rows.entries)
            kind = (nan * nan_kind).masked_fill_(unwritten, unwritten_kind)
            self._note(kind, rows.slots, rows.slots)
        now = rows.positions.where(rows.stored, _NOT_WRITTEN)
        self._written[rows.entries] = now.to(self._written.dtype)

    def read(self, query: tuple[Tensor, Tensor] | None) -> None:
        """The index query, and of each row's request one page.

        Args:
            query: of `selection.index_query`.
        """
        rows = self._rows
        if query is not None:
            nan = any_nan(query[0]) | any_nan(query[1])
            self._note(nan * Kind.QUERY_NAN, rows.slots, rows.slots)
        held = self._written[rows.page_blocks]
        stale = self._is_stale(held, rows.page_positions, rows.page_blocks[:, None])
        kinds = (stale & rows.page_visible).to(torch.int8) * Kind.STALE
        for key_cache in self._caches[1:]:
            inside = rows.page_blocks.clamp(max=len(key_cache) - 1)
            step = max(1, _ELEMENTS // key_cache[0].numel())
            nan = torch.cat([nan_in_blocks(key_cache, part) for part in inside.split(step)])
            kinds.masked_fill_(nan & rows.page_visible, Kind.READ_KEY_NAN)
        self._note(*self._greatest(kinds, rows.page_positions, held))

    def selected(self, topk_indices: Tensor) -> None:
        """[>= T, index_topk] of the layer's own selection: how many there are."""
        lens = self._rows.lens
        count = (topk_indices[: len(lens)] >= 0).sum(-1)
        due = lens.clamp(max=topk_indices.shape[1])
        self._note((count != due) * Kind.COUNT, count, due)

    def used(self, topk_indices: Tensor, rows: slice, slots: Tensor | None) -> None:
        """Of some rows, what attention goes by; of their own selection or another layer's.

        Args:
            topk_indices: [>= T, index_topk].
            rows: which.
            slots: [rows, index_topk], where it looks for them; None where page by page.
        """
        step = max(1, _ELEMENTS // topk_indices.shape[1])
        for first in range(rows.start, rows.stop, step):
            part = slice(first, min(first + step, rows.stop))
            looked_for = None if slots is None else slots[first - rows.start :][:step]
            found = self._check_selection(topk_indices[part], part, looked_for)
            self._note(*found, rows=part)

    def _check_selection(
        self, indices: Tensor, rows: slice, slots: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, chosen, positions = self._rows.block_size, indices >= 0, indices.clamp(min=0)
        blocks = self._rows.blocks(self._rows.requests[rows, None], positions // size)
        offsets = positions % size
        held = self._written[blocks, offsets]
        kinds = (chosen & self._is_stale(held, indices, blocks)).to(torch.int8) * Kind.STALE
        if slots is None:
            slots = held
        else:
            kinds.masked_fill_(chosen & (slots != blocks * size + offsets), Kind.PAGES)
        # What is padding comes last, so an index after it does not follow it either.
        before = indices[:, :-1].masked_fill(~chosen[:, :-1], _LAST)
        kinds[:, 1:].masked_fill_(chosen[:, 1:] & (indices[:, 1:] <= before), Kind.ORDER)
        unseen = (indices >= self._rows.lens[rows, None]) | (indices < -1)
        kinds.masked_fill_(unseen, Kind.RANGE)
        kind, at, slot, held = self._greatest(kinds, indices, slots, held)
        return kind, at, slot.where(kind == Kind.PAGES, held)

    def attended(self, out: Tensor) -> None:
        """[T, heads, v_head_dim] of the pass, the last check: keeps what was found.

        Raises:
            RuntimeError: on a CPU, an invariant was violated.
        """
        rows = self._rows
        self._note(any_nan(out) * Kind.OUT_NAN, rows.slots, rows.slots)
        kinds, at, seen = (torch.stack(each) for each in zip(*self._findings, strict=True))
        kinds = kinds * rows.real
        # Not indexed by a scalar tensor, which is read by the host for that.
        first = (kinds != 0).flatten().to(torch.int8).argmax(keepdim=True)
        row = first % len(out)
        record_of(out.device).keep(
            {
                "kind": kinds.flatten()[first],
                "layer": self._number,
                "row": row,
                "request": rows.requests[row],
                "position": rows.positions[row],
                "at": at.flatten()[first],
                "seen": seen.flatten()[first],
            }
        )

    def _is_stale(self, held: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        if self._trusted:
            return held != positions
        return (blocks == 0) | (blocks == len(self._written) - 1)

    def _greatest(self, kinds: Tensor, *values: Tensor) -> list[Tensor]:
        """[rows] each: at the first column of the row's greatest kind; all [rows, columns]."""
        column = kinds.argmax(-1, keepdim=True)
        return [each.gather(1, column)[:, 0] for each in (kinds, *values)]

    def _note(self, kinds: Tensor, at: Tensor, seen: Tensor, *, rows: slice = slice(None)) -> None:
        """Of some rows the kind violated, 0 for none, and the numbers of its text; [rows] each."""
        values = [kinds.long(), at.long(), seen.long()]
        if len(kinds) < len(self._rows.slots):
            whole = [torch.zeros_like(self._rows.slots) for _ in values]
            for wide, value in zip(whole, values, strict=True):
                wide[rows] = value
            values = whole
        self._findings.append(values)
