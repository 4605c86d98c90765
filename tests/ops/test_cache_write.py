"""cache_write in every form, against fp64 maths and bytes written down from the layouts."""

from __future__ import annotations

import struct
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.cache_write import (
    Norm,
    Rope,
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
)
from dsa_kernels.layout import latent_fp8_views
from dsa_kernels.testing import make_cos_sin_cache, make_index_cache, make_latent_cache
from dsa_testbed.cache_entries import (
    EPS,
    HALF,
    hadamard_truth,
    index_truth,
    latent_truth,
    make_rope,
    norm_truth,
    rope_truth,
)
from dsa_testbed.kernel_runs import KERNEL, drawn, unless_interpreted

# What a CPU runs is the reference.
pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "form"),
    pytest.mark.parametrize("form", ["reference", KERNEL], indirect=True),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64), (5, 2, 3, 64)])
def test_rope(shape: tuple[int, ...], interleaved: bool) -> None:
    x = torch.randn(*shape[:-1], 100)[..., 7:71]  # not contiguous
    positions = torch.tensor([0, 1, 17, 4099, 163839])
    rope = make_rope(163840, interleaved)
    result = apply_rope(x, rope, positions)
    torch.testing.assert_close(
        result.double(), rope_truth(x, positions, interleaved), atol=1e-6, rtol=1e-6
    )
    assert result.is_contiguous()
    assert torch.equal(result, apply_rope(x, rope, positions.int()))


@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64)])
def test_rope_into_part_of_a_tensor(shape: tuple[int, ...]) -> None:
    x, positions, rope = torch.randn(shape), torch.arange(5), make_rope(5, interleaved=True)
    wide = torch.full((*shape[:-1], 200), torch.nan)
    out = wide[..., 20:148:2]
    result = apply_rope(x, rope, positions, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, apply_rope(x, rope, positions))
    assert int(wide.isnan().sum()) == x[..., 0].numel() * (200 - 64)


