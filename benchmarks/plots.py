"""Figures of a chip's results, which kernels.py, layer.py and serve_gpu.py have written.

python benchmarks/plots.py benchmarks/results/<chip>.json --out docs
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def kernels(part: dict[str, Any], rows: Rows) -> Figure:
    """Time against the roofline's; and the roofline itself, with the ops that multiply."""
    figure, (times, roof) = plt.subplots(1, 2, figsize=(13, 5))
    limits = [row["us"] * row["roofline_fraction"] for row in rows]
    times.loglog(limits, limits, "k-", label="roofline")
    bandwidth, flops = part["roofline"]["bandwidth"], part["roofline"]["flops"]
    intensities = [bend := flops / bandwidth, 4 * bend]
    for op in dict.fromkeys(row["op"] for row in rows):
        ours = [row for row in rows if row["op"] == op]
        us = [row["us"] for row in ours]
        times.loglog([row["us"] * row["roofline_fraction"] for row in ours], us, "o", label=op)
        if ours[0]["flops"]:
            intensity = [row["flops"] / row["bytes"] for row in ours]
            tflops = [row["flops"] / row["us"] / 1e6 for row in ours]
            roof.loglog(intensity, tflops, "o", label=op)
            intensities += intensity
    intensities.sort()
    roof.loglog(intensities, [min(x * bandwidth, flops) / 1e12 for x in intensities], "k-")
    times.set(xlabel="least time by the roofline, us", ylabel="time, us")
    roof.set(xlabel="FLOP a byte", ylabel="TFLOP/s")
    times.legend()
    roof.legend()
    return figure


def layer(_part: dict[str, Any], rows: Rows) -> Figure:
    """Time against context: a curve for each form and batch."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5))
    curves: dict[tuple[bool, str], list[tuple[int, float]]] = {}
    for row in rows:
        prefill = row["rows"] > 1
        sizes = f"{row['heads']} heads" + ("" if prefill else f", batch {row['requests']}")
        for form, ms in row["ms"].items():
            if not isinstance(ms, str):
                curve = curves.setdefault((prefill, f"{form}, {sizes}"), [])
                curve.append((row["context"], ms))
    for (prefill, label), points in curves.items():
        style = "o-" if label.startswith("dsa") else "x--"
        panels[int(prefill)].loglog(*zip(*sorted(points), strict=True), style, label=label)
    for panel, title in zip(panels, ("decode", "a prompt's last tokens"), strict=True):
        panel.set(ylabel="ms a layer", title=title)
        by_context(panel)
    return figure


def serve_gpu(_part: dict[str, Any], rows: Rows) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    timed = [row for row in rows if "ttft_s" in row]
    titles = {"ttft_s": "time to first token, s", "tpot_s": "time per output token, s"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for server in dict.fromkeys(row["server"] for row in timed):
            points = [(row["context"], row[key]) for row in timed if row["server"] == server]
            contexts, runs = zip(*sorted(points), strict=True)
            panel.loglog(contexts, [statistics.median(each) for each in runs], "o-", label=server)
        panel.set(title=title)
        by_context(panel)
    return figure


def by_context(panel: Any) -> None:
    panel.set_xlabel("context, tokens")
    panel.set_xscale("log", base=2)
    panel.grid(True, which="both", alpha=0.3)
    panel.legend()


FIGURES: dict[str, Callable[[dict[str, Any], Rows], Figure]] = {
    "kernels": kernels,
    "layer": layer,
    "serve_gpu": serve_gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of a chip's results.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the figures")
    options = parser.parse_args()
    parts = json.loads(options.results.read_text(encoding="utf-8"))
    for name, draw in FIGURES.items():
        rows = [row for row in parts.get(name, {}).get("rows", []) if "failed" not in row]
        if rows:
            figure = draw(parts[name], rows)
            figure.suptitle(f"{parts[name]['device']}, {parts[name]['date']}")
            path = options.out / f"{options.results.stem}-{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            print(path)


if __name__ == "__main__":
    main()
