"""sparse_mla against a dense fp64 attention over each row's own selection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels import workspace
from dsa_kernels.sparse_mla import (
    api,
    cpu,
    gather_latents,
    masked_is_faster,
    masked_mha,
    reference,
    sparse_mla,
)
from dsa_kernels.testing import error, make_latent_cache
from dsa_testbed.latents import (
    SCALE,
    eager,
    filled_cache,
    filled_fp8_cache,
    random_slots,
    truth,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# torch's flash attention, which a CPU runs, has a shorter exponential for 16-bit inputs: 5e-5 seen.
LSE_ATOL = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
HOSTILE = [-(2**31), -1, -2, 2**31 - 1]


@pytest.fixture(params=[cpu, reference], ids=["cpu", "reference"], autouse=True, scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs what a CPU runs, and the specification."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "cpu", request.param)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 16, 20, 64, 128])
@pytest.mark.parametrize("k", [1, 63, 64, 65, 127])
def test_against_fp64(dtype: torch.dtype, heads: int, k: int) -> None:
    used = torch.randperm(9 * 64)[:300]
    cache, values = filled_cache(dtype, 9, 64, used, gap=8448)
    q = torch.randn(5, heads, 576).to(dtype)
    slots = random_slots(5, k, used)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    expected, expected_lse = truth(q, values, slots)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # P and the result are rounded to q's dtype; scores and lse are fp32 whatever it is.
    limit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert error(out, expected).rms < limit
    torch.testing.assert_close(lse.double(), expected_lse, atol=LSE_ATOL[dtype], rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k"), [(1, 2048), (3, 2048), (2, 4100), (70, 300)])
def test_larger_than_a_tile(dtype: torch.dtype, rows: int, k: int) -> None:
    used = torch.arange(5000) + 64
    cache, values = filled_cache(dtype, 80, 64, used)
    q, slots = torch.randn(rows, 16, 576).to(dtype), random_slots(rows, k, used)
    out, lse = sparse_mla(q, cache, slots.int(), SCALE)
    expected, expected_lse = truth(q, values, slots)
    assert error(out, expected).rms < (1e-6 if dtype == torch.float32 else 2.0**-8)
    torch.testing.assert_close(lse.double(), expected_lse, atol=LSE_ATOL[dtype], rtol=2e-6)


def test_bf16_is_as_good_as_eager() -> None:
    """Eager bf16 attention, as transformers runs it, is what a user has otherwise."""
    used = torch.arange(64 * 32)
    cache, values = filled_cache(torch.bfloat16, 32, 64, used)
    q, slots = (torch.randn(8, 16, 576) * 3).bfloat16(), random_slots(8, 1024, used)
    out, _ = sparse_mla(q, cache, slots, SCALE)
    expected, _ = truth(q, values, slots)
    assert error(out, expected).rms < 0.75 * error(eager(q, values, slots), expected).rms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hostile_slots(dtype: torch.dtype, data: st.DataObject) -> None:
    """Ignored entries anywhere, whole rows of them; unwritten slots (slot 0 too) are NaN."""
    rows, k = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 12))
    used = torch.tensor([5, 17, 18, 30, 41])
    cache, values = filled_cache(dtype, 3, 16, used, gap=64)
    entry = st.sampled_from([*HOSTILE, 48, *used.tolist()])
    dull = st.sampled_from(HOSTILE)
    slots = torch.tensor(
        [
            data.draw(st.lists(dull if data.draw(st.booleans()) else entry, min_size=k, max_size=k))
            for _ in range(rows)
        ],
        dtype=torch.int64,
    ).view(rows, k)
    q = torch.randn(rows, 3, 576).to(dtype)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    expected, expected_lse = truth(q, values, slots)
    empty = expected_lse == -torch.inf
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert not out.isnan().any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=LSE_ATOL[dtype], rtol=1e-5)


def test_every_row_empty() -> None:
    cache = make_latent_cache(torch.bfloat16, 2, 64)
    q = torch.randn(4, 16, 576).bfloat16()
    for slots in (torch.full((4, 7), -1), torch.zeros(4, 0, dtype=torch.int64)):
        out, lse = sparse_mla(q, cache, slots, SCALE)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    assert sparse_mla(q[:0], cache, slots[:0], SCALE)[0].shape == (0, 16, 512)


def test_padding_changes_nothing() -> None:
    """Rows of different lengths in one tile, as topk_select pads them."""
    used = torch.arange(200)
    cache, _ = filled_cache(torch.float32, 4, 64, used)
    q, slots = torch.randn(6, 8, 576), random_slots(6, 150, used)
    lengths = [0, 1, 64, 65, 149, 150]
    padded = torch.full((6, 400), -1)
    for row, length in enumerate(lengths):
        padded[row, :length] = slots[row, :length]
    out, lse = sparse_mla(q, cache, padded, SCALE)
    for row, length in enumerate(lengths):
        alone, alone_lse = sparse_mla(q[row : row + 1], cache, slots[row, None, :length], SCALE)
        torch.testing.assert_close(out[row], alone[0], atol=1e-6, rtol=1e-5)
        # Tiles of other shapes sum their products in another order: 1.6e-6 seen.
        atol = LSE_ATOL[torch.float32]
        torch.testing.assert_close(lse[row], alone_lse[0], atol=atol, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_topk_length_ends_a_row(dtype: torch.dtype) -> None:
    """What lies beyond is ignored, valid or not; a length may be 0, negative or exceed k."""
    used = torch.arange(200)
    cache, _ = filled_cache(torch.float32, 4, 64, used)
    q, slots = torch.randn(6, 8, 576), random_slots(6, 150, used)
    lengths = torch.tensor([0, 1, 64, 149, 1000, -3], dtype=dtype)
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=lengths)
    padded = torch.where(torch.arange(150) < lengths[:, None], slots, -1)
    expected, expected_lse = sparse_mla(q, cache, padded, SCALE)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


def test_huge_scores() -> None:
    """Scores in the thousands, of either sign: no overflow, and lse keeps its precision."""
    used = torch.arange(64)
    cache, values = filled_cache(torch.float32, 1, 64, used)
    for factor in (300.0, -300.0):
        q, slots = torch.randn(3, 4, 576) * factor, used.repeat(3, 1)
        out, lse = sparse_mla(q, cache, slots, 1.0)
        expected, expected_lse = truth(q, values, slots, 1.0)
        assert expected_lse.abs().max() > 5e3
        assert error(out, expected).rms < 1e-3
        torch.testing.assert_close(lse.double(), expected_lse, atol=0.05, rtol=1e-6)


def test_lse_merges_two_halves() -> None:
    """Natural logarithms: the halves of a selection, weighted by exp(lse), make the whole."""
    used = torch.arange(128)
    cache, _ = filled_cache(torch.float32, 2, 64, used)
    q, slots = torch.randn(3, 8, 576), random_slots(3, 100, used)
    whole, lse = sparse_mla(q, cache, slots, SCALE)
    halves = [sparse_mla(q, cache, part, SCALE) for part in (slots[:, :30], slots[:, 30:])]
    merged = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in halves)
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)


def test_an_entry_that_occurs_twice_counts_twice() -> None:
    used = torch.arange(16)
    cache, values = filled_cache(torch.float32, 1, 16, used)
    q, slots = torch.randn(1, 2, 576), torch.tensor([[3, 3, 9]])
    out, lse = sparse_mla(q, cache, slots, SCALE)
    expected, expected_lse = truth(q, values, slots)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)


def test_strided_inputs_and_out() -> None:
    used = torch.arange(300)
    cache, values = filled_cache(torch.float32, 5, 64, used, gap=36)
    q = torch.randn(8, 4, 700)[..., 60:636].transpose(0, 1)
    slots = random_slots(4, 80, used).T.contiguous().T
    wide, wide_lse = torch.full((4, 8, 600), torch.nan), torch.full((8, 4), torch.nan)
    out, lse = sparse_mla(q, cache, slots, SCALE, out=wide[..., 20:532], lse=wide_lse.T)
    expected, expected_lse = truth(q, values, slots)
    torch.testing.assert_close(wide[..., 20:532].double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wide_lse.T.double(), expected_lse, atol=1e-6, rtol=1e-5)
    assert out.data_ptr() == wide[..., 20:532].data_ptr()
    assert lse.data_ptr() == wide_lse.data_ptr()
    assert wide[..., :20].isnan().all()
    assert wide[..., 532:].isnan().all()


def test_token_stride_wider_than_a_token() -> None:
    storage = torch.full((3, 64, 640), torch.nan)
    cache = storage[..., 30:606]
    values = torch.randn(192, 576)
    cache.copy_(values.view(3, 64, 576))
    q, slots = torch.randn(2, 4, 576), random_slots(2, 60, torch.arange(192))
    out, _ = sparse_mla(q, cache, slots, SCALE)
    torch.testing.assert_close(out.double(), truth(q, values, slots)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_fp8_cache(dtype: torch.dtype, block_size: int) -> None:
    """Bytes written by the layout's definition; scales need not be powers of two."""
    used = torch.randperm(256)[:100]
    cache, values = filled_fp8_cache(
        dtype, 256 // block_size, block_size, used, gap=132 * block_size
    )
    q, slots = torch.randn(6, 16, 576).to(dtype), random_slots(6, 70, used)
    slots[:, ::9] = -1
    out, lse = sparse_mla(q, cache, slots, SCALE)
    expected, expected_lse = truth(q, values, slots)
    limit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert error(out, expected).rms < limit
    torch.testing.assert_close(lse.double(), expected_lse, atol=2 * LSE_ATOL[dtype], rtol=2e-6)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, a tile's buffers stay within the budget."""
    largest = 0
    create = workspace.scratch

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        tensor = create(*args)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(cpu, "scratch", measured)
    used = torch.arange(640)
    cache, _ = filled_cache(torch.bfloat16, 10, 64, used)
    q = torch.randn(200, 4, 576).bfloat16()
    out, lse = torch.empty(200, 4, 512).bfloat16(), torch.empty(200, 4)
    cpu.sparse_mla(q, cache, random_slots(200, 300, used), None, SCALE, out, lse)
    assert 1 << 20 < largest <= workspace.TILE_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (5, 63), (65, 64), (130, 700)])
