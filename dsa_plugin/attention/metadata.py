"""One batch as the attention core sees it, whatever host it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Rows `start..end` of the batch, all of one request, scored against its first `num_keys` keys.

    Host integers: a chunk is a piece of work to launch, so its bounds must not need a device read.
    """

    request: int
    start: int
    end: int
    num_keys: int


@dataclass(frozen=True)
class DSAMetadata:
    """What one forward pass needs to know about its batch.

    Rows are query tokens. Decodes come first: `num_decodes` requests of `decode_query_len` rows
    each (1, or 1 + draft tokens under speculative decoding), then the prefill chunks. Tensors are
    the host's own persistent buffers, so that a captured decode graph sees each new batch.

    Attributes:
        num_tokens: rows that are real; a host may pad its tensors beyond it.
        num_decodes: decode requests.
        decode_query_len: rows of each decode request.
        max_decode_context_len: upper bound of `context_lens` over the decode rows.
        prefill_chunks: the remaining rows.
        request_ids: [num_tokens] int32, row of `block_table` that each token belongs to.
        context_lens: [num_tokens] int32, keys visible to each row (its own included).
        block_table: [num_requests, max_blocks] int32, physical block of each logical one.
        slot_mapping: [num_tokens] int64, where each token's cache entries go; -1 = nowhere.
        block_size: tokens a block.
        workspace_bytes: most bytes that one call's logits may take, or the keys and values that are
            expanded for it.
    """

    num_tokens: int
    num_decodes: int
    decode_query_len: int
    max_decode_context_len: int
    prefill_chunks: tuple[PrefillChunk, ...]
    request_ids: Tensor
    context_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    block_size: int
    workspace_bytes: int

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decodes * self.decode_query_len


def split_prefill(
    query_start: list[int],
    seq_lens: list[int],
    first_request: int,
    workspace_bytes: int,
) -> tuple[PrefillChunk, ...]:
    """Cut the prefill requests into chunks whose fp32 logits fit the workspace.

    Args:
        query_start: row at which each request starts, and the end of the last one.
        seq_lens: context of each request at the end of this pass, in tokens.
        first_request: requests before it are decodes.
        workspace_bytes: most bytes that one chunk's [rows, num_keys] fp32 logits may take; a
            single row is always allowed.
    """
    chunks = []
    for request in range(first_request, len(seq_lens)):
        start, end = query_start[request], query_start[request + 1]
        before = seq_lens[request] - (end - start)
        row = start
        while row < end:
            # A chunk's last row sees the most keys, so a longer chunk is also a wider one: the
            # request's whole context bounds it from above.
            rows = max(1, workspace_bytes // (4 * seq_lens[request]))
            stop = min(end, row + rows)
            chunks.append(PrefillChunk(request, row, stop, before + stop - start))
            row = stop
    return tuple(chunks)
