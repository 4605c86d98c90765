"""Times and costs of a plan by the roofline, beside published costs.

The expected times are of a roofline that was worked out by hand, op by op, for a H200 at 4.3 TB/s,
790 TFLOPS in bf16 and twice that in fp8.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsa_kernels.arch import ARCHS
from dsa_kernels.launch import launch_config
from dsa_kernels.sparse_mla import api
from dsa_plugin.attention.metadata import split_prefill
from dsa_plugin.planning.cost import (
    PUBLISHED,
    Published,
    decode_dollars,
    prefill_dollars,
    published_estimate,
)
from dsa_plugin.planning.forms import PIECE
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import ModelShape
from dsa_plugin.planning.plan import Layout, make_plan
from dsa_plugin.planning.roofline import Rates, prompt_seconds, step_time
from dsa_plugin.planning.sizes import Attention, CacheDtype
from dsa_plugin.planning.work import (
    Batch,
    attention_core,
    is_decoded_first,
    is_masked,
    layer_work,
)
from dsa_testbed.deployments import GLM_5, GLM_5_2, V32, deployment

H200 = find_gpu("h200")
ROUND = replace(H200, gb_per_second=4300.0, bf16_tflops=790.0, fp8_tflops=1580.0)
K = 1024


def microseconds(batch: Batch, kind: Attention = "dsa", **keys: Any) -> dict[str, float]:
    us: dict[str, float] = defaultdict(float)
    for work in attention_core(deployment(**keys), batch, kind, indexer=True):
        us[work.op] += Rates(ROUND).seconds(work) * 1e6
    return us


@pytest.mark.parametrize(
    ("context", "requests", "indexer", "topk", "sparse", "dense"),
    [
        (8 * K, 8, 2.1, 0.1, 5.8, 23.1),
        (32 * K, 32, 33.2, 1.0, 23.1, 369.7),
        (128 * K, 1, 4.1, 0.1, 0.7, 46.2),
        (128 * K, 128, 530.6, 15.9, 92.4, 5920.0),
    ],
)
def test_decode_of_128_heads(
    context: int, requests: int, indexer: float, topk: float, sparse: float, dense: float
) -> None:
    batch = Batch("decode", requests, 1, context)
    us = microseconds(batch)
    assert us["indexer_logits"] == pytest.approx(indexer, abs=0.05, rel=0.01)
    assert us["topk_select"] == pytest.approx(topk, abs=0.05, rel=0.03)
    assert us["sparse_mla"] == pytest.approx(sparse, abs=0.05, rel=0.01)
    assert microseconds(batch, "dense")["dense_mla"] == pytest.approx(dense, abs=0.05, rel=0.01)


def test_decode_of_few_heads_waits_for_latents() -> None:
    us = microseconds(Batch("decode", 32, 1, 32 * K), tp=8, dp=1)
    assert us["sparse_mla"] == pytest.approx(10.3, rel=0.03)
    assert us["indexer_logits"] == pytest.approx(33.2, rel=0.01)  # each rank runs all of it


def test_prefill_of_a_chunk() -> None:
    chunk = Batch("prefill", 1, 4 * K, 128 * K)
    us = microseconds(chunk)
    assert us["indexer_logits"] == pytest.approx(5480, rel=0.01)
    assert us["sparse_mla"] == pytest.approx(2960, rel=0.01)
    assert microseconds(chunk, "dense")["dense_mha"] == pytest.approx(54_800 + 5570, rel=0.01)
    # Eight ranks share the heads, not the indexer.
    us = microseconds(chunk, tp=8, dp=1)
    assert us["indexer_logits"] == pytest.approx(5480, rel=0.01)
    assert us["sparse_mla"] == pytest.approx(2960 / 8, rel=0.01)


def test_a_matrix_unit_multiplies_16_heads_at_least() -> None:
    decode = Batch("decode", 32, 1, 32 * K)
    assert attention_core(deployment(tp=8, dp=1), decode, "dsa", indexer=True)[-1].flops == (
        attention_core(deployment(GLM_5, tp=8, dp=1), decode, "dsa", indexer=True)[-1].flops
    )


def test_a_short_prefill_is_masked() -> None:
    """As dense attention, and as long, once the latents are there to expand."""
    short = Batch("prefill", 1, 4 * K, 4 * K)
    us = microseconds(short)
    dense = microseconds(short, "dense")["dense_mha"]
    assert us["masked_mha"] + us["expand"] == pytest.approx(dense, rel=0.01)
    assert us["gather_latents"] == pytest.approx(4 * K * (656 + 1152) / 4.3e6)
    assert "sparse_mla" not in us


def test_fp8_latents_of_a_longer_prefill_are_decoded_first() -> None:
    chunk = Batch("prefill", 1, 4 * K, 32 * K)
    ops = {w.op: w for w in attention_core(deployment(), chunk, "dsa", indexer=True)}
    assert ops["gather_latents"].bytes == 32 * K * (656 + 1152)
    assert ops["sparse_mla"].form == "bf16, 64 heads"
    assert ops["sparse_mla"].bytes == 32 * K * 1152
    in_bf16 = attention_core(deployment(kv_dtype="bf16"), chunk, "dsa", indexer=True)
    assert "gather_latents" not in {w.op for w in in_bf16}
    few = Batch("prefill", 1, 40, 32 * K)
    ops = {w.op: w for w in attention_core(deployment(), few, "dsa", indexer=True)}
    assert "gather_latents" not in ops
    assert ops["sparse_mla"].form == "fp8, 64 heads"
    assert ops["sparse_mla"].bytes == 32 * K * 656


THOUSANDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 32, 128, 400, 500)


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("model", [V32, GLM_5], ids=lambda model: model.name)
def test_forms_are_the_plugins_own(
    model: ModelShape, kv_dtype: CacheDtype, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "use_triton", lambda _: True)
    d = deployment(model, kv_dtype=kv_dtype, tp=tp, dp=8 // tp)
    entry = {"bf16": torch.empty(1, 64, 576).bfloat16(), "fp8": torch.empty(1, 64, 656).byte()}
    cache, chosen = entry[kv_dtype], Counter[tuple[bool, bool]]()
    for rows in (16, 40, 45, 46, 64, 256, 1024, 4096):
        for keys in (*(n * K for n in THOUSANDS), 33_600):
            masked = api.masked_is_faster(
                cache.device,
                rows,
                keys,
                model.index_topk,
                heads=model.num_attention_heads // tp,
                width=model.qk_nope_head_dim + model.qk_rope_head_dim,
                v_width=model.v_head_dim,
            )
            first = api.decoding_first_is_faster(cache, rows, keys, model.index_topk)
            room = keys * 1152 <= d.workspace_bytes
            chunk = Batch("prefill", 1, rows, keys)
            assert (is_masked(d, chunk), is_decoded_first(d, chunk)) == (masked, first and room)
            chosen[masked, first and room] += 1
    assert len(chosen) == (3 if kv_dtype == "fp8" else 2)


@pytest.mark.parametrize(("queries", "context"), [(8192, 8192), (8192, 131_072), (5000, 100_000)])
def test_a_chunk_is_scored_in_the_plugins_parts(queries: int, context: int) -> None:
    d = deployment()
    chunks = split_prefill([0, queries], [context], 0, d.workspace_bytes)
    keys = [chunk.num_keys for chunk in chunks]
    rows = [chunk.end - chunk.start for chunk in chunks]
    work = attention_core(d, Batch("prefill", 1, queries, context), "dsa", indexer=True)
    assert [w.bytes for w in work if w.op == "gather_index_keys"] == [2 * 132 * n for n in keys]
    scored = [w.flops for w in work if w.op == "indexer_logits"]
    per_pair = 2 * V32.index_n_heads * 128
    assert scored == [per_pair * r * (n - (r - 1) / 2) for r, n in zip(rows, keys, strict=True)]


def test_requests_of_a_prefill_are_launched_one_by_one() -> None:
    one, four = (
        attention_core(deployment(), Batch("prefill", n, 4096, 4096), "dsa", indexer=True)
        for n in (1, 4)
    )
    per_request = {"gather_index_keys", "indexer_logits", "topk_select", "masked_mha", "expand"}
    assert {w.op for w in four if w.calls == 4} == per_request | {"gather_latents"}
    rates = Rates(ROUND)
    assert sum(map(rates.seconds, four)) == pytest.approx(4 * sum(map(rates.seconds, one)))


def test_rows_select_no_more_than_they_see() -> None:
    for queries, context in ((1, 10), (1, 5000), (2048, 2048), (4096, 4096), (300, 2200)):
        seen = [min(2048, context - row) for row in range(queries)]
        assert Batch("prefill", 1, queries, context).selected(2048) == pytest.approx(
            sum(seen) / queries
        )


def test_nothing_is_scored_where_everything_is_selected() -> None:
    for context, scores in ((V32.index_topk, False), (V32.index_topk + 1, True)):
        us = microseconds(Batch("prefill", 1, 8, context))
        assert ("indexer_logits" in us) == ("topk_select" in us) == scores
    # A decode's CUDA graph is that of the longest context.
    assert "indexer_logits" in microseconds(Batch("decode", 8, 1, 1024))
    assert "indexer_logits" not in microseconds(Batch("decode", 8, 1, 1024), context=2048)


def test_a_layer_writes_in_one_launch() -> None:
    """Index keys always, their queries where something is scored."""

    def written(context: int, *, indexer: bool) -> float:
        ops = attention_core(deployment(), Batch("prefill", 1, 8, context), "dsa", indexer=indexer)
        [write] = [work for work in ops if "write" in work.op]
        assert (write.op, write.calls) == ("cache_write", 1)
        return write.bytes / 8

    topk, latents, keys = V32.index_topk, 1152 + 656 + 256, 256 + 132 + 256
    assert written(topk, indexer=False) == written(topk + 1, indexer=False) == latents
    assert written(topk, indexer=True) == latents + keys
    assert written(topk + 1, indexer=True) == latents + keys + 64 * (128 * 3 + 6) + 256


def test_a_piece_is_what_topk_select_holds() -> None:
    for arch in ARCHS.values():
        assert launch_config("topk_select", arch, "select").blocks["BLOCK"] == PIECE


def test_shared_layers_do_not_index() -> None:
    batch, rates = Batch("decode", 8, 1, 128 * K), Rates(ROUND)
    full, shared = (
        step_time(deployment(model), rates, batch, "dsa").attention_per_layer
        for model in (GLM_5, GLM_5_2)
    )
    us = microseconds(batch, model=GLM_5)
    assert full * 1e6 == pytest.approx(sum(us.values()))
    core = attention_core(deployment(GLM_5), batch, "dsa", indexer=False)
    without = 1e6 * sum(map(rates.seconds, core))
    assert [work.op for work in core] == ["cache_write", "sparse_mla"]
    assert shared * 1e6 == pytest.approx((21 * sum(us.values()) + 57 * without) / 78)


def test_experts_are_read_as_often_as_they_are_met() -> None:
    def read(requests: int) -> float:
        batch = Batch("decode", requests, 1, 4 * K)
        work = layer_work(deployment(), batch, "dsa", dense_mlp=False, indexer=True)
        return next(w.bytes for w in work if w.op == "experts")

    one_expert = 3 * V32.hidden_size * V32.moe_intermediate_size * (1 + 4 / 128**2)
    assert read(512) == pytest.approx(256 / 8 * one_expert, rel=1e-3)
    # Eight tokens, one a rank, each to 8 of 256 experts.
    assert read(1) == pytest.approx(256 / 8 * one_expert * (1 - (1 - 1 / 32) ** 8), rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "indexer", "projections", "experts"),
    [
        ("a100-80g", "bf16", "bf16", "bf16"),
        ("l40s", "fp8", "bf16", "fp8"),
        ("h200", "fp8", "fp8", "fp8"),
    ],
)
def test_products_have_the_precision_that_a_gpu_has_kernels_for(
    gpu: str, indexer: str, projections: str, experts: str
) -> None:
    batch = Batch("prefill", 1, 4 * K, 32 * K)
    keys: dict[str, Any] = {"gpu": find_gpu(gpu), "count": 16, "tp": 8, "dp": 2, "ep": 16}
    work = layer_work(deployment(**keys), batch, "dsa", dense_mlp=False, indexer=True)
    precision = {w.op: w.precision for w in work}
    assert precision["indexer_logits"] == indexer
    assert precision["projections"] == projections
    assert precision["experts"] == experts
    assert precision["sparse_mla"] == "bf16"
    in_bf16 = layer_work(
        deployment(**keys, weights_dtype="bf16"), batch, "dsa", dense_mlp=False, indexer=True
    )
    assert {w.precision for w in in_bf16 if w.op in ("projections", "experts")} == {"bf16"}


def test_a_prompt_is_its_chunks() -> None:
    d, rates = deployment(prefill_chunk=4 * K), Rates(H200)
    parts = [Batch("prefill", 1, 4 * K, 4 * K), Batch("prefill", 1, K, 5 * K)]
    whole = sum(step_time(d, rates, part, "dsa").total for part in parts)
    assert prompt_seconds(d, rates, 5 * K, "dsa") == pytest.approx(whole)
    assert prompt_seconds(d, rates, 4 * K, "dsa") == step_time(d, rates, parts[0], "dsa").total


@pytest.mark.parametrize("point", PUBLISHED, ids=str)
def test_published_costs_lie_above_the_roofline(point: Published) -> None:
    """A roofline above what was paid would be wrong; one far below would say nothing."""
    estimate = published_estimate(point.stage, point.attention, point.position)
    assert 1 < point.dollars / estimate < 3.5


def test_costs_follow_price_and_count() -> None:
    d, rates = deployment(), Rates(H200)
    prefill = prefill_dollars(d, rates, 32 * K, "dsa", 2.0)
    assert prefill_dollars(d, rates, 32 * K, "dsa", 4.0) == pytest.approx(2 * prefill)
    chunk = Batch("prefill", 1, d.prefill_chunk, 32 * K)
    tokens_per_hour = 3600 / step_time(d, rates, chunk, "dsa").total * d.prefill_chunk * 8
    assert prefill == pytest.approx(8 * 2.0 / tokens_per_hour * 1e6)
    assert decode_dollars(d, rates, 32 * K, "dsa", 2.0) is not None
    small = deployment(gpu=find_gpu("h100"))
    assert decode_dollars(small, rates, 32 * K, "dsa", 2.0) is None


def test_plan_says_what_would_fit() -> None:
    plan = make_plan(deployment(gpu=find_gpu("h100")), Rates(find_gpu("h100")), 2.0)
    assert plan.caches.requests == 0
    assert plan.memory.caches < 0
    assert plan.fits_with == Layout(count=16, tp=1, dp=16, ep=16)
    assert [row.decode for row in plan.cost] == [None] * len(plan.cost)
    fits = make_plan(deployment(ep=1), Rates(H200), 2.0)
    assert fits.fits_with == Layout(count=8, tp=1, dp=8, ep=1)
    tiny = replace(H200, memory_gib=16)
    assert make_plan(deployment(gpu=tiny), Rates(tiny), 2.0).fits_with is None
