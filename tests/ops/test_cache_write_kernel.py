"""cache_write's Triton kernels, interpreted on a CPU, against fp64 and the reference's bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from dsa_testbed.far_apart import far_apart

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

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
    expected = rope_truth(x, positions, False)
    assert result.dtype == dtype
    assert ((result.double() - expected).abs() <= HALF[dtype] * expected.abs() + 2e-6).all()


def test_more_rows_than_a_grid_axis_has() -> None:
    x, positions = torch.randn(1100, 64, 64), torch.arange(1100)
    result = apply_rope(x, make_rope(1100, interleaved=True), positions)
    assert result.isfinite().all()
    expected = rope_truth(x[-1:], positions[-1:], True)
    torch.testing.assert_close(result[-1:].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 48, 64])
@pytest.mark.parametrize("tokens", [1, 65])
def test_latent(dtype: torch.dtype, block_size: int, tokens: int) -> None:
    kv = torch.randn(tokens, 700).to(dtype)[:, 50:626]  # a slice of a fused projection
    kv[0] *= 1e-3  # as small as eps
    weight, positions = torch.randn(512), torch.randint(0, 5000, (tokens,))
    blocks = -(-tokens // block_size) + 3
    cache = make_latent_cache(dtype, blocks, block_size, gap=640)
    storage = cache.as_strided((cache.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
    slots = torch.randperm(blocks * block_size)[:tokens]
    latent_cache_write(kv, Norm(weight, EPS), make_rope(5000, True), positions, cache, slots)
    written = cache[slots // block_size, slots % block_size].double()
    expected = latent_truth(kv, weight, positions)
    limit = (HALF.get(dtype, 2e-6) * 1.001) * expected.abs() + 4e-6
    assert ((written - expected).abs() <= limit).all()
    # Nothing else was touched: other tokens and the gaps between pages are still NaN.
    assert int(storage.isfinite().sum()) == tokens * 576


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
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=5e-6)
    else:
        # fp32 against fp64 may fall on the other side of a rounding boundary, rarely.
        assert (result == expected).float().mean() > 0.99
        torch.testing.assert_close(result.float(), expected.float(), atol=0.05, rtol=2.0**-6)
    assert int(cache.isfinite().sum()) == 37 * 128


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


@pytest.mark.parametrize("amax", [448.0, 0.875, 1e-6, 3e4, 448.00003])
def test_fp8_scale_is_exact_at_powers_of_two(amax: float) -> None:
    q = torch.zeros(1, 1, 128)
    q[0, 0, 100] = -amax
    arguments = (q, torch.ones(1, 1), make_rope(1, interleaved=True), torch.zeros(1).long())
    result, weights = index_query(*arguments, fp8=True)
    expected, expected_weights = reference.index_query(*arguments, fp8=True)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_fp8_shows_what_is_not_finite(value: float) -> None:
    q = torch.ones(1, 1, 128)
    q[0, 0, 100] = value
    arguments = (q, torch.ones(1, 1), make_rope(1, interleaved=True), torch.zeros(1).long())
    result, _ = index_query(*arguments, fp8=True)
    assert result[0, 0, 100].float().isnan()


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


@pytest.mark.parametrize("heads", [1, 20, 64])
@pytest.mark.parametrize("interleaved", [True, False])
def test_query(heads: int, interleaved: bool) -> None:
    q, weights = torch.randn(9, heads, 128), torch.randn(9, heads).bfloat16()
    positions, rope = torch.arange(9) * 37, make_rope(300, interleaved)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_padding_is_skipped(dtype: torch.dtype, data: st.DataObject) -> None:
    """Any mixture of real, padded and hostile slots: the same as writing the real ones alone."""
    tokens = data.draw(st.integers(1, 8))
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
        storage = [cache.untyped_storage().tolist() for cache in (latent, index)]
        results.append(storage)
    assert results[0] == results[1]


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


def test_strided_inputs() -> None:
    """Every value of every input is followed by one that is not its own."""

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
    for result, expected in zip(*results, strict=True):
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
