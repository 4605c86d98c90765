"""From work to seconds: the larger of FLOPs over peak and bytes over bandwidth, op after op."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.measured import MeasuredKernels
from dsa_plugin.planning.sizes import Attention
from dsa_plugin.planning.work import Batch, Work, attention_core, head_work, layer_work


@dataclass(frozen=True)
class Rates:
    """How fast a GPU does work: measured kernels where there are some, else published peaks."""

    gpu: Gpu
    measured: MeasuredKernels | None = None

    def seconds(self, work: Work) -> float:
        if self.measured is not None and self.measured.has(work.op):
            return self.measured.seconds(work)
        peak = self.gpu.fp8_tflops if work.precision == "fp8" else self.gpu.bf16_tflops
        assert peak is not None, "work.py asks for fp8 only where there are units"
        return max(work.flops / (peak * 1e12), work.bytes / (self.gpu.gb_per_second * 1e9))

    def describe(self) -> str:
        """Which figures are behind the times."""
        peaks = f"roofline of {self.gpu.name}'s published peaks ({self.gpu.source})"
        if self.measured is None:
            return f"{peaks}; no measured kernel"
        return f"{self.measured.describe()}; the other ops: {peaks}"


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
        attention_per_layer: what DSA replaces, averaged over the layers.
        total: the whole step on all layers.
    """

    attention_per_layer: float
    total: float


def step_time(d: Deployment, rates: Rates, batch: Batch, kind: Attention) -> StepTime:
    """One decode step or prefill chunk of the backbone."""
    layers = Counter(
        (layer < d.model.first_k_dense_replace, type_ == "full")
        for layer, type_ in enumerate(d.model.indexer_types)
    )
    attention = total = 0.0
    for (dense_mlp, indexer), count in layers.items():
        core = attention_core(d, batch, kind, indexer=indexer)
        work = layer_work(d, batch, kind, dense_mlp=dense_mlp, indexer=indexer)
        attention += count * sum(map(rates.seconds, core))
        total += count * sum(map(rates.seconds, work))
    head = rates.seconds(head_work(d, batch))
    return StepTime(attention / d.model.num_hidden_layers, total + head)


def prompt_seconds(d: Deployment, rates: Rates, context: int, kind: Attention) -> float:
    """A whole prompt, chunk after chunk, alone on its rank: the wait for the first token."""
    ends = [*range(d.prefill_chunk, context, d.prefill_chunk), context]
    starts = [0, *ends]
    return sum(
        step_time(d, rates, Batch("prefill", 1, end - start, end), kind).total
        for start, end in zip(starts, ends, strict=False)
    )