@pytest.mark.parametrize(("heads", "width", "v_width"), [(3, 192, 128), (4, 256, 256)])
def test_masked_against_fp64(
    dtype: torch.dtype, rows: int, keys: int, heads: int, width: int, v_width: int
) -> None:
    q = torch.randn(rows, heads, width).to(dtype)
    k, v = torch.randn(heads, keys, width).to(dtype), torch.randn(heads, keys, v_width).to(dtype)
    selected = torch.rand(rows, keys) < 0.4
    selected[rows // 2] = False
    indices = torch.full((rows, keys + 3), -1, dtype=torch.int32)
    for row, chosen in enumerate(selected):
        where = chosen.nonzero()[:, 0].int()
        indices[row, : len(where)] = where[torch.randperm(len(where))]
    out = masked_mha(q, k, v, indices, SCALE)
    scores = q.double().transpose(0, 1) @ k.double().transpose(1, 2) * SCALE
    weights = scores.masked_fill(~selected, -torch.inf).softmax(-1).nan_to_num(0)
    expected = (weights @ v.double()).transpose(0, 1)
    assert (out[rows // 2] == 0).all()
    limit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert error(out, expected).rms < limit


def test_masked_is_sparse_expanded() -> None:
    """The two forms of one attention, over the same cache and selection."""
    block_table = torch.tensor([4, 1, 7], dtype=torch.int32)
    position = torch.arange(150)
    used = block_table.long()[position // 64] * 64 + position % 64
    cache, _ = filled_cache(torch.float32, 9, 64, used, gap=36)
    latents = gather_latents(cache, block_table, 150, torch.float32)
    w_uk, w_uv = torch.randn(4, 128, 512) / 512**0.5, torch.randn(4, 512, 96) / 512**0.5
    latent, k_pe = latents[:, :512], latents[:, 512:].expand(4, -1, -1)
    k = torch.cat((latent @ w_uk.transpose(1, 2), k_pe), -1)
    indices = torch.stack([torch.randperm(150)[:40] for _ in range(7)]).int()
    q_nope, q_pe = torch.randn(7, 4, 128), torch.randn(7, 4, 64)
    masked = masked_mha(torch.cat((q_nope, q_pe), -1), k, latent @ w_uv, indices, SCALE)
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_pe), -1)
    sparse, _ = sparse_mla(absorbed, cache, used[indices.long()], SCALE)
    expected = torch.einsum("thc,hcv->thv", sparse, w_uv)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)


def test_masked_where_it_is_faster() -> None:
    on_cpu = partial(
        masked_is_faster,
        torch.device("cpu"),
        topk=2048,
        heads=16,
        width=192,
        v_width=128,
        latent_bytes=1152,
    )
    assert on_cpu(rows=2048, keys=6000)
    assert not on_cpu(rows=2048, keys=16384)
    assert not on_cpu(rows=8, keys=4096), "expanding costs too much"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(4, 9, 100)}, r"k: shape \(4, 9, 100\).*\[4, N, 192\]"),
        ({"v": torch.zeros(4, 8, 128)}, r"v: shape \(4, 8, 128\).*\[4, 9, DV\]"),
        ({"v": torch.zeros(4, 9, 256)}, "v: 256 values a head; at most q's and k's 192"),
        ({"topk_indices": torch.zeros(3, 2)}, "topk_indices: dtype torch.float32"),
        ({"k": torch.zeros(4, 9, 192).half()}, "k: dtype torch.float16"),
    ],
)
def test_masked_errors(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 192),
        "k": torch.zeros(4, 9, 192),
        "v": torch.zeros(4, 9, 128),
        "topk_indices": torch.zeros(3, 2, dtype=torch.int32),
        "softmax_scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        masked_mha(**(arguments | changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.randn(2, 4, 512), r"q: shape \(2, 4, 512\).*\[T, heads, 576\]"),
        ("q", torch.randn(2, 4, 576).double(), "q: dtype torch.float64"),
        (
            "q",
            torch.randn(2, 4, 576).half(),
            "cache: dtype torch.float32 with torch.float16 queries",
        ),
        ("cache", torch.zeros(1, 16, 656), r"latent cache: shape.*block_size, 576\]"),
        ("slots", torch.zeros(3, 5).long(), r"slots: shape \(3, 5\).*\[2, k\]"),
        ("slots", torch.zeros(2, 5), "slots: dtype torch.float32.*use int32, int64"),
        ("topk_length", torch.zeros(3).int(), r"topk_length: shape \(3,\); it must be \[2\]"),
        ("topk_length", torch.zeros(2), "topk_length: dtype torch.float32.*use int32, int64"),
        ("out", torch.zeros(2, 4, 576), r"out: shape \(2, 4, 576\).*\[2, 4, 512\]"),
        ("lse", torch.zeros(2, 4).bfloat16(), "lse: dtype torch.bfloat16.*use float32"),
    ],
)
def test_errors(name: str, value: Tensor, message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 576),
        "cache": torch.zeros(1, 16, 576),
        "slots": torch.zeros(2, 5, dtype=torch.int64),
        "softmax_scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        sparse_mla(**{**arguments, name: value})
