"""What only sparse_mla's kernels have: parts and grids; test_sparse_mla.py has the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dsa_kernels.arch import ARCHS, arch_of
from dsa_kernels.launch import launch_config
from dsa_kernels.sparse_mla import sparse_mla
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import DEVICE, stand_for
from dsa_testbed.latents import (
    SCALE,
    check,
    filled_cache,
    filled_fp8_cache,
    random_slots,
)

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the interpreter stand for another chip."""
    from dsa_kernels.sparse_mla import kernel

    return partial(stand_for, monkeypatch, kernel)


@pytest.mark.parametrize("k", [1, 15, 16, 31, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("split", [False, True])
def test_edges_of_blocks(
    k: int, split: bool, monkeypatch: pytest.MonkeyPatch, kernels_run: list[str]
) -> None:
    """Selections around each block size, whole and in as many parts as there are blocks."""
    from dsa_kernels.sparse_mla import kernel

    monkeypatch.setattr(kernel, "_splits", lambda _, tiles, __: tiles if split else 1)
    used = torch.randperm(9 * 16)[:130]
    cache, values = filled_cache(torch.bfloat16, 9, 16, used)
    q, slots = torch.randn(2, 8, 576).bfloat16(), random_slots(2, k, used)
    out, lse = sparse_mla(q, cache, slots.int(), SCALE)
    check(out, lse, q, values, slots)
    block = launch_config("sparse_mla", arch_of(DEVICE), ("float", 16)).blocks["BLOCK_K"]
    assert ("_merge" in kernels_run) == (split and k > block)


@pytest.mark.parametrize(
    ("filled", "parts"),
    [(filled_cache, 2), (filled_cache, 11), (filled_cache, 32), (filled_fp8_cache, 8)],
)
def test_a_whole_selection(filled: Any, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 of 4100 tokens, in parts that a merge adds eight at a time.

    The second row's ends early, within a block; of the third row's only the first part has any;
    the last has none.
    """
    from dsa_kernels.sparse_mla import kernel

    monkeypatch.setattr(kernel, "_splits", lambda *_: parts)
    used = torch.randperm(65 * 64)[:4100]
    cache, values = filled(torch.bfloat16, 65, 64, used)
    q, slots = torch.randn(4, 8, 576).bfloat16(), random_slots(4, 2048, used)
    length = torch.tensor([2048, 2017, 30, 0], dtype=torch.int32)
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=length)
    for row in range(4):
        seen = slots[row : row + 1, : int(length[row])]
        check(out[row, None], lse[row, None], q[row, None], values, seen)


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:
    """Only the first axis of a grid may pass 65,535: rows lie there."""
    from dsa_kernels.sparse_mla.kernel import launches

    kernels_run.append("none: meta tensors")
    for rows in (1, 70_000):
        cache = torch.empty(9, 64, 576, dtype=torch.bfloat16, device="meta")
        q = torch.empty(rows, 128, 576, dtype=cache.dtype, device="meta")
        slots = torch.empty(rows, 2048, dtype=torch.int32, device="meta")
        out = torch.empty(rows, 128, 512, dtype=cache.dtype, device="meta")
        lse = torch.empty(rows, 128, device="meta")
        found = launches(q, cache, slots, None, SCALE, out, lse, ARCHS[name])
        assert len(found) == 1 + (rows == 1)
        for launch in found:
            assert launch.grid[0] >= rows
            assert launch.grid[1] < 65_536


def test_fp8_cache_on_a_chip_that_has_e4m3(chip: Any) -> None:
    chip(ARCHS["sm90"])
    used = torch.randperm(128)[:100]
    cache, values = filled_fp8_cache(torch.bfloat16, 2, 64, used)
    q, slots = torch.randn(2, 16, 576).bfloat16(), random_slots(2, 70, used)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    check(out, lse, q, values, slots)


@pytest.mark.parametrize("parts", [1, 2])
def test_offsets_beyond_int32(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pages, whose tokens lie apart, too, of rows; in one part and in two."""
    from dsa_kernels.sparse_mla import kernel

    monkeypatch.setattr(kernel, "_splits", lambda *_: parts)
    pages, q, out = far_apart(torch.float16, (16, 600), (2, 576), (2, 512))
    cache = pages[..., :576]
    cache[2] = torch.randn(16, 576)
    q[:] = torch.randn(3, 2, 576)
    slots = random_slots(3, 40, torch.arange(32, 48).repeat(3))
    latents = cache.flatten(0, 1)
    check(*sparse_mla(q, cache, slots.int(), SCALE, out=out), q.contiguous(), latents, slots)
    for far in ({"out": out.transpose(0, 1)}, {"lse": far_apart(torch.float32, (2,))[0].T}):
        with pytest.raises(ValueError, match=r"^(out|lse): 3 heads \d+ values apart.*2\^31 values"):
            sparse_mla(torch.zeros(2, 3, 576).half(), cache, slots[:2], SCALE, **far)
    with pytest.raises(ValueError, match=r"^q: 3 heads 1073741888 values apart"):
        sparse_mla(q.transpose(0, 1), cache, slots[:2], SCALE)
