"""Plans by measured kernels: the shipped times of an H100, and a user's own."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsa_plugin.planning import work as work_module
from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.forms import read_form
from dsa_plugin.planning.gpus import GPUS, find_gpu
from dsa_plugin.planning.measured import SHIPPED, MeasuredKernels, Row
from dsa_plugin.planning.model import ModelShape
from dsa_plugin.planning.plan import make_plan
from dsa_plugin.planning.roofline import Rates, peak_seconds, prompt_seconds, step_time
from dsa_plugin.planning.work import Batch, Work, attention_core, layer_work
from dsa_testbed.deployments import GLM_5, V32, deployment
from dsa_testbed.small_models import small_model

ROOT = Path(__file__).resolve().parents[2]
K = 1024
H100, H200 = find_gpu("h100"), find_gpu("h200")
ON_H100 = MeasuredKernels.load(SHIPPED)
FP8_DECODE = {"op": "sparse_mla", "case": "decode 32K, 8 rows, 128 heads, fp8"}
CONTENT: dict[str, Any] = {
    "device": "NVIDIA H200",
    "date": "2026-11-25T00:00:00+00:00",
    "versions": {"triton": "3.6.0"},
    "roofline": {"bandwidth": 2.4e12, "flops": 494.5e12},
    "rows": [
        {**FP8_DECODE, "flops": 2e9, "bytes": 1e6, "us": 40.0},
        {**FP8_DECODE, "flops": 2e11, "bytes": 1e9, "us": 2400.0},
        {"op": "sparse_mla", "case": "decode 8K, 1 rows, 16 heads, bf16", "failed": "no memory"},
    ],
}


@pytest.fixture
def on_h200(tmp_path: Path) -> MeasuredKernels:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(CONTENT))
    return MeasuredKernels.load(path)


def sparse(flops: float, form: str = "fp8, 64 heads") -> Work:
    return Work("sparse_mla", flops, 1e6, "bf16", form)


def measured(row: Row, **changed: Any) -> Row:
    """The same work, in another time or of another kernel."""
    return replace(row, measured=replace(row.measured, **changed))


def v32_layers(**keys: Any) -> Deployment:
    """The model of docs/measured.md's server, on its one H100."""
    config = small_model(
        "bench_dsa",
        hidden_size=7168,
        intermediate_size=18432,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        first_k_dense_replace=4,
    ).config
    model = ModelShape.from_config("4 layers", config)
    alone: dict[str, Any] = {"count": 1, "dp": 1, "ep": 1, "context": 133_000}
    return deployment(model, gpu=H100, weights_dtype="bf16", **(alone | keys))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("ci_measured", ROOT / "ci" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_between_two_sizes_logarithms_are_interpolated(on_h200: MeasuredKernels) -> None:
    for flops, us, cases in (
        (2e9, 40, 1),
        (2e10, (40 * 2400) ** 0.5, 2),
        (2e11, 2400, 1),
        (6e11, 7200, 1),  # above: in proportion
        (1e9, 40 - 1e9 * 2400 / 2e11, 1),  # below: launches stay
        (0, 40 - 2e9 * 2400 / 2e11, 1),
    ):
        seconds, rows = on_h200.seconds(replace(sparse(flops), bytes=flops))
        assert seconds * 1e6 == pytest.approx(us), flops
        assert len(rows) == cases, flops


def test_a_lone_case_takes_launches_from_other_forms(on_h200: MeasuredKernels) -> None:
    row = replace(measured(on_h200.rows[0], us=1e4), form="bf16, 64 heads", flops=1e12)
    kernels = replace(on_h200, rows=(*on_h200.rows, row))
    fixed = 40e-6 - 2e9 * 2400e-6 / 2e11
    seconds, _ = kernels.seconds(sparse(1e9, "bf16, 64 heads"))
    assert seconds == pytest.approx(fixed + (1e-2 - fixed) / 1000)
    alone = replace(on_h200, rows=(row,))
    assert alone.seconds(sparse(1e9, "bf16, 64 heads"))[0] == pytest.approx(1e-5)


def test_forms_are_not_mixed(on_h200: MeasuredKernels) -> None:
    other = replace(measured(on_h200.rows[0], us=1e3), form="fp8, 16 heads")
    kernels = replace(on_h200, rows=(*on_h200.rows, other))
    assert kernels.seconds(sparse(2e9))[1] == (on_h200.rows[0],)
    assert kernels.seconds(sparse(2e9, "fp8, 16 heads"))[1] == (other,)
    rates = Rates(H200, (kernels,))
    assert rates.time(sparse(2e9)).basis == "measured"
    # What was not measured is like the form that begins as it does, and an estimate.
    like = rates.time(sparse(2e9, "fp8, 32 heads"))
    assert (like.basis, like.rows) == ("estimate", (other,))


@pytest.mark.parametrize(
    ("op", "case", "expected"),
    [
        ("sparse_mla", "decode 32K, 8 rows, 128 heads, fp8", ("sparse_mla", "fp8, 64 heads")),
        ("sparse_mla", "prefill 32K, 8 rows, 24 heads, bf16", ("sparse_mla", "bf16, 32 heads")),
        ("masked_mha", "prefill 8K, 8 rows, 128 heads", ("masked_mha", "heads of 192")),
        ("masked_mha", "prefill 8K, 8 rows, 64 heads of 256", ("masked_mha", "heads of 256")),
        (
            "indexer_logits",
            "decode 32K, 32 rows, 64 heads, fp8",
            ("indexer_logits", "decode, fp8, 64 heads"),
        ),
        ("topk_select", "decode 32K, 1 rows, k 2048, slots", ("topk_select", "sample")),
        ("topk_select", "prefill 8K, 512 rows, k 2048", ("topk_select", "one piece")),
        ("cache_write", "index query, 1 rows, 64 heads, fp8", ("cache_write", "fp8")),
    ],
)
def test_cases_say_their_form(op: str, case: str, expected: tuple[str, str]) -> None:
    assert read_form(op, case) == expected


def test_plans_ask_for_what_was_measured() -> None:
    """By op and form: a name that differed would leave a case unused."""
    asked = {
        (work.op, work.form)
        for model in (V32, GLM_5)
        for tp in (1, 8)
        for kv_dtype in ("fp8", "bf16")
        for batch in (
            Batch("decode", 8, 1, 32 * K),
            Batch("prefill", 1, 4 * K, 4 * K),
            Batch("prefill", 1, 8 * K, 128 * K),
        )
        for context in (8 * K, 128 * K)
        for work in attention_core(
            deployment(model, gpu=H100, kv_dtype=kv_dtype, tp=tp, dp=8 // tp, context=context),
            batch,
            "dsa",
            indexer=True,
        )
    }
    assert {(row.op, row.form) for row in ON_H100.rows} - asked == set()


def test_an_own_measurement_comes_first(on_h200: MeasuredKernels) -> None:
    rates = Rates(H200, (on_h200, ON_H100))
    ours, theirs = rates.time(sparse(2e9)), rates.time(Work("topk_select", 0, 1e6, "bf16"))
    assert (ours.basis, ours.rows[0].measured.device) == ("measured", "NVIDIA H200")
    assert (theirs.basis, theirs.rows[0].measured.device) == ("estimate", "NVIDIA H100 80GB HBM3")
    # Other ops get as much of this chip as its own copy and products got.
    assert rates.seconds(Work("experts", 0, 4.8e12, "bf16")) == pytest.approx(2.0)
    assert rates.seconds(Work("experts", 989e12, 0, "bf16")) == pytest.approx(2.0)
    assert rates.seconds(Work("experts", 1979e12, 0, "fp8")) == pytest.approx(2.0)


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu is not H100], ids=str)
def test_other_chips_are_estimates_by_the_same_share_of_their_roofline(gpu: Any) -> None:
    keys: dict[str, Any] = {"count": 16, "tp": 8, "dp": 2, "ep": 16}
    here, there = Rates(gpu, (ON_H100,)), Rates(H100, (ON_H100,))
    for batch in (Batch("decode", 16, 1, 32 * K), Batch("prefill", 1, 4 * K, 8 * K)):
        ours, theirs = (
            layer_work(deployment(gpu=chip, **keys), batch, "dsa", dense_mlp=True, indexer=True)
            for chip in (gpu, H100)
        )
        for own, measured in zip(ours, theirs, strict=True):
            time = here.time(own)
            assert time.basis == ("estimate" if time.rows else "roofline")
            share = there.seconds(measured) / peak_seconds(H100, measured)
            expected = max(1, share) * peak_seconds(gpu, own) * own.calls / measured.calls
            if time.rows:
                assert time.seconds == pytest.approx(expected), own.op
            else:  # what a copy and products reached: 72 to 79 %
                assert 1.2 < time.seconds / own.calls / peak_seconds(gpu, own) < 1.45


