"""Who serves a DSA model on a GPU with a cache dtype, and what runs each op, alone and with us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dsa_plugin.probe.ask import Answer, Question, Target, ask
from dsa_plugin.probe.host_kernel import HostKernel, Op
from dsa_plugin.recipes.schema import HostName

# The host's names of latents in bf16 and in fp8.
CACHE_DTYPES: dict[HostName, tuple[str, str]] = {
    "vllm": ("bfloat16", "fp8_ds_mla"),
    "sglang": ("bfloat16", "fp8_e4m3"),
}
MODEL_FLAG: dict[HostName, str] = {"vllm": "--model", "sglang": "--model-path"}


@dataclass(frozen=True)
class Serving:
    """One model on one GPU with one cache dtype.

    Attributes:
        host, gpu, model, cache_dtype: what was asked about.
        native: each op of the host alone; empty where it ended before it chose any.
        native_error: what the host alone ended with, in its words; else None.
        ours: what runs each op where the plugin serves; empty where it is not loaded, or refuses.
        served_by: "dsa_plugin" or the host, by this environment's DSA_PLUGIN; None: refused.
        refusal: why, where it is refused.
    """

    host: HostName
    gpu: str
    model: str
    cache_dtype: str
    native: tuple[HostKernel, ...]
    native_error: str | None
    ours: Mapping[Op, str]
    served_by: str | None
    refusal: str | None

    @property
    def native_refusals(self) -> list[str]:
        """Every reason of the host's against serving this alone, in its own words."""
        if self.native_error is not None:
            return [self.native_error]
        return [f"{kernel.op}: {kernel.text}" for kernel in self.native if kernel.verdict == "no"]

    @property
    def blocker(self) -> str | None:
        """Why this is not served, and what would work; None where it is."""
        if self.served_by is None:
            return self.refusal
        if self.served_by == "dsa_plugin" or not self.native_refusals:
            return None
        remedy = (
            "DSA_PLUGIN=on has the plugin serve it" if self.ours else "the plugin is not loaded"
        )
        return f"left to {self.host}, which refuses: {'; '.join(self.native_refusals)}; {remedy}"


def ask_serving(
    python: str,
    host: HostName,
    machines: Mapping[str, tuple[Target, int]],
    models: Mapping[str, Path],
    plugin_mode: str,
) -> list[Serving]:
    """Every GPU, model and cache dtype, in this order; one process of the host.

    Args:
        python: the interpreter of the host's environment.
        machines: each with its tensor-parallel ranks, by the name that answers are to have.
        models: folders with a config.json, likewise.
        plugin_mode: DSA_PLUGIN of whoever would serve.

    Raises:
        ProbeDiedError, ValueError: as `ask`.
    """
    cases = list(product(machines.items(), models.items(), CACHE_DTYPES[host]))
    questions = [
        Question(_arguments(host, folder, cache, ranks), target, {"DSA_PLUGIN": who}, kernels=True)
        for (_, (target, ranks)), (_, folder), cache in cases
        for who in ("off", plugin_mode)
    ]
    answers = ask(python, host, questions)
    return [
        _judge(host, gpu, model, cache, off, asked)
        for ((gpu, _), (model, _), cache), off, asked in zip(
            cases, answers[::2], answers[1::2], strict=True
        )
    ]


def _arguments(host: HostName, folder: Path, cache: str, ranks: int) -> list[str]:
    model = [MODEL_FLAG[host], str(folder), "--tensor-parallel-size", str(ranks)]
    return [*model, "--kv-cache-dtype", cache]


def _judge(host: HostName, gpu: str, model: str, cache: str, off: Answer, asked: Answer) -> Serving:
    native: list[dict[str, Any]] = off.settled.get("native", [])
    return Serving(
        host=host,
        gpu=gpu,
        model=model,
        cache_dtype=cache,
        native=tuple(HostKernel(**kernel) for kernel in native),
        native_error=off.error,
        ours=asked.settled.get("ours", {}),
        served_by=asked.settled.get("served_by"),
        refusal=asked.error,
    )
