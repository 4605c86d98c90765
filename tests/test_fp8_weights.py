"""What a plan says of fp8 weights on GPUs without fp8 units, by vLLM's own selection of kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_testbed import __file__ as testbed

SCRIPT = Path(testbed).with_name("fp8_weights.py")


@pytest.mark.serving
@pytest.mark.parametrize("gpu", ["a100-80g", "rtx-3090"])
def test_vllm_multiplies_them_in_bf16_by_marlin(gpu: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), gpu], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "linear": "MarlinFP8ScaledMMLinearKernel",
        "experts": {"MARLIN": True, "TRITON": False},
    }