@pytest.mark.parametrize("dtype", HALF)
def test_rope_rounds_once(dtype: torch.dtype) -> None:
    x, positions = torch.randn(65, 4, 64).to(dtype), torch.arange(65)
    result = apply_rope(x, make_rope(65, interleaved=False), positions)
    truth = rope_truth(x, positions, False)
    assert result.dtype == dtype
    assert ((result.double() - truth).abs() <= HALF[dtype] * truth.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_size", "tokens"),
    unless_interpreted(
        [*product([1, 16, 48, 64], [1, 63, 64, 65, 127])], [*product([1, 48, 64], [1, 65])]
    ),
)
def test_latent(dtype: torch.dtype, block_size: int, tokens: int) -> None:
    kv = torch.randn(tokens, 700).to(dtype)[:, 50:626]  # a slice of a fused projection
    kv[0] *= 1e-3  # as small as eps
    weight = torch.randn(512).to(dtype if tokens > 1 else torch.float32)  # checkpoints have both
    positions = torch.randint(0, 5000, (tokens,))
    blocks = -(-tokens // block_size) + 3
    cache = make_latent_cache(dtype, blocks, block_size, gap=640)
    storage = cache.as_strided((cache.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
    slots = torch.randperm(blocks * block_size)[:tokens]
    latent_cache_write(kv, Norm(weight, EPS), make_rope(5000, True), positions, cache, slots)
    written = cache[slots // block_size, slots % block_size].double()
    expected = latent_truth(kv, weight, positions)
    rtol, atol = (HALF[dtype] * 1.001, 4e-6) if dtype in HALF else (2e-6, 2e-6)
    assert ((written - expected).abs() <= rtol * expected.abs() + atol).all()
    # Nothing else was touched: other tokens and the gaps between pages are still NaN.
    assert int(storage.isfinite().sum()) == tokens * 576


def test_latent_fp8_bytes() -> None:
    """Signs of +-1 have RMS 1, so the weight alone decides each block: every byte is known."""
    signs = torch.tensor([1.0, -1.0]).repeat(256)
    kv = torch.cat((signs, torch.tensor([1.0, -2.0]).repeat(32)))[None]
    weight = torch.tensor([448.0, 1.0, 0.0, 896.0]).repeat_interleave(128)
    cache = make_latent_cache(torch.uint8, 3, 64, gap=16)
    before = cache.clone()
    position = torch.zeros(1, dtype=torch.int64)
    latent_cache_write(
        kv, Norm(weight, 0.0), make_rope(1, True), position, cache, position + 64 + 5
    )
    expected = (
        bytes([0x7E, 0xFE]) * 64  # +-448 at scale 1
        + bytes([0x78, 0xF8]) * 64  # +-1 = +-256 * 2^-8: 1/448 rounds up to 1/256
        + bytes([0x00, 0x80]) * 64  # +-0 at the smallest scale: 1e-4 rounds up to 2^-13
        + bytes([0x7E, 0xFE]) * 64  # +-896 = +-448 * 2
        + struct.pack("<4f", 1.0, 2.0**-8, 2.0**-13, 2.0)
        + bytes([0x80, 0x3F, 0x00, 0xC0]) * 32  # bf16 1.0, -2.0; position 0 does not rotate
    )
    assert bytes(cache[1, 5].tolist()) == expected
    before[1, 5] = cache[1, 5]
    assert torch.equal(cache, before)


def test_latent_fp8_error() -> None:
    tokens = unless_interpreted(130, 20)
    kv, weight, positions = torch.randn(tokens, 576), torch.randn(512), torch.arange(tokens)
    kv[:, :128] *= 300  # the other blocks meet the floor of the scale
    cache = make_latent_cache(torch.uint8, 3, 64)
    latent_cache_write(kv, Norm(weight, EPS), make_rope(130, True), positions, cache, positions)
    nope, scale, rope = (view.flatten(0, 1)[:tokens] for view in latent_fp8_views(cache))
    truth = latent_truth(kv, weight, positions)
    blocks = truth[:, :512].unflatten(1, (4, 128))
    step = (blocks.abs().amax(-1) / 448).clamp(min=1e-4)
    assert ((scale >= step * 0.999) & (scale < 2.001 * step)).all()
    assert torch.equal(scale.log2(), scale.log2().round())
    result = nope.double().unflatten(1, (4, 128)) * scale.double()[..., None]
    # e4m3 has 3 fraction bits (half a step: 2^-4) and a smallest step of 2^-9.
    bound = 2.0**-4 * blocks.abs() + 2.0**-10 * scale[..., None] + 1e-6
    assert ((result - blocks).abs() <= bound).all()
    pe = truth[:, 512:]
    assert ((rope.double() - pe).abs() <= 2.0**-8 * pe.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("hadamard", [True, False])
def test_index(dtype: torch.dtype, interleaved: bool, hadamard: bool) -> None:
    k, weight, bias = torch.randn(37, 200).to(dtype)[:, 10:138], torch.randn(128), torch.randn(128)
    k[0] *= 1e-3  # as small as eps
    positions, slots = torch.randint(0, 5000, (37,)), torch.randperm(144)[:37]
    cache = make_index_cache(dtype, 3, 48, gap=128)
    index_cache_write(
        k,
        Norm(weight, EPS, bias),
        make_rope(5000, interleaved),
        positions,
        cache,
        slots,
        hadamard=hadamard,
    )
    normed = norm_truth(k, weight, bias).to(dtype)
    expected = index_truth(normed, positions, interleaved).to(dtype)
    if hadamard:
        expected = (expected.double() @ hadamard_truth()).to(dtype)
    result = cache[slots // 48, slots % 48]
    if dtype == torch.float32:
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=2e-6)
    else:
        # fp32 against fp64 may fall on the other side of a rounding boundary, rarely.
        assert (result == expected).float().mean() > 0.99
        torch.testing.assert_close(result.float(), expected.float(), atol=0.05, rtol=2.0**-6)
    assert int(cache.isfinite().sum()) == 37 * 128


@pytest.mark.parametrize("block_size", [16, 64])
def test_index_fp8_bytes(block_size: int) -> None:
    """A LayerNorm weight of 0 leaves the bias: every byte of the page is known."""
    cache = make_index_cache(torch.uint8, 3, block_size, gap=12)
    pages = [bytearray(page) for page in cache.flatten(1).tolist()]
    zero = torch.zeros(1, dtype=torch.int64)
    for slot, value, code, scale in (
        (3, 448.0, 0x7E, 1.0),
        (block_size + 5, -1.0, 0xF8, 2.0**-8),
        (2 * block_size, 450.0, 0x76, 2.0),  # 225 lies between 224 and 240
        (2 * block_size - 1, 0.0, 0x00, 2.0**-22),  # 1e-4 / 448 rounds up to 2^-22
    ):
        index_cache_write(
            torch.randn(1, 128),
            Norm(torch.zeros(128), EPS, torch.full((128,), value)),
            make_rope(1, interleaved=False),
            zero,
            cache,
            zero + slot,
        )
        page, offset = pages[slot // block_size], slot % block_size
        page[128 * offset : 128 * offset + 128] = bytes([code]) * 128
        start = block_size * 128 + 4 * offset
        page[start : start + 4] = struct.pack("<f", scale)
    assert [bytes(page) for page in cache.flatten(1).tolist()] == [bytes(page) for page in pages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amax", [448.0, 0.875, 1e-6, 3e4, 448.00003])
def test_fp8_scale_is_exact_at_powers_of_two(dtype: torch.dtype, amax: float) -> None:
    """amax = 448 * 2^n must take the scale 2^n, not the next: log2 in fp32 may get this wrong."""
    q = torch.zeros(1, 1, 128, dtype=dtype)
    for value in (amax, -amax):
        q[0, 0, 100] = value
        codes, weights = index_query(
            q, torch.ones(1, 1), make_rope(1, interleaved=True), torch.zeros(1).long(), fp8=True
        )
        scale = 2.0**-22
        while scale < max(q.abs().max().item(), 1e-4) / 448:
            scale *= 2
        assert torch.equal(weights, torch.full_like(weights, scale * 128**-0.5))
        expected = (q.float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_fp8_shows_what_is_not_finite(value: float, hadamard: bool) -> None:
    """As NaN, which is all that e4m3 has: 448 would pass for a value."""
    q = torch.ones(1, 2, 128)
    q[0, 1, 100] = value
    arguments = (q, torch.ones(1, 2), make_rope(1, interleaved=True), torch.zeros(1).long())
    codes, weights = index_query(*arguments, hadamard=hadamard, fp8=True)
    expected = torch.zeros(2, 128, dtype=torch.bool)
    expected[1, :] = hadamard
    expected[1, 100] = True
    assert torch.equal(codes[0].float().isnan(), expected)
    if value == value:
        largest = 2.0**120 * (2 * 128) ** -0.5
        torch.testing.assert_close(weights[0, 1], torch.tensor(largest), atol=0, rtol=1e-6)


def test_fp8_latents_show_what_is_not_finite() -> None:
    """A weight beyond fp16's range makes an infinity of a finite value."""
    kv, position = torch.ones(1, 576, dtype=torch.float16), torch.zeros(1).long()
    weight = torch.ones(512)
    weight[[3, 200]] = torch.tensor([1e5, -1e5])
    cache = make_latent_cache(torch.uint8, 1, 16)
    latent_cache_write(kv, Norm(weight, EPS), make_rope(1, True), position, cache, position)
    nope, scale, _ = latent_fp8_views(cache)
    assert nope[0, 0].float().isnan().nonzero().flatten().tolist() == [3, 200]
    assert scale[0, 0].isfinite().all()


@pytest.mark.parametrize("heads", unless_interpreted([1, 8, 20, 64], [1, 20, 64]))
@pytest.mark.parametrize("interleaved", [True, False])
def test_query(heads: int, interleaved: bool) -> None:
    tokens = unless_interpreted(300, 9)
    q, weights = torch.randn(tokens, heads, 128), torch.randn(tokens, heads).bfloat16()
    positions, rope = torch.arange(tokens) * 37, make_rope(300 * 37, interleaved)
    rotated, scaled = index_query(q, weights, rope, positions)
    expected = index_truth(q, positions, interleaved)
    torch.testing.assert_close(rotated.double(), expected, atol=2e-6, rtol=2e-6)
    assert scaled.dtype == torch.float32
    factor = heads**-0.5 * 128**-0.5
    torch.testing.assert_close(scaled.double(), weights.double() * factor, atol=0, rtol=1e-6)

    quantised, rescaled = index_query(q, weights, rope, positions, hadamard=True, fp8=True)
    scale = rescaled / scaled
    torch.testing.assert_close(scale.log2(), scale.log2().round(), atol=1e-4, rtol=0)
    expected = expected @ hadamard_truth()
    bound = 2.0**-4 * expected.abs() + 2.0**-9 * scale[..., None]
    assert ((quantised.double() * scale[..., None] - expected).abs() <= bound).all()


def test_strided_query() -> None:
    q, weights = torch.randn(8, 5, 300)[..., 40:168].transpose(0, 1), torch.randn(8, 5).T
    positions, rope = torch.arange(10)[::2], make_rope(10, interleaved=False)
    rotated, scaled = index_query(q, weights, rope, positions)
    expected = index_truth(q, positions, False)
    torch.testing.assert_close(rotated.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(scaled, weights * (8**-0.5 * 128**-0.5), atol=0, rtol=1e-6)


def test_strided_inputs() -> None:
    """Every value of every input is followed by one that is not its own.

    Loads of one value at a time put a row into other threads than loads of four, so sums have
    another order. One of 512 squares is rounded 32 times at most, within a thread and between
    them; RoPE's two products are rounded 4 times each way, fused or not.
    """

    def strided(x: Tensor) -> Tensor:
        return torch.stack((x, torch.full_like(x, 3)), -1)[..., 0]

    inputs = [torch.randn(5, 576), torch.randn(512), torch.randn(5, 128), torch.randn(128)]
    inputs += [torch.randn(128), torch.randperm(5), make_cos_sin_cache(5), torch.arange(4, 9)]
    q, head_weights = torch.randn(5, 2, 128), torch.randn(5, 2)
    results = []
    for view in (torch.clone, strided):
        kv, weight, k, k_weight, k_bias, positions, table, slots = map(view, inputs)
        latent, index = make_latent_cache(kv.dtype, 1, 16), make_index_cache(k.dtype, 1, 16)
        pairs, halves = Rope(table, interleaved=True), Rope(table, interleaved=False)
        latent_cache_write(kv, Norm(weight, EPS), pairs, positions, latent, slots)
        index_cache_write(k, Norm(k_weight, EPS, k_bias), halves, positions, index, slots)
        query = index_query(view(q), view(head_weights), halves, positions)
        results.append((latent[0, 4:9], index[0, 4:9], *query))
    for result, expected, roundings in zip(*results, (32, 32, 8, 0), strict=True):
        bound = roundings * 2.0**-24 * expected.abs().max()
        assert ((result - expected).abs() <= bound).all()


def test_hadamard_keeps_scores() -> None:
    """On both sides it changes no dot product; on one side it changes all."""
    q, k, positions = torch.randn(9, 4, 128), torch.randn(9, 128), torch.arange(9)
    rope, ones = make_rope(9, interleaved=False), torch.ones(9, 4)
    keys, queries = [], []
    for hadamard in (False, True):
        cache = make_index_cache(torch.float32, 1, 16)
        index_cache_write(
            k,
            Norm(torch.ones(128), EPS, torch.zeros(128)),
            rope,
            positions,
            cache,
            positions,
            hadamard=hadamard,
        )
        keys.append(cache[0, :9])
        queries.append(index_query(q, ones, rope, positions, hadamard=hadamard)[0])
    plain, both, one = (queries[a] @ keys[b].T for a, b in ((0, 0), (1, 1), (0, 1)))
    torch.testing.assert_close(plain, both, atol=5e-5, rtol=1e-5)
    assert (plain - one).abs().mean() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@drawn(30, interpreted=20)
@given(data=st.data())
def test_padding_is_skipped(dtype: torch.dtype, data: st.DataObject) -> None:
    """Any mixture of real, padded and hostile slots: the same as writing the real ones alone."""
    tokens = data.draw(st.integers(0, unless_interpreted(12, 8)))
    real = data.draw(st.permutations(range(12)))[:tokens]
    ints = data.draw(st.sampled_from([torch.int32, torch.int64]))
    bad = st.sampled_from([-1, -2, 12, torch.iinfo(ints).min, torch.iinfo(ints).max])
    slots = [data.draw(bad) if data.draw(st.booleans()) else slot for slot in real]
    keep = [token for token, slot in enumerate(slots) if 0 <= slot < 12]
    kv, k, positions = torch.randn(tokens, 576), torch.randn(tokens, 128), torch.arange(tokens)
    rope, mapping = make_rope(16, interleaved=True), torch.tensor(slots, dtype=ints)
    results = []
    for rows in (list(range(tokens)), keep):
        latent = make_latent_cache(dtype, 3, 4, gap=8)
        index = make_index_cache(dtype, 3, 4, gap=8)
        latent_cache_write(
            kv[rows], Norm(torch.ones(512), EPS), rope, positions[rows], latent, mapping[rows]
        )
        index_cache_write(
            k[rows],
            Norm(torch.ones(128), EPS, torch.zeros(128)),
            rope,
            positions[rows],
            index,
            mapping[rows],
        )
        results.append([cache.untyped_storage().tolist() for cache in (latent, index)])
    assert results[0] == results[1]
