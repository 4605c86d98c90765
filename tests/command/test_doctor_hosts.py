"""`dsa doctor` with the hosts themselves: what they refuse, why, and what the tables say of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from dsa_testbed.forced_isa import force_avx2
from dsa_testbed.released import write_config
from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving

SCRIPT = Path(__file__).resolve().parents[2] / "ci" / "support_matrix.py"
DSA_VARIABLES = ("DSA_PLUGIN", "VLLM_PLUGINS", "SGLANG_PLUGINS")


def doctor(host: str, *args: str, **env: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON, in the environment of that host."""
    python = sys.executable if host == "vllm" else str(sglang_python())
    clean = {key: value for key, value in os.environ.items() if key not in DSA_VARIABLES}
    done = subprocess.run(
        [python, "-m", "dsa_plugin.cli", "doctor", "--json", *args],
        env=clean | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def faults(answer: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What stands in the way: what was found, and the remedy."""
    return {f["what"]: (f["text"], f["remedy"]) for f in answer["findings"] if not f["ok"]}


@pytest.fixture
def script() -> Any:
    """ci/support_matrix.py."""
    spec = spec_from_file_location("support_matrix", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_it_says(script: Any) -> None:
    text, table = script.generate()
    fix = "run ci/support_matrix and commit what it writes"
    assert script.MATRIX.read_text(encoding="utf-8") == text, fix
    readme = script.README.read_text(encoding="utf-8")
    assert readme == script.with_table(readme, table), fix


def test_the_tables_are_the_same_without_avx512(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's half, which comes first: it has a library for each kind of CPU, SGLang has none."""
    force_avx2(monkeypatch)
    version = script.host_version("vllm", sys.executable)
    text = script.matrix({"vllm": (version, script.ask("vllm", sys.executable))})
    written = script.MATRIX.read_text(encoding="utf-8")
    assert written[: len(text)] == text


def test_served_on_a_gpu_that_vllm_refuses() -> None:
    code, answer = doctor("vllm", "--gpu", "a100", "--model", "DeepSeek-V3.2-Exp", "--count", "16")
    assert (code, faults(answer)) == (0, {})
    for serving in answer["serving"]:
        [sparse_mla] = [kernel for kernel in serving["native"] if kernel["op"] == "sparse_mla"]
        assert (sparse_mla["verdict"], serving["served_by"]) == ("no", "dsa_plugin")
        assert "FLASHMLA_SPARSE: [compute capability not supported]" in sparse_mla["text"]


def test_what_stands_in_the_way_on_vllm(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "glm", "glm_moe_dsa", "fp8")
    config = json.loads((folder / "config.json").read_text())
    del config["indexer_rope_interleave"]
    (folder / "config.json").write_text(json.dumps(config))
    model = ("--model", str(folder))
    code, answer = doctor("vllm", "--gpu", "a100", *model, VLLM_PLUGINS="other")
    found = faults(answer)
    assert code == 1
    assert list(found) == ["plugin's entry point", "RoPE of the indexer", "memory"]
    assert found["plugin's entry point"] == ("VLLM_PLUGINS=other leaves dsa out", "add it")
    for serving in answer["serving"]:
        assert serving["served_by"] == "vllm"
        assert serving["blocker"].endswith("; the plugin is not loaded")


def test_what_stands_in_the_way_on_sglang() -> None:
    model = ("--model", "GLM-5.2-FP8")
    code, answer = doctor("sglang", "--gpu", "a100", *model, SGLANG_PLUGINS="other")
    found = faults(answer)
    assert code == 1
    assert list(found) == ["plugin's entry point", "FP8 weights", "memory"]
    assert found["plugin's entry point"] == ("SGLANG_PLUGINS=other leaves dsa out", "add it")
    for serving in answer["serving"]:
        assert serving["served_by"] == "sglang"
        assert serving["blocker"].endswith("; the plugin is not loaded")
