"""cache_write against fp64 maths and against bytes written down from the layouts' definitions."""

from __future__ import annotations

import struct
from typing import Any

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
)
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_kernels.testing import make_index_cache, make_latent_cache
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

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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
    again = apply_rope(x, rope, positions.int())
    assert torch.equal(result, again)


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


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127])
def test_latent_fp32(block_size: int, tokens: int) -> None:
    kv = torch.randn(tokens, 700)[:, 50:626]  # a slice of a fused projection
    weight, positions = torch.randn(512), torch.randint(0, 5000, (tokens,))
    blocks = -(-tokens // block_size) + 3
    cache = make_latent_cache(torch.float32, blocks, block_size, gap=640)
    storage = cache.as_strided((cache.untyped_storage().nbytes() // 4,), (1,), 0)
    slots = torch.randperm(blocks * block_size)[:tokens]
    latent_cache_write(kv, Norm(weight, EPS), make_rope(5000, True), positions, cache, slots)
    written = cache[slots // block_size, slots % block_size]
    torch.testing.assert_close(
        written.double(), latent_truth(kv, weight, positions), atol=2e-6, rtol=2e-6
    )
    # Nothing else was touched: other tokens and the gaps between pages are still NaN.
    assert int(storage.isfinite().sum()) == tokens * 576


@pytest.mark.parametrize("dtype", HALF)
def test_latent_half_rounds_once(dtype: torch.dtype) -> None:
    kv, weight = torch.randn(65, 576).to(dtype), torch.randn(512).to(dtype)
    positions = torch.arange(65)
    cache = make_latent_cache(dtype, 2, 64)
    slots = torch.arange(65) + 20
    latent_cache_write(kv, Norm(weight, EPS), make_rope(65, True), positions, cache, slots)
    truth = latent_truth(kv, weight, positions)
    result = cache.flatten(0, 1)[slots].double()
    assert ((result - truth).abs() <= HALF[dtype] * truth.abs() * 1.001 + 4e-6).all()


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
    kv, weight, positions = torch.randn(130, 576), torch.randn(512), torch.arange(130)
    kv[:, :128] *= 300  # the other blocks meet the floor of the scale
    cache = make_latent_cache(torch.uint8, 3, 64)
    latent_cache_write(
        kv, Norm(weight, EPS), make_rope(130, True), positions, cache, torch.arange(130)
    )
    nope, scale, rope = (view.flatten(0, 1)[:130] for view in latent_fp8_views(cache))
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


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("hadamard", [True, False])
def test_index_fp32(interleaved: bool, hadamard: bool) -> None:
    k, weight, bias = torch.randn(65, 200)[:, 10:138], torch.randn(128), torch.randn(128)
    positions = torch.randint(0, 5000, (65,))
    cache = make_index_cache(torch.float32, 3, 64, gap=128)
    slots = torch.randperm(192)[:65]
    index_cache_write(
        k,
        Norm(weight, EPS, bias),
        make_rope(5000, interleaved),
        positions,
        cache,
        slots,
        hadamard=hadamard,
    )
    truth = index_truth(norm_truth(k, weight, bias), positions, interleaved)
    if hadamard:
        truth = truth @ hadamard_truth()
    result = cache[slots // 64, slots % 64]
    torch.testing.assert_close(result.double(), truth, atol=5e-6, rtol=2e-6)
    assert int(cache.isfinite().sum()) == 65 * 128


def test_index_bf16_rounds_at_each_step() -> None:
    k, weight, bias = torch.randn(65, 128).bfloat16(), torch.randn(128), torch.randn(128)
    positions, slots = torch.arange(65), torch.arange(65)
    cache = make_index_cache(torch.bfloat16, 2, 64)
    norm, rope = Norm(weight, EPS, bias), make_rope(65, interleaved=False)
    index_cache_write(k, norm, rope, positions, cache, slots, hadamard=True)
    normed = norm_truth(k, weight, bias).bfloat16()
    rotated = index_truth(normed, positions, interleaved=False).bfloat16()
    truth = (rotated.double() @ hadamard_truth()).bfloat16()
    result = cache.flatten(0, 1)[:65]
    # fp32 against fp64 may fall on the other side of a rounding boundary, rarely.
    assert (result == truth).float().mean() > 0.99
    torch.testing.assert_close(result.float(), truth.float(), atol=0.05, rtol=2.0**-6)


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
@pytest.mark.parametrize("amax", [448.0, 0.875, 1e-6, 3e4])
def test_fp8_scale_is_exact_at_powers_of_two(dtype: torch.dtype, amax: float) -> None:
    """amax = 448 * 2^n must take the scale 2^n, not the next: log2 in fp32 may get this wrong."""
    q = torch.zeros(1, 1, 128, dtype=dtype)
    q[0, 0, 100] = amax
    _, weights = index_query(
        q,
        torch.ones(1, 1),
        make_rope(1, interleaved=True),
        torch.zeros(1).long(),
        fp8=True,
    )
    scale = 2.0**-22
    while scale < max(q.max().item(), 1e-4) / 448:
        scale *= 2
    assert weights.item() == pytest.approx(scale * 128**-0.5, rel=1e-6)


@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("interleaved", [True, False])
def test_query(heads: int, interleaved: bool) -> None:
    q, weights = torch.randn(300, heads, 128), torch.randn(300, heads).bfloat16()
    positions, rope = torch.arange(300), make_rope(300, interleaved)
    rotated, scaled = index_query(q, weights, rope, positions)
    truth = index_truth(q, positions, interleaved)
    torch.testing.assert_close(rotated.double(), truth, atol=2e-6, rtol=2e-6)
    assert scaled.dtype == torch.float32
    factor = heads**-0.5 * 128**-0.5
    torch.testing.assert_close(scaled.double(), weights.double() * factor, atol=0, rtol=1e-6)

    quantised, rescaled = index_query(q, weights, rope, positions, hadamard=True, fp8=True)
    scale = rescaled / scaled
    torch.testing.assert_close(scale.log2(), scale.log2().round(), atol=1e-4, rtol=0)
    truth = truth @ hadamard_truth()
    bound = 2.0**-4 * truth.abs() + 2.0**-9 * scale[..., None]
    assert ((quantised.double() * scale[..., None] - truth).abs() <= bound).all()


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
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_padding_is_skipped(dtype: torch.dtype, data: st.DataObject) -> None:
    """Any mixture of real, padded and hostile slots: the same as writing the real ones alone."""
    tokens = data.draw(st.integers(0, 12))
    real = data.draw(st.permutations(range(12)))[:tokens]
    bad = st.sampled_from([-1, -(2**63), 2**63 - 1, 12, -2])
    slots = [data.draw(bad) if data.draw(st.booleans()) else slot for slot in real]
    keep = [token for token, slot in enumerate(slots) if 0 <= slot < 12]
    kv, k, positions = torch.randn(tokens, 576), torch.randn(tokens, 128), torch.arange(tokens)
    rope, mapping = make_rope(16, interleaved=True), torch.tensor(slots, dtype=torch.int64)
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
        results.append((latent.view(torch.uint8), index.view(torch.uint8)))
    (latent, index), (latent_alone, index_alone) = results
    assert torch.equal(latent, latent_alone)
    assert torch.equal(index, index_alone)


def test_views_copy_nothing() -> None:
    cache = make_index_cache(torch.uint8, 2, 64, gap=4)
    key, scale = index_fp8_views(cache)
    scale[1, 3] = 2.0
    key.view(torch.uint8)[1, 3] = 9
    page = cache[1].flatten()
    assert page[64 * 128 + 12 : 64 * 128 + 16].tolist() == list(struct.pack("<f", 2.0))
    assert page[3 * 128 : 4 * 128].eq(9).all()


def _latent_arguments() -> dict[str, Any]:
    return {
        "kv": torch.randn(2, 576),
        "norm": Norm(torch.ones(512), EPS),
        "rope": make_rope(4, interleaved=True),
        "positions": torch.arange(2),
        "cache": make_latent_cache(torch.float32, 1, 4),
        "slot_mapping": torch.arange(2),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv", torch.randn(2, 512), r"kv: shape \(2, 512\).*\[T, 576\]"),
        ("kv", torch.randn(2, 576).double(), "kv: dtype torch.float64.*use float32, bfloat16"),
        ("norm", Norm(torch.ones(576), EPS), r"norm.weight: shape \(576,\).*\[512\]"),
        (
            "norm",
            Norm(torch.ones(512, device="meta"), EPS),
            "norm.weight is on meta but kv is on cpu",
        ),
        (
            "norm",
            Norm(torch.ones(512), EPS, torch.zeros(512)),
            "norm: has a bias; latents take RMSNorm.*leave it None",
        ),
        ("rope", make_rope(4, interleaved=False), "rope: interleaved is False.*interleaved=True"),
        ("positions", torch.arange(3), r"positions: shape \(3,\).*\[2\]"),
        ("positions", torch.ones(2), "positions: dtype torch.float32.*use int32, int64"),
        ("rope", Rope(torch.ones(4, 32), True), r"cos_sin_cache: shape.*\[max_position, 64\]"),
        (
            "rope",
            Rope(torch.ones(4, 64, device="meta"), True),
            "rope.cos_sin_cache is on meta but kv is on cpu",
        ),
        ("cache", torch.ones(1, 4, 512), r"latent cache: shape.*num_blocks, block_size, 576"),
        ("cache", torch.ones(1, 4, 576).byte(), r"latent cache: shape.*block_size, 656\]"),
        (
            "cache",
            torch.ones(1, 4, 576).int(),
            "latent cache: dtype torch.int32.*uint8 for the fp8",
        ),
        ("cache", torch.ones(0, 4, 576), r"no slots; allocate at least one block"),
        ("cache", torch.ones(1, 4, 1152)[..., ::2], "2 elements apart; the last stride must be 1"),
        (
            "cache",
            torch.zeros(4 * 656 + 1, dtype=torch.uint8)[1:].view(1, 4, 656),
            "offset 1 in bytes.*multiple of 4",
        ),
        ("slot_mapping", torch.arange(3), r"slot_mapping: shape \(3,\).*\[2\]"),
        (
            "slot_mapping",
            torch.arange(2, device="meta"),
            "slot_mapping is on meta but kv is on cpu",
        ),
    ],
)
def test_latent_errors(name: str, value: Tensor | Norm | Rope, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_cache_write(**{**_latent_arguments(), name: value})


def test_index_errors() -> None:
    arguments: dict[str, Any] = {
        "k": torch.randn(2, 128),
        "norm": Norm(torch.ones(128), EPS, torch.zeros(128)),
        "rope": make_rope(4, interleaved=True),
        "positions": torch.arange(2),
        "cache": torch.zeros(2, 4, 140, dtype=torch.uint8)[..., :132],
        "slot_mapping": torch.arange(2),
    }
    with pytest.raises(ValueError, match=r"140 bytes apart.*token stride must be 132"):
        index_cache_write(**arguments)
    with pytest.raises(ValueError, match="norm: has no bias; index keys take LayerNorm"):
        index_cache_write(**arguments | {"norm": Norm(torch.ones(128), EPS)})
    with pytest.raises(ValueError, match=r"norm.bias: shape \(64,\).*\[128\]"):
        index_cache_write(**arguments | {"norm": Norm(torch.ones(128), EPS, torch.zeros(64))})
    with pytest.raises(ValueError, match=r"weights: shape \(2, 3\).*\[2, 4\]"):
        index_query(
            torch.randn(2, 4, 128),
            torch.randn(2, 3),
            make_rope(4, interleaved=True),
            torch.arange(2),
        )
    with pytest.raises(ValueError, match=r"x: shape \(2, 32\).*\[T, \.\.\., 64\]"):
        apply_rope(torch.randn(2, 32), make_rope(4, interleaved=True), torch.arange(2))
