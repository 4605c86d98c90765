"""cache_write's ops within `one_launch`: the same results as alone, from one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from dsa_kernels.cache_write import (
    Norm,
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
    one_launch,
)
from dsa_kernels.testing import make_index_cache, make_latent_cache
from dsa_testbed.cache_entries import EPS, make_rope
from dsa_testbed.kernel_runs import KERNEL

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form")
on_kernels = pytest.mark.parametrize("form", [KERNEL], indirect=True)


class Tokens:
    """What a layer makes of some tokens: both caches, index queries, rotated queries."""

    def __init__(self, tokens: int, cache_dtype: torch.dtype = torch.uint8) -> None:
        torch.manual_seed(tokens)
        self.fp8 = cache_dtype == torch.uint8
        self.kv, self.k = torch.randn(tokens, 576), torch.randn(tokens, 128)
        self.q, self.weights = torch.randn(tokens, 11, 128), torch.randn(tokens, 11)
        self.q_pe = torch.randn(tokens, 9, 192)[..., 128:]
        self.rotated = torch.full((tokens, 9, 576), torch.nan)
        self.positions, self.slots = torch.arange(tokens) * 3, torch.randperm(4 * 16)[:tokens]
        self.latents = make_latent_cache(cache_dtype, 4, 16, gap=16)
        self.keys = make_index_cache(cache_dtype, 4, 16, gap=16)
        self.pairs, self.halves = make_rope(256, True), make_rope(256, False)

    def write_latents(self) -> None:
        norm = Norm(torch.linspace(0, 2, 512), EPS)
        arguments = (self.kv, norm, self.pairs, self.positions, self.latents, self.slots)
        latent_cache_write(*arguments)

    def write_keys(self) -> None:
        norm = Norm(torch.linspace(0, 2, 128), EPS, torch.ones(128))
        arguments = (self.k, norm, self.halves, self.positions, self.keys, self.slots)
        index_cache_write(*arguments, hadamard=self.fp8)

    def query(self) -> tuple[Tensor, Tensor]:
        arguments = (self.q, self.weights, self.halves, self.positions)
        return index_query(*arguments, hadamard=self.fp8, fp8=self.fp8)

    def rotate(self) -> None:
        apply_rope(self.q_pe, self.pairs, self.positions, out=self.rotated[..., 512:])

    def all(self, *, together: bool) -> list[Tensor]:
        with one_launch() if together else nullcontext():
            self.write_latents()
            self.rotate()
            self.write_keys()
            q, weights = self.query()
        tensors = (self.latents, self.keys, self.rotated, q, weights)
        return [tensor.contiguous().view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize("form", ["reference", KERNEL], indirect=True)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("cache_dtype", [torch.uint8, torch.float32])
def test_together_as_alone(cache_dtype: torch.dtype, tokens: int) -> None:
    alone = Tokens(tokens, cache_dtype).all(together=False)
    together = Tokens(tokens, cache_dtype).all(together=True)
    for result, expected in zip(together, alone, strict=True):
        assert torch.equal(result, expected)


@on_kernels
def test_one_launch_of_what_is_there(kernels_run: list[str]) -> None:
    """Whichever ops; of rows that are none, none."""
    calls: list[Callable[[Tokens], object]] = [
        Tokens.write_latents,
        Tokens.write_keys,
        Tokens.query,
        Tokens.rotate,
    ]
    for tokens, launches in ((2, 1), (0, 0)):
        for few in (calls, calls[:2], calls[1:], calls[2:3], []):
            kernels_run.clear()
            batch = Tokens(tokens)
            with one_launch():
                for call in few:
                    call(batch)
                assert kernels_run == []
            assert len(kernels_run) == (launches if few else 0)
    kernels_run.append("none: of no rows")


@on_kernels
def test_an_op_twice_is_refused() -> None:
    batch = Tokens(2)
    with one_launch():
        batch.rotate()
        with pytest.raises(ValueError, match="twice"):
            batch.rotate()
    assert batch.rotated[..., 512:].isfinite().all()


@on_kernels
def test_nothing_is_launched_after_an_error(kernels_run: list[str]) -> None:
    """Nor kept for the next one."""
    batch = Tokens(2)

    def fail() -> None:
        with one_launch():
            batch.rotate()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert kernels_run == []
    batch.write_keys()
    assert len(kernels_run) == 1
    assert batch.rotated.isnan().all()


@on_kernels
def test_another_thread_launches_its_own(kernels_run: list[str]) -> None:
    """A host may overlap two batches."""
    mine, its = Tokens(2), Tokens(3)
    thread = threading.Thread(target=its.rotate)
    with one_launch():
        mine.rotate()
        thread.start()
        thread.join()
        assert len(kernels_run) == 1
        assert mine.rotated.isnan().all()
    assert len(kernels_run) == 2
