"""topk_select: rows of a decode batch, and a prefill chunk of one request; 2048 of each row.

A decode step also wants the slots of what it selects: in the same launch, beside two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmark_case import USUAL_CONTEXT, Calls, Case, Scale
from peers import Run, runs
from torch import Tensor

from dsa_kernels.dims import INDEX_PAGE
from dsa_kernels.testing import INDEX_TOPK
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots

VLLM = "vllm/_C_stable_libtorch.abi3.so"
WORKSPACE_BYTES = 1 << 20  # what vLLM gives its kernels (RADIX_TOPK_WORKSPACE_SIZE)
COOPERATIVE_ROWS = 32  # the most for which vLLM chooses cooperative_topk


def cases(scale: Scale) -> Iterator[Case]:
    k = 16 if scale.tiny else INDEX_TOPK
    for context in (128,) if scale.tiny else (8 << 10, 32 << 10, 128 << 10):
        for rows in (2,) if scale.tiny else (1, 8, 32, 128):
            nbytes = 4 * rows * (context + k)
            yield _case("decode", rows, context, k, nbytes, partial(_decode_calls, scale))
            nbytes += 8 * rows * k
            yield _case("decode with slots", rows, context, k, nbytes, partial(_slots_calls, scale))
    chunk = 4 if scale.tiny else 4096
    for context in (128,) if scale.tiny else (32 << 10, 128 << 10):
        nbytes = 4 * chunk * (context - chunk // 2 + k)
        yield _case("prefill", chunk, context, k, nbytes, partial(_prefill_calls, scale))


def _case(
    step: str, rows: int, context: int, k: int, nbytes: int, make: Callable[..., Calls]
) -> Case:
    return Case(
        op="topk_select",
        shape=f"{step} {context >> 10}K, {rows} rows, k {k}",
        order=int(context != USUAL_CONTEXT),
        flops=0,
        bytes=nbytes,
        tolerance=0.0,
        make=partial(make, rows, context, k, nbytes),
    )


def _decode_calls(scale: Scale, rows: int, context: int, k: int, nbytes: int) -> Calls:
    end = torch.full((rows,), context, dtype=torch.int32, device=scale.device)
    calls: dict[str, Callable[..., Tensor]]
    calls = {"persistent_topk": _persistent, "per_row": _per_row}
    if rows <= COOPERATIVE_ROWS:
        calls["cooperative_topk"] = _cooperative
    return _calls(scale, end, context, k, nbytes, calls)


def _prefill_calls(scale: Scale, rows: int, context: int, k: int, nbytes: int) -> Calls:
    end = torch.arange(context - rows + 1, context + 1, dtype=torch.int32, device=scale.device)
    return _calls(scale, end, context, k, nbytes, {"per_row": _per_row_of_ranges})


def _calls(
    scale: Scale,
    end: Tensor,
    context: int,
    k: int,
    nbytes: int,
    vllm: dict[str, Callable[..., Tensor]],
) -> Calls:
    """Rows of `context` scores, of which the first `end` count."""
    rows = len(end)
    beyond = torch.arange(context, device=scale.device) >= end[:, None]
    ours: list[Run] = []
    inputs: list[tuple[Tensor, ...]] = []
    for _ in range(scale.copies(nbytes)):
        logits = torch.randn(rows, context, device=scale.device).masked_fill(beyond, -torch.inf)
        out = torch.empty(rows, k, dtype=torch.int32, device=scale.device)
        ours.append(partial(topk_select, logits, k, None, end, out=out))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=scale.device)
        inputs.append((logits, torch.zeros_like(end), end, workspace, torch.empty_like(out)))
    operators = scale.peers.operators(VLLM)
    peers = {f"vLLM {name}": runs(operators, call, inputs) for name, call in vllm.items()}
    peers["torch.topk"] = runs(torch, _torch_topk, inputs)
    return Calls(ours, peers, partial(_selected, inputs[0][0]))


def _slots_calls(scale: Scale, rows: int, context: int, k: int, nbytes: int) -> Calls:
    end = torch.full((rows,), context, dtype=torch.int32, device=scale.device)
    pages = -(-context // INDEX_PAGE)
    requests = torch.arange(rows, dtype=torch.int32, device=scale.device)
    one_pass: list[Run] = []
    two: list[Run] = []
    for _ in range(scale.copies(nbytes)):
        logits = torch.randn(rows, context, device=scale.device)
        table = torch.randperm(rows * pages, device=scale.device).int().view(rows, pages)
        one_pass.append(partial(_slots, logits, k, end, table, requests))
        two.append(partial(_select_then_find, logits, k, end, table, requests))
    return Calls(one_pass, {"two launches": two})


def _slots(logits: Tensor, k: int, end: Tensor, table: Tensor, requests: Tensor) -> Tensor:
    return topk_select_slots(logits, k, end, table, requests, INDEX_PAGE)[1]


def _select_then_find(
    logits: Tensor, k: int, end: Tensor, table: Tensor, requests: Tensor
) -> Tensor:
    return topk_slots(topk_select(logits, k, None, end), table, requests, INDEX_PAGE)


def _selected(logits: Tensor, indices: Tensor) -> Tensor:
    """The selected scores in order: peers neither sort indices nor break ties as we do."""
    score = logits.gather(1, indices.long().clamp(min=0))
    return score.masked_fill(indices < 0, -torch.inf).sort().values


def _torch_topk(
    library: Any, logits: Tensor, _start: Tensor, _end: Tensor, _workspace: Tensor, out: Tensor
) -> Tensor:
    indices: Tensor = library.topk(logits, out.shape[1], sorted=False).indices
    return indices


def _cooperative(
    library: Any, logits: Tensor, _start: Tensor, end: Tensor, workspace: Tensor, out: Tensor
) -> Tensor:
    library.cooperative_topk(logits, end, out, workspace, out.shape[1], logits.shape[1])
    return out


def _persistent(
    library: Any, logits: Tensor, _start: Tensor, end: Tensor, workspace: Tensor, out: Tensor
) -> Tensor:
    library.persistent_topk(logits, end, out, workspace, out.shape[1], logits.shape[1])
    return out


def _per_row(
    library: Any, logits: Tensor, _start: Tensor, end: Tensor, _workspace: Tensor, out: Tensor
) -> Tensor:
    library.top_k_per_row_decode(logits, 1, end, out, len(end), *logits.stride(), out.shape[1])
    return out


def _per_row_of_ranges(
    library: Any, logits: Tensor, start: Tensor, end: Tensor, _workspace: Tensor, out: Tensor
) -> Tensor:
    rows, k = out.shape
    library.top_k_per_row_prefill(logits, start, end, out, rows, *logits.stride(), k)
    return out
