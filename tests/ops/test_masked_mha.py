"""masked_mha in every form, against fp64 and against eager; gather_latents, which feeds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_kernels.sparse_mla import gather_latents, masked_mha, sparse_mla
from dsa_kernels.testing import GLM_5, V32, Model, error
from dsa_testbed.kernel_runs import drawn, unless_interpreted
from dsa_testbed.latents import SCALE, filled_cache, filled_fp8_cache
from dsa_testbed.masked import check, chosen, inputs, truth

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "keys"), unless_interpreted([(1, 1), (5, 63), (65, 64), (130, 700)], [(70, 200)])
)
@pytest.mark.parametrize("model", [V32, GLM_5], ids=["v32", "glm5"])
def test_against_fp64(dtype: torch.dtype, rows: int, keys: int, model: Model, form: str) -> None:
    q, k, v = inputs(dtype, rows, keys, 3, model.head_dim, model.v_head_dim)
    selected = torch.rand(rows, keys) < 0.4
    selected[rows // 2] = False
    check(masked_mha(q, k, v, chosen(selected, keys + 3), SCALE), q, k, v, selected, form)


@pytest.mark.parametrize("edge", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_edges_of_blocks(edge: int, form: str) -> None:
    """Rows and keys around each block's size, the last key always among the selected."""
    for rows, keys in ((edge, 70), (3, edge)):
        q, k, v = inputs(torch.bfloat16, rows, keys, 1, 192, 128)
        selected = torch.rand(rows, keys) < 0.5
        selected[:, -1] = True
        check(masked_mha(q, k, v, chosen(selected, 130), SCALE), q, k, v, selected, form)


@pytest.mark.parametrize(("width", "v_width"), [(10, 7), (16, 16), (100, 70), (65, 1), (130, 129)])
def test_widths_that_are_no_powers_of_two(width: int, v_width: int, form: str) -> None:
    """What lies beside a head's values is NaN."""
    shapes = ((5, 2, width), (2, 40, width), (2, 40, v_width))
    q, k, v = (torch.full((*shape[:2], 300), torch.nan)[..., : shape[2]] for shape in shapes)
    for tensor in (q, k, v):
        tensor.copy_(torch.randn(tensor.shape))
    selected = torch.rand(5, 40) < 0.5
    check(masked_mha(q, k, v, chosen(selected, 40), SCALE), q, k, v, selected, form)


@pytest.mark.parametrize("keys", [2047, 2048, 2049, 8300])
def test_long_contexts(keys: int, form: str) -> None:
    """2048 of them, whose mask is cleared in several steps; one row selects the ends of words."""
    q, k, v = inputs(torch.float32, 3, keys, 1, 192, 128)
    selected = torch.zeros(3, keys, dtype=torch.bool)
    selected[0, torch.randperm(keys)[:2048]] = True
    selected[1, 31::32] = True
    selected[1, ::32] = True
    selected[2, keys - 1] = True
    check(masked_mha(q, k, v, chosen(selected, 2048).long(), SCALE), q, k, v, selected, form)


