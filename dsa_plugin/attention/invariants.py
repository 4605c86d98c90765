"""What `DSA_CHECK=1` checks in every layer of every pass; violation.py says what becomes of it.

The checks are an op, `dsa_kernels.invariants`, that waits for nothing and can be captured in a CUDA
graph. Rows of which a host stores nothing are padding and are not checked: their slot is negative,
or in block 0, which both hosts keep free. Of all other rows:

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

from dsa_kernels.invariants import LayerMemory, Rows, Used, check_rows, mark_rows
from dsa_plugin.attention.latest_rows import LatestRows
from dsa_plugin.attention.violation import Record, record_of
from dsa_plugin.env import Env

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata

_NOT_WRITTEN = -1

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
        known, number = self.positions, self.number
        if known is None or number is None or known.shape != shape or known.device != device:
            if latent_cache.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"DSA_CHECK=1: layer {self.name} is captured in a CUDA graph before any pass "
                    "was run; capture none (vLLM: --enforce-eager, SGLang: --disable-cuda-graph)"
                )
            known = torch.full(shape, _NOT_WRITTEN, dtype=torch.int32, device=device)
            self.positions = known
            self.number = number = record_of(device).add_layer(self.name)
        memory = LayerMemory(latent_cache, key_cache, known, self.written_by_us_alone)
        return PassCheck(memory, number, _latest.of(self, metadata, positions, blocks))


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
    """The checks of one layer in one pass; its methods are called in their order here.

    Args:
        memory: of the layer.
        number: the layer's in the record.
        rows: of the pass; their entries are filled.
    """

    def __init__(self, memory: LayerMemory, number: Tensor, rows: Rows) -> None:
        self._memory, self._number, self._rows = memory, number, rows
        self._selected = False
        self._query: tuple[Tensor, Tensor] | None = None
        self._findings = mark_rows(rows, memory)

    def selected(self, query: tuple[Tensor, Tensor] | None) -> None:
        """The layer has selected for itself, by the query of `selection.index_query`."""
        self._selected, self._query = True, query

    def used(self, topk_indices: Tensor, rows: slice, slots: Tensor | None) -> None:
        """Of some rows, what attention goes by; each row once, after all entries are written.

        Args:
            topk_indices: [>= T, index_topk], of their own selection or another layer's.
            rows: which.
            slots: [rows, index_topk], where it looks for them; None where page by page.
        """
        used = Used(rows, topk_indices, slots, self._selected, self._query)
        check_rows(self._rows, self._memory, used, self._findings)

    def attended(self, out: Tensor) -> None:
        """[T, heads, v_head_dim] of the pass, the last check: keeps what was found.

        Raises:
            RuntimeError: on a CPU, an invariant was violated.
        """
        record_of(out.device).keep(self._rows, self._findings, out, self._number)
