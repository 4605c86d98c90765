"""From work to seconds: by kernels that were measured, else by the roofline.

The roofline: the larger of FLOPs over peak and bytes over bandwidth, op after op.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.measured import MeasuredKernels, Row
from dsa_plugin.planning.sizes import Attention
from dsa_plugin.planning.work import Batch, Work, attention_core, head_work, weights_work

Basis = Literal["measured", "estimate", "roofline"]
"""measured: this op in this form on this GPU. estimate: its roofline over the share that the op
reached where it was measured, on another GPU, in another form or by a kernel that was another then.
roofline: it was not measured."""

_INTERPOLATED = (
    "Interpolated between the two cases named, by the logarithms of time and of FLOPs (of bytes, "
    "where nothing is multiplied); from one case, in proportion to these, below it but for what "
    "launches take; never less than the roofline"
)


@dataclass(frozen=True)
class Timed:
    """Seconds of an op's work, and what they are from.

    Attributes:
        seconds: of all its calls.
        rows: cases that were measured; none by the roofline alone.
    """

    seconds: float
    basis: Basis
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Rates:
    """How fast a GPU does work.

    Attributes:
        gpu: which.
        figures: measured kernels, of which the first that have an op count; ().
    """

    gpu: Gpu
    figures: tuple[MeasuredKernels, ...] = ()

    def seconds(self, work: Work) -> float:
        return self.time(work).seconds

    def time(self, work: Work) -> Timed:
        for figures in self.figures:
            if rows := figures.family(work):
                seconds, used = figures.seconds(work)
                same = figures.fits(self.gpu) and rows[0].form == work.form
                if not same:
                    there = replace(work, precision=rows[0].precision)
                    seconds *= peak_seconds(self.gpu, work) / peak_seconds(figures.gpu, there)
                former = any(row.measured.former for row in used)
                basis: Basis = "measured" if same and not former else "estimate"
                seconds = max(seconds, peak_seconds(self.gpu, work))
                return Timed(work.calls * seconds, basis, used)
        return Timed(work.calls * self.reached_seconds(work), "roofline", ())

    def reached_seconds(self, work: Work) -> float:
        """By the roofline of what a copy and matrix products reached; of peaks, if none ran."""
        if not self.figures:
            return peak_seconds(self.gpu, work)
        share = reached(self.figures[0])
        return max(
            _multiplying(self.gpu, work) / share[work.precision],
            _moving(self.gpu, work) / share["bytes"],
        )

    def describe(self) -> list[str]:
        """Which figures are behind the times, a sentence each."""
        peaks = f"{self.gpu.name}'s published peaks ({self.gpu.source})"
        if not self.figures:
            return [f"Every time is the roofline of {peaks}; no measured kernel"]
        return [
            *(self._describe(figures, peaks) for figures in self.figures),
            self._describe_others(peaks),
            _INTERPOLATED,
        ]

    def _describe(self, figures: MeasuredKernels, peaks: str) -> str:
        ops = ", ".join(dict.fromkeys(row.op for row in figures.rows if not row.measured.former))
        measured, others = f"{ops}, on {figures.provenance}", _former(figures)
        if figures.fits(self.gpu):
            return f"measured: {measured}; estimate: another form of these{others}"
        name = figures.gpu.name.upper()
        return (
            f"estimate: {name}'s measured efficiency on this chip's roofline, of {peaks}: "
            f"{measured}{others}"
        )

    def _describe_others(self, peaks: str) -> str:
        best = self.figures[0]
        share = {name: f"{part:.0%}" for name, part in reached(best).items()}
        return (
            f"roofline: every other op, dense attention too, by {peaks}, of which a copy and "
            f"matrix products reached {share['bytes']} of bandwidth, {share['bf16']} of bf16 and "
            f"{share['fp8']} of fp8 on {best.device}"
        )


def _former(figures: MeasuredKernels) -> str:
    """What was measured of kernels that changed since."""
    changes = dict.fromkeys(
        f"{row.op} ({row.measured.former})" for row in figures.rows if row.measured.former
    )
    return f", and kernels that were others then: {', '.join(changes)}" if changes else ""


def reached(figures: MeasuredKernels) -> dict[str, float]:
    """Of the published bandwidth and peaks, what a copy and matrix products reached."""
    gpu = figures.gpu
    bf16 = figures.flops / (gpu.bf16_tflops * 1e12)
    fp8 = bf16
    if figures.fp8_flops and gpu.fp8_tflops:
        fp8 = figures.fp8_flops / (gpu.fp8_tflops * 1e12)
    return {"bytes": figures.bandwidth / (gpu.gb_per_second * 1e9), "bf16": bf16, "fp8": fp8}


def peak_seconds(gpu: Gpu, work: Work) -> float:
    """One call by the roofline of published peaks."""
    return max(_multiplying(gpu, work), _moving(gpu, work))


def _multiplying(gpu: Gpu, work: Work) -> float:
    peak = gpu.fp8_tflops if work.precision == "fp8" else gpu.bf16_tflops
    assert peak is not None, "work.py asks for fp8 only where there are units"
    return work.flops / (peak * 1e12)


def _moving(gpu: Gpu, work: Work) -> float:
    return work.bytes / (gpu.gb_per_second * 1e9)


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
    attention = weights = 0.0
    for (dense_mlp, indexer), count in layers.items():
        core = attention_core(d, batch, kind, indexer=indexer)
        rest = weights_work(d, batch, kind, dense_mlp=dense_mlp, indexer=indexer)
        attention += count * sum(map(rates.seconds, core))
        weights += count * sum(map(rates.seconds, rest))
    head = rates.seconds(head_work(d, batch))
    return StepTime(attention / d.model.num_hidden_layers, attention + weights + head)


def prompt_seconds(d: Deployment, rates: Rates, context: int, kind: Attention) -> float:
    """A whole prompt, chunk after chunk, alone on its rank: the wait for the first token."""
    ends = [*range(d.prefill_chunk, context, d.prefill_chunk), context]
    starts = [0, *ends]
    return sum(
        step_time(d, rates, Batch("prefill", 1, end - start, end), kind).total
        for start, end in zip(starts, ends, strict=False)
    )
