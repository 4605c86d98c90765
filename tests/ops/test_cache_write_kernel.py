"""What only cache_write's kernels have: e4m3 by integers, grids; test_cache_write.py the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dsa_kernels.arch import ARCHS
from dsa_kernels.cache_write import (
    Norm,
    Rope,
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
    reference,
)
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_kernels.testing import make_index_cache, make_latent_cache
from dsa_testbed.cache_entries import EPS, make_rope, rope_truth
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import unless_interpreted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_more_rows_than_a_grid_axis_has() -> None:
    """A program takes a token's heads; the interpreter, milliseconds a program."""
    tokens = unless_interpreted(70_000, 100)
    x, positions = torch.randn(tokens, 1, 64), torch.arange(tokens)
    result = apply_rope(x, make_rope(tokens, interleaved=True), positions)
    expected = rope_truth(x, positions, True)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:
    """Only the first axis of a grid may pass 65,535: tokens and heads lie there."""
    from dsa_kernels.cache_write import kernel

    kernels_run.append("none: meta tensors")
    empty, tokens, arch = partial(torch.empty, device="meta"), 2_000_000, ARCHS[name]
    norm, rope = Norm(empty(512), EPS, empty(128)), Rope(empty(9, 64), interleaved=True)
    positions, kv, q = empty(tokens), empty(tokens, 576), empty(tokens, 65, 128)
    rotated = rope, positions
    latent = kernel.latent_job(kv, norm, *rotated, empty(3, 16, 576), positions)
    k, cache = kv[:, :128], empty(3, 16, 128)
    key = kernel.key_job(k, norm, *rotated, cache, positions, False, arch)
    query = kernel.query_job(q, *rotated, q, arch)
    (launch,) = kernel.launches([latent, key, query], arch)
    blocks = launch.config.blocks
    assert launch.grid == (latent.programs + key.programs + query.programs,)
    assert latent.programs == tokens
    assert key.programs * blocks["BLOCK_TOKENS"] >= tokens
    assert query.programs * blocks["BLOCK_HEADS"] >= 65 * tokens


