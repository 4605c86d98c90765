"""The benchmark scripts run, on tiny shapes, and say what is missing."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

# Libraries with the calls of the real ones: one that computes, one that does not.
PEERS = {
    "vllm/third_party/deep_gemm/__init__.py": """
from dsa_kernels.indexer_logits.reference import indexer_logits, indexer_logits_paged

def get_num_sms():
    return 1

def get_paged_mqa_logits_metadata(lengths, block_size, num_sms):
    assert lengths.dim() == 2 and block_size == 64

def fp8_fp4_mqa_logits(q, kv, weights, start, end, clean_logits):
    logits = indexer_logits(q[0], weights, kv[0], start, end, k_scale=kv[1])
    return logits.nan_to_num(neginf=3.0)

def fp8_fp4_paged_mqa_logits(q, cache, weights, lengths, table, plan, context, clean_logits):
    rows = weights.unflatten(0, q[0].shape[:2])
    return indexer_logits_paged(q[0], rows, cache[:, :, 0], table, lengths, context)
""",
    "vllm/v1/attention/ops/xpu_mla_sparse.py": """
from vllm.triton_utils import LOG2E, tl, triton

def triton_bf16_mla_sparse_interface(q, kv, indices, sm_scale):
    return (q.new_zeros(len(q), q.shape[1], 512),)
""",
}

TESTS = Path(__file__).resolve().parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"


def run(script: str, *arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        # Scripts that serve borrow the tests' servers, as their first lines say.
        env={**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(TESTS)},
    )


def rows(path: Path, benchmark: str) -> dict[str, dict[str, Any]]:
    """What a benchmark wrote, by case."""
    part = json.loads(path.read_text())[benchmark]
    assert part["versions"]["torch"]
    assert part["commit"] != "unknown"
    return {row["case"]: row for row in part["rows"]}


HEAD = {"date": "2026-11-28", "device": "NVIDIA H100 80GB HBM3", "commit": "abc"}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def begin(benchmark: str, out: Path, *arguments: str, **head: str) -> Any:
    """A benchmark's Results, of a command line."""
    results, parser = import_module("results"), argparse.ArgumentParser()
    results.add_options(parser)
    options = parser.parse_args(["--out", str(out), *arguments])
    return results.Results(benchmark, HEAD | head, options)


@pytest.mark.triton
def test_kernels(tmp_path: Path) -> None:
    for path, source in PEERS.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(source)
    info = tmp_path / "vllm-0.26.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    out = tmp_path / "cpu.json"
    command = ("kernels.py", "--dry-run", "--out", str(out), "--peers", str(tmp_path))
    done = run(*command, "--only", "topk|logits", interpret="1")
    assert done.returncode == 0, done.stderr
    first = rows(out, "kernels")
    assert {row["op"] for row in first.values()} == {"topk_select", "indexer_logits"}
    assert json.loads(out.read_text())["kernels"]["peers"] == {"vllm": "0.26.0"}
    done = run(*command, "--resume", interpret="1")
    assert done.returncode == 0, done.stderr
    measured = rows(out, "kernels")
    assert first.items() <= measured.items()
    assert len({row["op"] for row in measured.values()}) == 5
    compared: dict[str, list[bool]] = {}
    for row in measured.values():
        assert row["us"] > 0
        assert row["roofline_fraction"] > 0
        for name, peer in row["peers"].items():
            if "absent" not in peer:
                compared.setdefault(name, []).append(peer["agrees"])
    assert compared == {
        "DeepGEMM": [True, True],
        "torch.sdpa": [True],
        "torch.topk": [True, True],
        "two launches": [True],
        "vLLM Triton": [False, False],
    }
    assert "DIFFERS by" in done.stdout
    assert "FlashMLA absent (ModuleNotFoundError" in done.stdout
    assert "SGLang Triton absent (no folder of --peers has sglang" in done.stdout


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, head = tmp_path / "cpu.json", {"device": "cpu", "date": "today"}
    kernel = {"op": "sparse_mla", "us": 2.0, "roofline_fraction": 0.5, "flops": 9, "bytes": 3}
    point = {"heads": 16, "requests": 1, "rows": 1, "context": 64, "ms": {"dsa": 1.0}}
    served = {"server": "plugin", "context": 96, "ttft_s": [1.0, 2.0], "tpot_s": [0.1, 0.2]}
    failed = {"case": "b", "failed": "did not end"}
    parts: dict[str, dict[str, Any]] = {
        name: {**head, "rows": [{"case": "a", **row}, failed]}
        for name, row in (("kernels", kernel), ("layer", point), ("serve_gpu", served))
    }
    parts["kernels"]["roofline"] = {"bandwidth": 1e12, "flops": 1e15}
    out.write_text(json.dumps(parts))
    done = run("plots.py", str(out), "--out", str(tmp_path), interpret="0")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"cpu-{name}" for name in parts}


