"""Times and costs of a plan: the roofline, measured kernels in its place, published costs.

The expected times are of a roofline that was worked out by hand, op by op, for a H200 at 4.3 TB/s,
790 TFLOPS in bf16 and twice that in fp8.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin.planning.cost import (
    PUBLISHED,
    Published,
    decode_dollars,
    prefill_dollars,
    published_estimate,
)
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.measured import MeasuredKernels
from dsa_plugin.planning.plan import Layout, make_plan
from dsa_plugin.planning.roofline import Rates, prompt_seconds, step_time
from dsa_plugin.planning.sizes import Attention
from dsa_plugin.planning.work import Batch, attention_core, layer_work
from dsa_testbed.deployments import GLM_5, GLM_5_2, V32, deployment

H200 = find_gpu("h200")
ROUND = replace(H200, gb_per_second=4300.0, bf16_tflops=790.0, fp8_tflops=1580.0)
K = 1024


def microseconds(batch: Batch, kind: Attention = "dsa", **keys: Any) -> dict[str, float]:
    work = attention_core(deployment(**keys), batch, kind, indexer=True)
    return {w.op: Rates(ROUND).seconds(w) * 1e6 for w in work}


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
    # Eight ranks share the heads, not the indexer; then gathering is slower than multiplying.
    us = microseconds(chunk, tp=8, dp=1)
    assert us["indexer_logits"] == pytest.approx(5480, rel=0.01)
    assert us["sparse_mla"] == pytest.approx(1280, rel=0.03)


def test_a_short_prefill_is_masked() -> None:
    """As long as dense attention; where the two forms cross follows from their products."""
    short = Batch("prefill", 1, 4 * K, 4 * K)
    assert microseconds(short)["masked_mha"] == microseconds(short, "dense")["dense_mha"]
    gathered = 2048 * (576 + 512) * 4 * K
    for context, op in ((6 * K, "masked_mha"), (10 * K, "sparse_mla")):
        pairs = (context - (4 * K - 1) / 2) * 4 * K
        masked = pairs * (192 + 128) + context * 512 * (128 + 128)
        assert (masked < gathered) == (op == "masked_mha")
        assert op in microseconds(Batch("prefill", 1, 4 * K, context))
    # Gathering, which few heads wait for, makes the other form pay for longer.
    longer = Batch("prefill", 1, 4 * K, 14 * K)
    assert "masked_mha" in microseconds(longer, tp=8, dp=1, kv_dtype="bf16")
    assert "sparse_mla" in microseconds(longer, tp=8, dp=1, kv_dtype="fp8")


def test_nothing_is_scored_where_everything_is_selected() -> None:
    assert set(microseconds(Batch("decode", 8, 1, V32.index_topk))) == {"sparse_mla"}
    assert "indexer_logits" in microseconds(Batch("decode", 8, 1, V32.index_topk + 1))


def test_shared_layers_do_not_index() -> None:
    batch, rates = Batch("decode", 8, 1, 128 * K), Rates(ROUND)
    full, shared = (
        step_time(deployment(model), rates, batch, "dsa").attention_per_layer
        for model in (GLM_5, GLM_5_2)
    )
    us = microseconds(batch, model=GLM_5)
    assert full * 1e6 == pytest.approx(sum(us.values()))
    assert shared * 1e6 == pytest.approx(
        us["sparse_mla"] + 21 / 78 * (us["indexer_logits"] + us["topk_select"])
    )


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


def kernels_json(path: Path, **change: object) -> Path:
    content = {
        "device": "NVIDIA H200",
        "date": "2026-11-25T00:00:00+00:00",
        "roofline": {"bandwidth": 4.3e12, "flops": 790e12},
        "rows": [
            {"op": "sparse_mla", "flops": 1e9, "bytes": 1e6, "roofline_fraction": 0.1, "us": 1.0},
            {"op": "sparse_mla", "flops": 1e13, "bytes": 1e10, "roofline_fraction": 0.5, "us": 1.0},
        ],
    }
    path.write_text(json.dumps(content | change))
    return path


def test_measured_kernels_replace_the_roofline(tmp_path: Path) -> None:
    measured = MeasuredKernels.load(kernels_json(tmp_path / "kernels.json"))
    assert measured.fits(H200)
    assert not measured.fits(find_gpu("h100"))
    peaks, rates = Rates(ROUND), Rates(ROUND, measured)
    for batch, fraction in (
        (Batch("decode", 1, 1, 32 * K), 0.1),
        (Batch("prefill", 1, 8 * K, 32 * K), 0.5),
    ):
        indexer, topk, sparse = attention_core(deployment(), batch, "dsa", indexer=True)
        assert rates.seconds(sparse) == pytest.approx(peaks.seconds(sparse) / fraction)
        assert rates.seconds(indexer) == peaks.seconds(indexer)
        assert rates.seconds(topk) == peaks.seconds(topk)
    assert "sparse_mla measured on NVIDIA H200" in rates.describe()
    assert "no measured kernel" in peaks.describe()


def test_a_file_that_is_no_measurement(tmp_path: Path) -> None:
    for text in ("[]", "{", '{"rows": []}'):
        path = tmp_path / "kernels.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"kernels\.json is not a file that benchmarks"):
            MeasuredKernels.load(path)


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
