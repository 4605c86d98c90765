"""What a plan takes for granted of fp8 weights before sm90, by vLLM's own selection of kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.weight_kernels import is_weight_only
from dsa_testbed import __file__ as testbed

SCRIPT = Path(testbed).with_name("fp8_weights.py")


@pytest.mark.serving
@pytest.mark.parametrize(
    ("gpu", "experts"),
    [("a100-80g", "MARLIN"), ("rtx-3090", "MARLIN"), ("rtx-4090", "TRITON"), ("l40s", "TRITON")],
)
def test_vllm_takes_marlin_where_a_plan_says_so(gpu: str, experts: str) -> None:
    assert is_weight_only(find_gpu(gpu), "fp8", experts=False)
    assert is_weight_only(find_gpu(gpu), "fp8", experts=True) == (experts == "MARLIN")
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), gpu], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "linear": "MarlinFP8ScaledMMLinearKernel",
        "experts": experts,
    }
