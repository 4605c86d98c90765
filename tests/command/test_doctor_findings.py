"""Each thing that `dsa doctor` finds in the way, provoked once, with the remedy that it names."""

import json
import subprocess
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsa_kernels.arch import arch_of
from dsa_plugin.doctor import findings
from dsa_plugin.doctor.findings import (
    Finding,
    examine_config,
    examine_device,
    examine_environment,
    examine_fit,
)
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import ModelShape, find_registered
from dsa_plugin.probe.checks import run_checks
from dsa_plugin.recipes.schema import HostName


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of distributions, and a host whose plugin machinery is content."""
    versions = {"vllm": "0.32.0", "torch": "2.13.0+cu130"}
    monkeypatch.setattr(findings, "installed_version", versions.get)
    pins = {"vllm": ["torch==2.13.0"], "sglang": ["torch==2.14.1"]}
    ours = requires("dsa-plugin")
    monkeypatch.setattr(findings, "requires", lambda name: pins.get(name, ours))
    activation(monkeypatch, "ok   entry point\n")
    return versions


def activation(monkeypatch: pytest.MonkeyPatch, out: str, err: str = "") -> None:
    done = subprocess.CompletedProcess([], 1, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def faults(host: HostName = "vllm") -> list[Finding]:
    return [finding for finding in examine_environment(host) if not finding.ok]


@pytest.mark.usefixtures("installed")
def test_nothing_in_the_way() -> None:
    assert faults() == []
    assert [finding.what for finding in examine_environment("vllm")] == [
        "vllm",
        "torch",
        "plugin's entry point",
    ]


@pytest.mark.usefixtures("installed")
def test_a_host_that_is_not_installed() -> None:
    [fault] = faults("sglang")
    assert fault.text.startswith("not installed in ")
    assert fault.remedy.startswith("pip install 'sglang<0.5.24,>=0.5.20' here")


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0"])
def test_a_version_out_of_range(installed: dict[str, str], version: str) -> None:
    installed["vllm"] = version
    [fault] = faults()
    assert fault.text == f"{version}, and the plugin was written for vllm<0.34,>=0.26"
    assert fault.remedy == f"pip install 'vllm<0.34,>=0.26', or a dsa-plugin for {version}"


def test_another_torch_than_the_host_was_compiled_against(installed: dict[str, str]) -> None:
    installed["torch"] = "2.14.1"
    [fault] = faults()
    assert (fault.what, fault.text) == ("torch", "2.14.1, and vllm pins torch==2.13.0")
    assert fault.remedy == "reinstall vllm in a new environment"


def test_another_torch_matters_to_compiled_kernels_alone(installed: dict[str, str]) -> None:
    installed["sglang"] = "0.5.23"
    assert faults("sglang") == []
    installed["sglang-kernel"] = "0.4.10"
    assert [fault.what for fault in faults("sglang")] == ["torch"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("out", "err", "what", "text", "remedy"),
    [
        (
            "ok   x\nFAIL entry point: VLLM_PLUGINS=other leaves dsa out: add it\n",
            "",
            "plugin's entry point",
            "VLLM_PLUGINS=other leaves dsa out",
            "add it",
        ),
        (
            "",
            "Traceback\nImportError: no vllm.envs\n",
            "plugin",
            "ImportError: no vllm.envs",
            "`python -m dsa_plugin.hosts.vllm.probe.check` shows all of it; reinstall vllm",
        ),
    ],
    ids=["left out", "the host does not start"],
)
def test_a_plugin_that_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    err: str,
    what: str,
    text: str,
    remedy: str,
) -> None:
    activation(monkeypatch, out, err)
    assert faults() == [Finding(what, False, text, remedy)]


def test_checks_stop_at_the_first_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str | None:
        raise KeyError("two\nlines")

    assert run_checks({"a": lambda: None, "b": lambda: "no: do it", "c": broken}) == 1
    assert run_checks({"c": broken}) == 1
    assert run_checks({"a": lambda: None}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["ok   a", "FAIL b: no: do it"]
    assert lines[2].startswith("FAIL c: KeyError: 'two\\nlines': install releases")
    assert lines[3:] == ["ok   a"]


def gpu(monkeypatch: pytest.MonkeyPatch, *, build: str | None, nodes: list[str]) -> None:
    """A machine where torch, built for `build`, reaches no GPU, whose driver made `nodes`."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nGo")

    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(findings, "_gpu_nodes", lambda: nodes)


