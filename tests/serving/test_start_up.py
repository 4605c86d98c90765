"""What the plugin adds to each process of a host, whichever model it serves: modules, not seconds.

Seconds, which other processes change, are measured by benchmarks/start_up.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dsa_testbed.hosts import HOSTS
from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving

# What a process of the host imports for any model's configuration.
_ALWAYS = {
    "vllm": "vllm.engine.arg_utils, vllm.model_executor.models.config",
    "sglang": "sglang.srt.server_args, sglang.srt.plugins",
}
_COUNT = """
import json, os, sys
os.environ["DSA_PLUGIN"] = "on"
import torch, {always}
before = set(sys.modules)
from dsa_plugin.hosts.{host} import register
register()
new = sorted(set(sys.modules) - before)
print(json.dumps([new, torch.cuda.is_initialized()]))
"""
# Modules of ours, and others that these import: now 13 and none, 6 and 1.
BUDGET = {"vllm": (16, 3), "sglang": (9, 3)}


@pytest.mark.parametrize("host", HOSTS)
def test_registering_imports_little(host: str) -> None:
    python = sys.executable if host == "vllm" else str(sglang_python())
    code = _COUNT.replace("{always}", _ALWAYS[host]).replace("{host}", host)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    new, initialised = json.loads(done.stdout.splitlines()[-1])
    assert not initialised
    ours = [name for name in new if name.startswith("dsa_")]
    others = [name for name in new if name not in ours]
    print(f"{host}: {len(ours)} modules of ours, {len(others)} others", ours, others)
    assert f"dsa_plugin.hosts.{host}.registration" in ours
    # No kernel, and nothing that attends, before a DSA model is asked for.
    assert [n for n in ours if n.startswith(("dsa_kernels", "dsa_plugin.attention"))] == []
    assert len(ours) <= BUDGET[host][0]
    assert len(others) <= BUDGET[host][1]