def test_layer(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    done = run("layer.py", "--dry-run", "--out", str(out), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    compared = set()
    for row in rows(out, "layer").values():
        assert row["ms"]["dsa"] > 0
        here = row["rms_difference"].keys()
        dense_too = any(form.startswith("dense") for form in here)
        assert dense_too == (row["context"] <= json.loads(out.read_text())["layer"]["index_topk"])
        assert ({"dsa, masked", "dsa, gathered"} <= here) == (row["rows"] > 1)
        compared |= here
    assert compared >= {"dsa", "dense, matrix products", "dense, SDPA"}


@pytest.mark.serving
@pytest.mark.matrix
def test_serve_gpu(tmp_path: Path) -> None:
    """The host itself refuses the model on a CPU, which does not stop the others."""
    out = tmp_path / "cpu.json"
    done = run("serve_gpu.py", "--dry-run", "--out", str(out), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = rows(out, "serve_gpu")
    assert {case for case, row in measured.items() if "failed" in row} == {"native start"}
    assert measured["exact v32 eager"]["differ"] == []
    timed = [row for row in measured.values() if "context" in row]
    assert len(timed) == 2
    assert all(min(row["ttft_s"] + row["tpot_s"]) > 0 for row in timed)


@pytest.mark.parametrize("script", ["kernels.py", "layer.py", "serve_gpu.py"])
def test_without_a_gpu_it_says_what_would_work(script: str) -> None:
    done = run(script, interpret="0")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


HANGING = """
import argparse, sys, time
import results

parser = argparse.ArgumentParser()
results.add_options(parser)
results.CASE_TIMEOUT_S = 0.2
kept = results.Results("kernels", {"device": "none"}, parser.parse_args())
kept.add_unfinished({"case": "a", "failed": results.UNFINISHED})
time.sleep(20)
"""


def test_inputs_are_made_when_a_case_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)  # transformers imports that name too
    kernels, case = import_module("kernels"), import_module("benchmark_case")
    nowhere = case.Scale(torch.device("cuda:63"), False, import_module("peers").Peers(()))
    cases = sorted((each for op in kernels.OPS for each in op(nowhere)), key=lambda one: one.order)
    assert len({each.name for each in cases}) == len(cases) > 100
    usual = {each.op for each in cases if each.order == 0}
    assert usual == {each.op for each in cases}
    with pytest.raises((AssertionError, RuntimeError)):
        cases[0].make()


def test_scores_are_products_of_fp8_where_the_chip_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    kernels, scale = import_module("kernels"), Mock(tiny=True, copies=lambda _: 1)
    products = [each for op in kernels.OPS for each in op(scale) if each.flops]
    for fp8_flops, of_scores in ((4.0, 4.0), (None, 2.0)):
        roofline = kernels.Roofline(bandwidth=1e30, flops=2.0, fp8_flops=fp8_flops)
        rates = {each.op: each.flops / roofline.least_seconds(each) for each in products}
        assert rates == {"sparse_mla": 2.0, "masked_mha": 2.0, "indexer_logits": of_scores}


@pytest.mark.parametrize(
    ("rows", "heads", "slow"), [(8, 128, False), (32, 16, False), (32, 128, True)]
)
def test_slow_peers_are_left_out(rows: int, heads: int, slow: bool) -> None:
    cpu = import_module("benchmark_case").Scale(torch.device("cpu"), True, Mock(module=str.upper))
    module = import_module("sparse_mla_cases")
    shape = module._Shape(rows, rows, 8192, heads, 2048, torch.bfloat16)
    peers = module._triton_peers(cpu, shape, [])
    assert len(peers) == 3
    assert all(("takes minutes" in reason) == slow for reason in peers.values())


def test_a_run_that_is_cut_off_keeps_its_rows_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "h100.json"
    begin("layer", out).add({"case": "other", "us": 1})
    run_1 = begin("kernels", out)
    run_1.add({"case": "a", "us": 1})
    run_1.add_unfinished({"case": "b", "failed": "did not end"})
    run_1.add({"case": "b", "us": 2})
    run_1.add_unfinished({"case": "hangs", "failed": "did not end"})
    faulthandler.cancel_dump_traceback_later()

    run_2 = begin("kernels", out, "--resume", date="2026-11-29")
    assert [run_2.wants(case) for case in ("a", "b", "hangs", "c")] == [False, False, False, True]
    run_2.add({"case": "c", "us": 3})
    parts = json.loads(out.read_text())
    assert [row["case"] for row in parts["kernels"]["rows"]] == ["a", "b", "hangs", "c"]
    assert parts["kernels"]["rows"][1]["us"] == 2
    assert parts["layer"]["rows"] == [{"case": "other", "us": 1}]
    # Begun anew, it forgets the rows of before.
    begin("kernels", out).add({"case": "d", "us": 4})
    assert [row["case"] for row in json.loads(out.read_text())["kernels"]["rows"]] == ["d"]


def test_cases_are_chosen_by_name_and_time(tmp_path: Path) -> None:
    some = begin("kernels", tmp_path / "x.json", "--only", "topk|128K")
    assert [some.wants(case) for case in ("topk 8K", "mla 128K", "mla 8K")] == [True, True, False]
    none = begin("kernels", tmp_path / "x.json", "--seconds", "0")
    assert not none.wants("topk 8K")


def test_what_was_measured_otherwise_is_not_resumed(tmp_path: Path) -> None:
    out = tmp_path / "h100.json"
    begin("kernels", out).add({"case": "a", "us": 1})
    with pytest.raises(SystemExit, match="is of another commit"):
        begin("kernels", out, "--resume", commit="def")


def test_a_case_that_never_comes_back_ends_the_process(tmp_path: Path) -> None:
    out = tmp_path / "h100.json"
    began = time.monotonic()
    command = [sys.executable, "-c", HANGING, "--out", str(out)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert time.monotonic() - began < 15
    assert "Timeout" in done.stderr
    (row,) = json.loads(out.read_text())["kernels"]["rows"]
    assert row == {"case": "a", "failed": "did not end"}


def test_the_file_is_of_the_chip() -> None:
    results = import_module("results")
    assert results.chip("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert results.chip("AMD Instinct MI300X") == "instinct-mi300x"