def test_no_gpu_and_none_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, build=None, nodes=[])
    assert examine_device() == [Finding("GPU", True, "none, and a torch for CPUs")]


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, build="13.0", nodes=["/dev/nvidia0"])
    [fault] = examine_device()
    assert not fault.ok
    assert fault.text == "The NVIDIA driver on your system is too old (found version 11040)."
    assert fault.remedy.startswith("update the driver to one for 13.0, as torch ")


def test_a_gpu_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, build="13.0", nodes=[])
    [fault] = examine_device()
    assert not fault.ok
    assert fault.remedy.endswith("or ask about one: --gpu NAME")


def test_a_torch_for_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, build=None, nodes=["/dev/kfd"])
    [fault] = examine_device()
    assert (fault.ok, fault.text) == (False, f"/dev/kfd, but torch {torch.__version__} has none")
    assert fault.remedy == "install the host's GPU build, in an environment of its own"


@pytest.mark.parametrize(("major", "ok"), [(8, [True]), (7, [True, False])])
def test_a_capability_that_no_kernel_is_for(
    monkeypatch: pytest.MonkeyPatch, major: int, ok: list[bool]
) -> None:
    properties = SimpleNamespace(name="GPU", major=major, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    arch_of.cache_clear()
    found = examine_device()
    arch_of.cache_clear()
    assert [finding.ok for finding in found] == ok
    assert found[0].text == "2 x GPU"
    if major == 7:
        assert found[1].text.startswith("no Triton kernel for GPU (sm70)")
        assert found[1].remedy.startswith("serve on another GPU")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "glm_moe_dsa"}, True),
        ({"model_type": "glm_moe_dsa", "indexer_rope_interleave": True}, False),
        ({"model_type": "deepseek_v32"}, False),  # false is what hosts take where it is missing
    ],
)
def test_a_config_without_its_rope_key(tmp_path: Path, config: Any, found: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    faults = examine_config(tmp_path)
    assert [fault.what for fault in faults] == ["RoPE of the indexer"] * found
    for fault in faults:
        assert fault.remedy == 'add "indexer_rope_interleave": true, or DSA_PLUGIN=on'


def model(name: str) -> ModelShape:
    shape = find_registered(name)
    assert shape is not None
    return shape


def test_weights_that_do_not_fit() -> None:
    [fault] = examine_fit("vllm", model("DeepSeek-V3.2"), find_gpu("a100"), 8)
    assert (fault.what, fault.ok) == ("memory", False)
    assert fault.text.endswith(" of 80 GiB on each of 8 x a100-80g")
    assert fault.remedy.startswith("16 GPUs, or a smaller checkpoint; `dsa plan deepseek-ai/")
    [fits] = examine_fit("vllm", model("DeepSeek-V3.2"), find_gpu("a100"), 16)
    assert fits.ok
    for count in (4, 3):
        [fault] = examine_fit("vllm", model("DeepSeek-V3.2"), find_gpu("h200"), count)
        assert fault.remedy.startswith("8 GPUs, or")
    [hopeless] = examine_fit("vllm", model("GLM-5.2"), find_gpu("rtx-3090"), 8)
    assert hopeless.remedy.startswith("another GPU, or")


def test_fp8_weights_on_a_chip_without_fp8() -> None:
    fault, _ = examine_fit("sglang", model("GLM-5.2-FP8"), find_gpu("a100"), 16)
    assert (fault.what, fault.ok) == ("FP8 weights", False)
    assert fault.remedy == "a w4a16 or bf16 checkpoint, or vLLM"
    for host, name, chip in (
        ("vllm", "GLM-5.2-FP8", "a100"),
        ("sglang", "GLM-5.2-FP8", "h200"),
        ("sglang", "GLM-5.2", "a100"),
    ):
        found = examine_fit(host, model(name), find_gpu(chip), 32)  # type: ignore[arg-type]
        assert [finding.what for finding in found] == ["memory"]


@pytest.mark.parametrize(("short", "full"), [("A100", "a100-80g"), ("mi350", "mi350x")])
def test_short_names_of_gpus(short: str, full: str) -> None:
    assert find_gpu(short).name == full