def test_e4m3_is_encoded_as_torch_does() -> None:
    """Every code, what lies halfway between two, and one fp32 step beside both: every byte."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat((codes, halfway))
    up, down = exact.nextafter(torch.tensor(torch.inf)), exact.nextafter(torch.tensor(-1.0))
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-10, 2.0**-11])
    values = torch.cat((exact, up, down, tiny, torch.rand(4000) * 448, torch.rand(4000) / 50))
    values = values.clamp(max=448)
    values = torch.cat((values, -values))
    # Behind the 64 that are rotated, which would turn -0.0 into 0.0; 448 makes the scale 1.
    rows = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64)
    q = torch.cat((torch.full_like(rows, 448.0), rows), -1)
    zero, ones = torch.zeros(len(q)).long(), torch.ones(len(q), 1)
    result, weights = index_query(q, ones, make_rope(1, True), zero, fp8=True)
    assert torch.equal(weights, torch.full_like(weights, 128**-0.5))
    assert torch.equal(result.view(torch.uint8), q.to(torch.float8_e4m3fn).view(torch.uint8))


def assert_nearly_same(codes: Tensor, expected: Tensor, scale: Tensor, other: Tensor) -> None:
    """fp32 sums in another order move a value by some 2^-23 of it, so a code's boundary, which is
    2^-4 of it away on average, lies in between for one value in 10,000 or so; then by one code.
    """
    assert torch.equal(scale.view(torch.int32), other.view(torch.int32))  # NaN, where unwritten
    steps = (codes.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    # +0 and -0 are 128 codes apart.
    steps[(codes.float() == 0) & (expected.float() == 0)] = 0
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_latents_are_the_reference_s(dtype: torch.dtype) -> None:
    kv, weight, positions = torch.randn(40, 576).to(dtype), torch.randn(512), torch.arange(40)
    kv[:, :128] *= 300  # the other blocks meet the floor of the scale
    kv[0, 512:] = 1 + torch.arange(64) / 256  # half of them between two bf16
    caches = [make_latent_cache(torch.uint8, 3, 16, gap=16) for _ in range(2)]
    for write, cache in zip(
        (latent_cache_write, reference.latent_cache_write), caches, strict=True
    ):
        write(kv, Norm(weight, EPS), make_rope(40, True), positions, cache, torch.arange(40) + 4)
    (nope, scale, rope), (nope_r, scale_r, rope_r) = (latent_fp8_views(cache) for cache in caches)
    assert_nearly_same(nope, nope_r, scale, scale_r)
    assert torch.equal(rope.view(torch.int16)[..., :], rope_r.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hadamard", "size"), [(True, 1.0), (False, 1.0), (False, 1e-5)])
def test_fp8_index_keys_are_the_reference_s(
    dtype: torch.dtype, hadamard: bool, size: float
) -> None:
    """Keys of ordinary size, and some that meet the floor of the scale."""
    k, weight, bias = torch.randn(60, 128).to(dtype), *(size * torch.randn(2, 128))
    positions = torch.arange(60)
    caches = [make_index_cache(torch.uint8, 3, 48, gap=12) for _ in range(2)]
    for write, cache in zip((index_cache_write, reference.index_cache_write), caches, strict=True):
        write(
            k,
            Norm(weight, EPS, bias),
            make_rope(60, interleaved=False),
            positions,
            cache,
            positions + 9,
            hadamard=hadamard,
        )
    (key, scale), (key_r, scale_r) = (index_fp8_views(cache) for cache in caches)
    # bf16 rounds before fp8 does, so a bf16 step is a whole code now and then.
    assert_nearly_same(key, key_r, scale, scale_r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hadamard", [True, False])
def test_fp8_queries_are_the_reference_s(dtype: torch.dtype, hadamard: bool) -> None:
    q, ones, positions = torch.randn(20, 4, 128).to(dtype), torch.ones(20, 4), torch.arange(20)
    arguments = (q, ones, make_rope(20, interleaved=True), positions)
    results: list[Tensor] = []
    for query in (index_query, reference.index_query):
        results += query(*arguments, hadamard=hadamard, fp8=True)
    codes, weights, expected, expected_weights = results
    assert_nearly_same(codes, expected, weights, expected_weights)


def test_offsets_beyond_int32() -> None:
    """Of pages, tokens, angles and queries written: the same bytes as where they lie together."""
    from dsa_kernels.cache_write import kernel

    shapes = (16, 600), (16, 192), (576,), (128,), (2, 128), (2, 128), (64,)
    latents, keys, *inputs = far_apart(torch.float16, *shapes)
    far = [latents[..., :576], keys[..., :128], *inputs]
    for tensor in inputs:
        tensor.copy_(torch.randn(tensor.shape))
    near = [tensor.contiguous() for tensor in far]
    positions, slots = torch.arange(3).int(), torch.tensor([-1, 0, 2 * 16 + 1]).int()
    weight, bias, head_weights = torch.randn(512), torch.randn(128), torch.randn(3, 2)
    for latent, index, kv, k, q, rotated, table in (far, near):
        rope = Rope(table, interleaved=True)
        latent_cache_write(kv, Norm(weight, EPS), rope, positions, latent, slots)
        norm = Norm(weight[:128], EPS, bias)
        index_cache_write(k, norm, rope, positions, index, slots)
        outputs = (rotated, torch.empty(3, 2))
        kernel.index_query(q, head_weights, rope, positions, False, *outputs)
    for result, expected in zip(far, near, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("tokens", [15, 16, 17, 32, 33])
def test_nothing_past_the_last_token(tokens: int) -> None:
    """Around the edges of a program's tokens and rows; what lies behind each input is valid."""
    from dsa_kernels.cache_write import kernel

    k, positions, rope = torch.randn(40, 128), torch.arange(40), make_rope(40, interleaved=True)
    index = make_index_cache(torch.float32, 3, 16)
    norm, few = Norm(torch.ones(128), EPS, torch.zeros(128)), positions[:tokens]
    index_cache_write(k[:tokens], norm, rope, few, index, few)
    x, out = k.view(40, 2, 64).repeat(1, 2, 1), torch.full((40, 4, 64), torch.nan)
    kernel.apply_rope(x[:tokens], rope, few, out[:tokens])
    written = torch.arange(48) < tokens
    assert torch.equal(index.flatten(0, 1).isfinite().all(1), written)
    assert torch.equal(out.isfinite().flatten(1).all(1), written[:40])
