"""The benchmark scripts run, on tiny shapes, and say what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.triton
def test_kernels(tmp_path: Path) -> None:
    for path, source in PEERS.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(source)
    folder = str(tmp_path)
    done = run("kernels.py", "--dry-run", "--out", folder, "--peers", folder, interpret="1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert len({row["op"] for row in result["rows"]}) == 5
    compared: dict[str, list[bool]] = {}
    for row in result["rows"]:
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
    assert result["versions"]["torch"]
    assert "DIFFERS by" in done.stdout
    assert "FlashMLA absent (ModuleNotFoundError" in done.stdout
    assert "SGLang Triton absent (no folder of --peers has sglang" in done.stdout


def test_layer(tmp_path: Path) -> None:
    done = run("layer.py", "--dry-run", "--out", str(tmp_path), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "layer.json").read_text())
    compared = set()
    for point in result["points"]:
        assert point["ms"]["dsa"] > 0
        here = point["rms_difference"].keys()
        dense_too = any(form.startswith("dense") for form in here)
        assert dense_too == (point["context"] <= result["index_topk"])
        assert ({"dsa, masked", "dsa, gathered"} <= here) == (point["rows"] > 1)
        compared |= here
    assert compared >= {"dsa", "dense, matrix products", "dense, SDPA"}


@pytest.mark.serving
@pytest.mark.matrix
def test_serve_gpu(tmp_path: Path) -> None:
    done = run("serve_gpu.py", "--dry-run", "--out", str(tmp_path), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "serve_gpu.json").read_text())["results"].values()
    assert all(min(row.values()) > 0 for row in result["contexts"].values())
    assert len(result["contexts"]) == 2


@pytest.mark.parametrize("script", ["kernels.py", "layer.py", "serve_gpu.py"])
def test_without_a_gpu_it_says_what_would_work(script: str) -> None:
    done = run(script, interpret="0")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
