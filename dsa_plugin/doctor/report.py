"""Everything that `dsa doctor` says, as one value."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dsa_plugin.doctor.findings import (
    Finding,
    examine_config,
    examine_device,
    examine_environment,
    examine_fit,
)
from dsa_plugin.doctor.model_folder import model_folder
from dsa_plugin.doctor.serving import Serving, ask_serving
from dsa_plugin.planning.gpus import GPUS, Gpu
from dsa_plugin.planning.model import ModelShape
from dsa_plugin.probe.ask import ProbeDiedError, Target
from dsa_plugin.recipes.launch import installed_version
from dsa_plugin.recipes.schema import HostName

HERE = "this machine"
FAMILIES = ("deepseek-ai/DeepSeek-V3.2", "zai-org/GLM-5.2")


@dataclass(frozen=True)
class Report:
    """Of one host and one GPU.

    Attributes:
        host, gpu, count: what was asked about; count is GPUs, 0 on a CPU.
        findings: what was looked at, in order.
        serving: each model and cache dtype; empty where the host cannot be asked.
    """

    host: HostName
    gpu: str
    count: int
    findings: list[Finding]
    serving: list[Serving]

    @property
    def blocked(self) -> bool:
        return any(not f.ok for f in self.findings) or any(s.blocker for s in self.serving)


def make_report(
    host: HostName, models: Mapping[str, ModelShape], gpu: Gpu | None, count: int, *, sized: bool
) -> Report:
    """Examine this environment, and ask its host.

    Args:
        models: by what the user called them: a folder of that name has a config.json of its own.
        gpu: None: this machine, whatever it has.
        count: GPUs of the machine; of this one it is known.
        sized: whether the models' weights matter, or only their families.
    """
    findings = examine_environment(host)
    if gpu is None:
        findings += examine_device()
        gpu_here = _gpu_here()
        target = Target.here()
        count = torch.cuda.device_count()
    else:
        gpu_here, target = gpu, Target.of(gpu, count)
    for name, model in models.items():
        if Path(name).is_dir():
            findings += examine_config(Path(name))
        if sized and gpu_here is not None:
            findings += examine_fit(host, model, gpu_here, count)
    where = gpu.name if gpu else HERE
    if installed_version(host) is None:
        return Report(host, where, count, findings, [])
    ranks = gcd(max(1, count), *(model.num_attention_heads for model in models.values()))
    with TemporaryDirectory(prefix="dsa-doctor-") as scratch:
        folders = {name: model_folder(name, model, Path(scratch)) for name, model in models.items()}
        mode = os.environ.get("DSA_PLUGIN", "auto")
        try:
            serving = ask_serving(sys.executable, host, {where: (target, ranks)}, folders, mode)
        except ProbeDiedError as error:
            text = f"{error.what}:\n{error.output}"
            findings.append(Finding(f"asking {host}", False, text, error.REMEDY))
            serving = []
        except ValueError as error:
            # Not every release that the plugin serves can be asked; findings are worth having.
            why = str(error).strip().splitlines()[-1]
            remedy = f"{host}'s log at start says who serves; a newer release can be asked"
            findings.append(Finding(f"asking {host}", False, why, remedy))
            serving = []
    return Report(host, where, count, findings, serving)


def _gpu_here() -> Gpu | None:
    """This machine's, where it is a known one."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    return next((gpu for gpu in GPUS.values() if gpu.device in device), None)
