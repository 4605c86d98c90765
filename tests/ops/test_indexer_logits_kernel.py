"""What only indexer_logits' kernels have: tiles and grids; test_indexer_logits.py the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa_kernels.arch import ARCHS, Arch, arch_of, is_interpreting
from dsa_kernels.indexer_logits import (
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
)
from dsa_kernels.tuning import LaunchConfig
from dsa_testbed.far_apart import far_apart
from dsa_testbed.index_keys import (
    FP8,
    assert_within,
    bound,
    check_paged,
    check_prefill,
    inputs,
    mask,
    truth,
)
from dsa_testbed.kernel_runs import DEVICE, stand_for

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Arch], None]:
    from dsa_kernels.indexer_logits import kernel

    return lambda arch: stand_for(monkeypatch, kernel, arch)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("num_sms", [1, 108])
def test_edges_of_blocks(keys: int, num_sms: int, chip: Callable[[Arch], None]) -> None:
    """One program walks over all keys, or each has one tile of them."""
    chip(replace(arch_of(DEVICE), num_sms=num_sms))
    check_prefill(torch.bfloat16, 9, 16, keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_a_long_chunk(dtype: torch.dtype, chip: Callable[[Arch], None]) -> None:
    """Rows from the middle of a context: tiles before, inside and after what a program sees."""
    chip(replace(arch_of(DEVICE), num_sms=1))
    q, weights, k = inputs(6, 64, 4100, dtype)
    scale = torch.rand(4100) if dtype == FP8 else None
    end = torch.tensor([1000, 1001, 4099, 4100, 70, 71])
    start = torch.tensor([900, 960, 3900, 4000, 0, 5])
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


def test_more_rows_than_a_grid_axis_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows a program, or the interpreter takes a minute; a GPU has no room for so many."""
    from dsa_kernels.indexer_logits import kernel

    if is_interpreting():
        config = LaunchConfig({"BLOCK_KEYS": 16, "BLOCK_COLUMNS": 2048}, 4, 1)
        monkeypatch.setattr(kernel, "launch_config", lambda *_key: config)
    q, weights, k = inputs(66_000, 1, 3, torch.float32)
    end = torch.randint(0, 4, (66_000,))
    result = indexer_logits(q, weights, k, torch.zeros_like(end), end)
    expected = mask(truth(q, weights, k), torch.zeros_like(end), end)
    assert_within(result, expected, bound(q, weights, k))


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:
    """Only the first axis of a grid may pass 65,535: rows lie there, and a million keys do not."""
    from dsa_kernels.indexer_logits.kernel import launches, paged_launches

    kernels_run.append("none: meta tensors")

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, keys in ((300_000, 64), (1, 1 << 20)):
        ends = meta(rows, dtype=torch.int32)
        out, weights = (meta(rows, n, dtype=torch.float32) for n in (keys, 64))
        (launch,) = launches(
            meta(rows, 64, 128), weights, meta(keys, 128), ends, ends, None, out, ARCHS[name]
        )
        groups, segments = launch.grid
        assert segments < 65_536
        blocks = launch.config.blocks
        assert groups * (blocks["BLOCK_COLUMNS"] // blocks["BLOCK_HEADS"]) >= rows
        tiles = launch.arguments["tiles"]
        assert segments * tiles * blocks["BLOCK_KEYS"] >= keys

    requests = 70_000
    lens = meta(requests, 1, dtype=torch.int32)
    table = meta(requests, 1 << 14, dtype=torch.int32)
    weights, out = (meta(requests, *rest, dtype=torch.float32) for rest in ((1, 64), (1 << 20,)))
    q, cache = meta(requests, 1, 64, 128), meta(9, 64, 128)
    (launch,) = paged_launches(q, weights, cache, table, lens, out, ARCHS[name])
    assert launch.grid[0] == requests
    assert launch.grid[1] < 65_536


def test_offsets_beyond_int32() -> None:
    """Of rows, of columns, and of pages, whose tokens lie apart, too."""
    pages, q, k, out, paged = far_apart(torch.float32, (16, 192), (8, 128), (128,), (3,), (16,))
    cache = pages[..., :128]
    cache[2], q[:], k[:] = torch.randn(16, 128), torch.randn(3, 8, 128), torch.randn(3, 128)
    weights, end = torch.randn(3, 8), torch.tensor([1, 2, 3])
    indexer_logits(q, weights, k, torch.zeros_like(end), end, out=out.T)
    assert_within(out.T, mask(truth(q, weights, k), torch.zeros(3), end), bound(q, weights, k))
    with pytest.raises(ValueError, match=r"^q: 3 heads 1073741888 values apart"):
        indexer_logits(q.transpose(0, 1), weights.T, k, torch.zeros(8).int(), torch.ones(8).int())

    (table,) = far_apart(torch.int32, (1,))
    table[:] = 2
    lens = torch.full((3, 1), 16)
    indexer_logits_paged(q[:, None], weights[:, None], cache, table, lens, 16, out=paged)
    assert_within(paged, truth(q, weights, cache[2]), bound(q, weights, cache[2]))
    assert torch.equal(gather_index_keys(cache, table[2], 16)[0], cache[2])


def test_e4m3_where_the_chip_has_it(chip: Callable[[Arch], None]) -> None:
    chip(ARCHS["sm90"])
    check_prefill(FP8, 5, 16, 130)
    check_paged(FP8, 64, 2, 16)