def test_causal_prefill_of_a_short_prompt(form: str) -> None:
    """Every visible token selected, in order: what most prompts are."""
    q, k, v = inputs(torch.bfloat16, 130, 150, 2, 192, 128)
    selected = torch.ones(130, 150, dtype=torch.bool).tril(20)
    check(masked_mha(q, k, v, chosen(selected, 256), SCALE), q, k, v, selected, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@drawn(40, interpreted=12)
@given(data=st.data())
def test_any_indices(dtype: torch.dtype, form: str, data: st.DataObject) -> None:
    """Repeated ones count once; negative ones are ignored, by a kernel those past the keys too."""
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    keys = data.draw(st.sampled_from([1, 31, 32, 33, 64]))
    hostile = [-(2**63), -(2**31), -1]
    if form == "kernel":
        hostile += [keys, 2**31 - 1, 2**31, 2**63 - 1]
    entry = st.one_of(st.integers(0, keys - 1), st.sampled_from(hostile))
    indices = torch.tensor(
        [data.draw(st.lists(entry, min_size=columns, max_size=columns)) for _ in range(rows)]
    )
    q, k, v = inputs(dtype, rows, keys, 2, 192, 128)
    selected = (indices[..., None] == torch.arange(keys)).any(1)
    out = masked_mha(q, k, v, indices, SCALE)
    assert not out.isnan().any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        out.double(), truth(q, k, v, selected), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_huge_scores(factor: float) -> None:
    q, k, v = inputs(torch.float32, 3, 70, 2, 192, 128)
    selected = torch.ones(3, 70, dtype=torch.bool)
    out = masked_mha(q * factor, k, v, chosen(selected, 70), SCALE)
    assert error(out, truth(q * factor, k, v, selected)).rms < 1e-4


def test_strided_inputs_and_output(form: str) -> None:
    q = torch.randn(2, 5, 600)[..., 30:414:2].transpose(0, 1)
    k = torch.randn(40, 2, 400)[..., 5:389:2].transpose(0, 1)
    v = torch.randn(40, 2, 400)[..., 5:261:2].transpose(0, 1)
    selected = torch.rand(5, 40) < 0.5
    indices = chosen(selected, 40).repeat_interleave(2, 1).T.contiguous().T[:, ::2]
    wide = torch.full((2, 5, 300), torch.nan)
    out = masked_mha(q, k, v, indices, SCALE, out=wide[..., 20:276:2].transpose(0, 1))
    check(out, q, k, v, selected, form)
    assert out.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    assert int(wide.isnan().sum()) == 2 * 5 * (300 - 128)


def test_nothing_to_do() -> None:
    q, k, v = inputs(torch.bfloat16, 3, 5, 2, 192, 128)
    none = torch.zeros(3, 0, dtype=torch.int32)
    assert (masked_mha(q, k, v, none, SCALE) == 0).all()
    indices = torch.full((3, 4), -1, dtype=torch.int32)
    assert (masked_mha(q, k[:, :0], v[:, :0], indices, SCALE) == 0).all()
    assert masked_mha(q[:0], k, v, indices[:0], SCALE).shape == (0, 2, 128)
    assert masked_mha(q[:, :0], k[:0], v[:0], indices, SCALE).shape == (3, 0, 128)


def test_it_is_sparse_mla_expanded() -> None:
    """The two forms of one attention, over the same cache and selection."""
    block_table = torch.tensor([4, 1, 7], dtype=torch.int32)
    position = torch.arange(150)
    used = block_table.long()[position // 64] * 64 + position % 64
    cache, _ = filled_cache(torch.float32, 9, 64, used, gap=36)
    latents = gather_latents(cache, block_table, 150, torch.float32)
    w_uk, w_uv = torch.randn(4, 128, 512) / 512**0.5, torch.randn(4, 512, 96) / 512**0.5
    latent, k_pe = latents[:, :512], latents[:, 512:].expand(4, -1, -1)
    k = torch.cat((latent @ w_uk.transpose(1, 2), k_pe), -1)
    indices = torch.stack([torch.randperm(150)[:40] for _ in range(3)]).int()
    q_nope, q_pe = torch.randn(3, 4, 128), torch.randn(3, 4, 64)
    masked = masked_mha(torch.cat((q_nope, q_pe), -1), k, latent @ w_uv, indices, SCALE)
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_pe), -1)
    sparse, _ = sparse_mla(absorbed, cache, used[indices.long()], SCALE)
    expected = torch.einsum("thc,hcv->thv", sparse, w_uv)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filled", [filled_cache, filled_fp8_cache])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_gather_latents(dtype: torch.dtype, filled: Any, block_size: int) -> None:
    """Every count of keys around a block's end; garbage beyond them in the table is not read."""
    blocks = 192 // block_size
    for keys in (1, 15, 16, 17, 64, 65, 129):
        pages = torch.randperm(blocks)[: -(-keys // block_size)].int()
        used = (pages[:, None] * block_size + torch.arange(block_size)).flatten()
        cache, values = filled(dtype, blocks, block_size, used, gap=132 * block_size)
        table = torch.cat((pages, torch.tensor([2**31 - 1], dtype=torch.int32)))
        latents = gather_latents(cache, table, keys, dtype)
        assert latents.dtype == dtype
        assert torch.equal(latents.double(), values[used[:keys].long()].double())
