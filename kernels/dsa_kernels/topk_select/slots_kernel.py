"""topk_slots in Triton: where selected tokens lie, by their request's row of the block table."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.topk_select.device import find_slot
from dsa_kernels.tuning import LaunchConfig


def topk_slots(
    topk_indices: Tensor, block_table: Tensor, request_ids: Tensor, block_size: int, out: Tensor
) -> None:
    """As the public function, into `out`."""
    arch = arch_of(topk_indices.device)
    for launch in launches(topk_indices, block_table, request_ids, block_size, out, arch):
        launch.run()


@dataclass(frozen=True)
class Pages:
    """Where the last round finds the slots of what it selects, and writes them."""

    block_table: Tensor
    request_ids: Tensor
    block_size: int
    slots: Tensor

    def arguments(self) -> dict[str, Any]:
        return {
            "block_table": self.block_table,
            "request_ids": self.request_ids.contiguous(),
            "slots": self.slots,
            "max_blocks": self.block_table.shape[1],
            **strides("block_table", self.block_table, "rb"),
            **strides("slots", self.slots, "tk"),
            "BLOCK_SIZE": self.block_size,
        }


def launches(
    topk_indices: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    block_size: int,
    out: Tensor,
    arch: Arch,
) -> list[Launch]:
    rows, k = topk_indices.shape
    if out.numel() == 0:
        return []
    config = config_of_rows("slots", k, arch)
    blocks = config.blocks
    arguments = {
        "topk_indices": topk_indices,
        "num_rows": rows,
        "k": k,
        **strides("topk_indices", topk_indices, "tk"),
        **Pages(block_table, request_ids, block_size, out).arguments(),
    }
    grid = (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(k, blocks["BLOCK_COLUMNS"]))
    return [Launch(_find_slots, grid, arguments, config)]


def config_of_rows(shape_key: str, columns: int, arch: Arch) -> LaunchConfig:
    """The table's entry, its block cut to the rows' length.

    A program takes several short rows, in half a block: each row's counts need registers, too.
    """
    config = launch_config("topk_select", arch, shape_key)
    block = config.blocks["BLOCK"]
    width = min(block, triton.next_power_of_2(max(columns, 1)))
    blocks = {"BLOCK_ROWS": max(1, block // 2 // width), "BLOCK_COLUMNS": width}
    return replace(config, blocks=blocks)


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """One, of 2048 indices a row."""

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    slots = meta(64, 2048, dtype=torch.int64)
    (launch,) = launches(meta(64, 2048), meta(64, 2048), meta(64), 64, slots, arch)
    yield "slots", launch


@triton.jit(
    do_not_specialize=["block_table", "request_ids", "num_rows", "max_blocks", "block_table_r"]
)
def _find_slots(
    topk_indices,
    block_table,
    request_ids,
    slots,
    num_rows,
    k,
    max_blocks,
    topk_indices_t,
    topk_indices_k,
    block_table_r,
    block_table_b,
    slots_t,
    slots_k,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < num_rows) & (column < k)
    index = tl.load(
        topk_indices + row * topk_indices_t + column * topk_indices_k, mask=inside, other=-1
    )
    request = tl.load(request_ids + row, mask=row < num_rows, other=0).to(tl.int64)
    table = block_table + request * block_table_r
    slot = find_slot(index, inside, table, max_blocks, block_table_b, BLOCK_SIZE)
    tl.store(slots + row * slots_t + column * slots_k, slot, mask=inside)
