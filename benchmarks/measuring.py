"""Time on a device, and where and with what a result was measured."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_case import L2_BYTES
from peers import Run

REPEATS = 20


def seconds(runs: Sequence[Run], device: torch.device) -> float:
    """Median time of one call, over `REPEATS` rounds through all runs; on a CPU, of one round.

    On a GPU these are CUDA events around a captured graph, so without the host's launch cost, and
    each round begins with nothing of the last one in the second-level cache.
    """
    for run in runs:
        run()
    if device.type != "cuda":
        began = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - began) / len(runs)
    graph = torch.cuda.CUDAGraph()
    # Outermost is a stream to go back to: a capture that fails leaves its own behind.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for run in runs:
            run()
    other = torch.zeros(L2_BYTES // 4, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    # The host never waits in between: an idle GPU would note the start, then wait for the graph.
    for start, end in events:
        other.sum()  # fills the cache; what was written there would have to leave it in our time
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    rounds: list[float] = [start.elapsed_time(end) / 1e3 for start, end in events]
    return statistics.median(rounds) / len(runs)


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, chip, commit and versions, to be written with every result."""
    on_gpu = device.type == "cuda"
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": said_by(
            "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
        ),
        "versions": {name: version(name) for name in ("torch", "triton", "dsa-plugin")},
    }


def said_by(*command: str) -> str:
    """The first line of a command's output; "unknown" where it has none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0] or "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