def test_nothing_is_faster_than_the_roofline() -> None:
    work = replace(sparse(1e9, "bf16, 16 heads"), bytes=1e12)
    assert Rates(H100, (ON_H100,)).seconds(work) == pytest.approx(peak_seconds(H100, work))


def test_chips_whose_names_begin_alike_are_told_apart(on_h200: MeasuredKernels) -> None:
    assert on_h200.fits(H200)
    assert on_h200.gpu is H200
    assert not on_h200.fits(find_gpu("h20"))
    assert ON_H100.gpu is H100
    with pytest.raises(ValueError, match="measured on Abacus, which no --gpu names"):
        _ = replace(on_h200, device="Abacus").gpu


def test_a_file_of_several_benchmarks(on_h200: MeasuredKernels) -> None:
    on_h200.path.write_text(json.dumps({"layer": {}, "kernels": CONTENT}))
    assert MeasuredKernels.load(on_h200.path) == on_h200


def test_a_file_that_is_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    for text in ("[]", "{", '{"rows": []}', json.dumps(CONTENT | {"rows": [{"op": "x"}]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"kernels\.json is not a file that benchmarks"):
            MeasuredKernels.load(path)


def test_a_plan_says_where_its_times_are_from() -> None:
    plan = make_plan(deployment(gpu=H100, count=16, dp=16, ep=16), Rates(H100, (ON_H100,)), 2.0)
    decode, prefill = (
        {row.op: row for row in plan.kernels if row.stage == stage}
        for stage in ("decode", "prefill")
    )
    assert decode["indexer_logits"].basis == prefill["sparse_mla"].basis == "measured"
    assert (decode["sparse_mla"].form, prefill["sparse_mla"].form) == (
        "fp8, 64 heads",
        "bf16, 64 heads",
    )
    assert decode["experts"].basis == "roofline"
    assert decode["experts"].measured == []
    [case] = prefill["sparse_mla"].measured
    assert case.device == "NVIDIA H100 80GB HBM3"
    assert case.case.startswith("prefill 32K, 1024 rows, 128 heads, bf16")
    assert case.source in {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert case.triton
    assert case.config
    assert case.date
    assert case.former == ""
    for op in ("topk_select", "sparse_mla", "cache_write"):
        assert decode[op].basis == "estimate"
        assert all(case.former for case in decode[op].measured)
    # The kernels are those of the plan's own rows.
    core = [row.us for row in plan.kernels if row.stage == "decode"][:-2]
    assert sum(core) == pytest.approx(plan.decode[-1].attention_us)


def test_a_time_of_a_former_kernel_is_an_estimate(on_h200: MeasuredKernels) -> None:
    """As long as it was then, and no present kernel is said to have been measured."""
    former = measured(on_h200.rows[0], former="had two launches")
    kernels = replace(on_h200, rows=(former, on_h200.rows[1]))
    rates = Rates(H200, (kernels,))
    for flops, basis in ((2e9, "estimate"), (2e10, "estimate"), (2e11, "measured")):
        time = rates.time(sparse(flops))
        assert time.basis == basis
        assert time.seconds == kernels.seconds(sparse(flops))[0]
    assert "others then: sparse_mla (had two launches)" in rates.describe()[0]


def test_what_is_shipped_is_of_the_results(script: ModuleType) -> None:
    text, _ = script.shipped()
    assert SHIPPED.read_text(encoding="utf-8") == text, "run ci/measured"


def sweep(**change: Any) -> dict[str, Any]:
    return {
        "gpu": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-27",
        "triton": "3.6.0",
        "roofline": {"bandwidth": 2e12, "bf16": 8e14, "fp8": 15e14},
        "cases": [
            {
                "case": "gather latent 32K",
                "default": "TOK16 w4 s1",
                "flops": 0,
                "bytes": 2000,
                "rows": [
                    {"variant": "default", "us": 3.0},
                    {"variant": "TOK8 w4 s1", "us": 2.0},
                    {"variant": "TOK4 w4 s1", "us": 1.0},
                ],
            }
        ],
    } | change


def rows_of(script: ModuleType, folder: Path, *results: dict[str, Any]) -> tuple[Any, list[str]]:
    folder.mkdir(exist_ok=True)
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(result))
    text, left_out = script.shipped(folder)
    return json.loads(text)["rows"], left_out


def test_of_a_sweep_counts_what_is_launched(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its best, nor what was launched then."""
    for launched, expected in (
        ("TOK8 w4 s1", 2.0),
        ("TOK16 w4 s1", 3.0),
        ("TOK16 w8 s1", None),
        ("", None),
    ):
        monkeypatch.setattr(script, "_tag", lambda *_, tag=launched: tag)
        rows, left_out = rows_of(script, tmp_path, sweep())
        assert [row["us"] for row in rows] == ([] if expected is None else [expected])
        assert len(left_out) == (expected is None)
    case = {key: value for key, value in sweep()["cases"][0].items() if key != "default"}
    unknown = case | {"case": "dream 1r"}
    rows, left_out = rows_of(script, tmp_path, sweep(cases=[case, unknown]))
    assert rows[0]["us"] == 3.0, "a run that names no default launched what is launched now"
    assert left_out == ["dream 1r: plans have no such op"]


def test_what_is_launched_is_by_the_results_triton(script: ModuleType, tmp_path: Path) -> None:
    """Whatever is installed; of a decode's index scores, with how many programs."""
    rows = [
        {"variant": variant, "us": us}
        for us, variant in enumerate(("default", "H64,K64 w8 s2", "H32,K32 w8 s3"), start=1)
    ]
    sizes = {"flops": 1, "bytes": 1, "default": "another"}
    case = {"case": "sparse decode 1r 32K h128 fp8", "rows": rows, **sizes}
    for triton, expected in (("3.6.0", 2), ("3.9.1", 3)):
        [row], _ = rows_of(script, tmp_path, sweep(cases=[case], triton=triton))
        assert row["us"] == expected
    names = ("KEY128,COL128 w4 s3", "KEY128,COL128 w4 s3 p4")
    rows = [{"variant": name, "us": us} for us, name in enumerate(names, start=1)]
    case = {"case": "logits paged 1r 128K h64", "rows": rows, **sizes}
    [row], _ = rows_of(script, tmp_path, sweep(cases=[case]))
    assert (row["us"], row["config"]) == (2, names[1])


def test_a_former_kernels_rows_say_so(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that file alone: a later one is of the present kernel."""
    for variant, us, config in (
        ("default", 3.0, "TOK16 w4 s1"),
        ("TOK4 w4 s1", 1.0, "TOK4 w4 s1"),
        ("", 3.0, "TOK16 w4 s1"),
    ):
        former = {"0.json": {"gather latent": script.Former("why", variant)}}
        monkeypatch.setattr(script, "FORMER", former)
        [row], _ = rows_of(script, tmp_path, sweep())
        assert (row["us"], row["config"], row["former"]) == (us, config, "why")
    [row], _ = rows_of(script, tmp_path, sweep(), sweep(date="2026-11-28"))
    assert "former" not in row


def test_every_former_kernel_was_measured(script: ModuleType) -> None:
    said = {row.measured.former for row in ON_H100.rows} - {""}
    assert said == {former.why for cases in script.FORMER.values() for former in cases.values()}


def test_later_results_replace_earlier_ones(script: ModuleType, tmp_path: Path) -> None:
    later = {
        "kernels": {
            "device": "NVIDIA H100 80GB HBM3",
            "date": "2026-11-28T05:00:00+00:00",
            "versions": {"triton": "3.7.0"},
            "roofline": {"bandwidth": 1e12, "flops": 7e14},
            "rows": [
                {
                    "op": "gather_latents",
                    "case": "gather_latents 32K, fp8",
                    "us": 9.0,
                    "flops": 0,
                    "bytes": 1,
                },
                {"op": "topk_select", "case": "topk_select decode 8K, 1 rows", "failed": "why"},
            ],
        }
    }
    other = sweep(gpu="NVIDIA H200", date="2026-11-29")
    [row], _ = rows_of(script, tmp_path, later, sweep(), other)
    assert (row["us"], row["date"], row["triton"]) == (9.0, "2026-11-28", "3.7.0")
    assert row["source"] == "0.json"
    with pytest.raises(ValueError, match="has no result of an H100"):
        rows_of(script, tmp_path / "none", other)


# Seconds to first token, milliseconds per output token: docs/measured.md, 2026-11-27.
SERVER = {8: (0.47, 2.4), 32: (2.0, 2.5), 128: (8.9, 2.7)}


@pytest.mark.parametrize("context", SERVER)
def test_a_server_took_what_a_plan_says(
    context: int, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels that it had, and its prefills, which gathered fp8 latents."""
    result = json.loads((ROOT / "benchmarks" / "results" / "h100-sweep.json").read_text())
    for case in result["cases"]:
        del case["default"]  # so that what was launched then counts
    (tmp_path / "then.json").write_text(json.dumps(result))
    kernels = tmp_path / "kernels"
    kernels.write_text(script.shipped(tmp_path)[0])
    rates = Rates(H100, (MeasuredKernels.load(kernels),))
    for form in ("is_masked", "is_decoded_first"):
        monkeypatch.setattr(work_module, form, lambda *_: False)
    d = v32_layers()
    first_token, per_token = SERVER[context]
    step = 1e3 * step_time(d, rates, Batch("decode", 1, 1, context * K), "dsa").total
    assert 1 < per_token / step < 1.2
    assert 1 < first_token / prompt_seconds(d, rates, context * K, "dsa") < 1.55


def test_v32_has_the_servers_attention() -> None:
    """So what the comparison says is of a released model's layers."""
    d, rates, batch = v32_layers(), Rates(H100, (ON_H100,)), Batch("decode", 1, 1, 32 * K)
    whole = deployment(V32, gpu=H100, context=133_000)
    assert step_time(d, rates, batch, "dsa").attention_per_layer == pytest.approx(
        step_time(whole, rates, batch, "dsa").attention_per_layer
    )
