"""Each op against the chip's roofline, and against other libraries in the same process.

    python benchmarks/kernels.py [--peers DIR ...] [--op sparse_mla ...]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run    # tiny, on a CPU: tests the script

A DIR is an unzipped wheel, or a site-packages, of vLLM or SGLang. vLLM 0.26.0's CUDA wheel has
FlashMLA, DeepGEMM, vLLM's top-k and its Triton kernels; SGLang 0.5.23's Triton kernels run from any
of its wheels. A peer gets the same inputs and its result is compared with ours; one that cannot run
is listed with the reason. Under the interpreter bf16 peers differ: it multiplies bit patterns.

Times are CUDA events around a captured graph, so without the host's launch cost. The graph runs
over copies of the inputs and begins with a cold second-level cache, so that no call finds its own
there, whatever its size. The roofline is measured too: a copy's bandwidth, and bf16 matrix
products. Writes kernels.json and kernels.png beside this file, or into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_write_cases
import indexer_logits_cases
import sparse_mla_cases
import topk_select_cases
import torch
from benchmark_case import Case, Scale
from measuring import provenance, seconds, version
from peers import Peers

from dsa_kernels.testing import error

CASES: dict[str, Callable[[Scale], Iterator[Case]]] = {
    "cache_write": cache_write_cases.cases,
    "indexer_logits": indexer_logits_cases.cases,
    "topk_select": topk_select_cases.cases,
    "sparse_mla": sparse_mla_cases.cases,
}


@dataclass(frozen=True)
class Roofline:
    """What this device reaches: bytes a second of a copy, multiply-adds (times two) a second."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls, scale: Scale) -> Roofline:
        size = 4096 if scale.tiny else 1 << 30
        source = torch.zeros(size, dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        n = 64 if scale.tiny else 8192
        a = torch.randn(n, n, device=scale.device).bfloat16()
        b, c = torch.randn_like(a), torch.empty_like(a)
        return cls(
            2 * size / seconds([lambda: target.copy_(source)], scale.device),
            2 * n**3 / seconds([lambda: torch.mm(a, b, out=c)], scale.device),
        )

    def least_seconds(self, case: Case) -> float:
        return max(case.bytes / self.bandwidth, case.flops / self.flops)


def measure(case: Case, roofline: Roofline, scale: Scale) -> dict[str, Any]:
    """One row of the result."""
    time = seconds(case.runs, scale.device)
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "us": time * 1e6,
        "roofline_fraction": roofline.least_seconds(case) / time,
        "flops": case.flops,
        "bytes": case.bytes,
        "peers": {},
    }
    for name, runs in case.peers.items():
        if isinstance(runs, str):
            row["peers"][name] = {"absent": runs}
            continue
        try:
            # In this order: what a run writes, another may write, too.
            theirs, ours = (case.comparable(first()).clone() for first in (runs[0], case.runs[0]))
            difference = error(theirs, ours).rms
            peer_time = seconds(runs, scale.device)
        except Exception as failure:  # noqa: BLE001 (a library that is not ours may raise anything)
            row["peers"][name] = {"absent": f"{type(failure).__name__}: {failure}"}
            continue
        row["peers"][name] = {
            "us": peer_time * 1e6,
            "ratio": peer_time / time,
            "rms_difference": difference,
            "agrees": difference <= case.tolerance,
        }
    return row


def describe(row: dict[str, Any]) -> str:
    peers = [
        f"{name} absent ({peer['absent'][:60]})"
        if "absent" in peer
        else f"{name} {peer['us']:.1f} us, {peer['ratio']:.2f} of ours"
        + ("" if peer["agrees"] else f", DIFFERS by {peer['rms_difference']:.2g}")
        for name, peer in row["peers"].items()
    ]
    return (
        f"{row['op']:15} {row['case']:45} {row['us']:10.1f} us "
        f"{row['roofline_fraction']:6.1%} of roofline; {'; '.join(peers)}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against the roofline's; and the roofline itself, with the ops that multiply."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, roof) = plt.subplots(1, 2, figsize=(13, 5))
    limits = [row["us"] * row["roofline_fraction"] for row in result["rows"]]
    times.loglog(limits, limits, "k-", label="roofline")
    bandwidth, flops = result["roofline"]["bandwidth"], result["roofline"]["flops"]
    intensities = [bend := flops / bandwidth, 4 * bend]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        us = [row["us"] for row in rows]
        times.loglog([row["us"] * row["roofline_fraction"] for row in rows], us, "o", label=op)
        if rows[0]["flops"]:
            intensity = [row["flops"] / row["bytes"] for row in rows]
            tflops = [row["flops"] / row["us"] / 1e6 for row in rows]
            roof.loglog(intensity, tflops, "o", label=op)
            intensities += intensity
    intensities.sort()
    roof.loglog(intensities, [min(x * bandwidth, flops) / 1e12 for x in intensities], "k-")
    times.set(xlabel="least time by the roofline, us", ylabel="time, us", title=result["device"])
    roof.set(xlabel="FLOP a byte", ylabel="TFLOP/s", title=result["date"])
    times.legend()
    roof.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description="Ops against the roofline and their peers.")
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--peers", type=Path, nargs="+", default=[], help="folders that hold vllm or sglang"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU found; --dry-run with TRITON_INTERPRET=1 runs tiny shapes on a CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    scale = Scale(device, tiny=options.dry_run, peers=Peers(tuple(options.peers)))
    roofline = Roofline.measure(scale)
    rows = []
    for op in options.op:
        for case in CASES[op](scale):
            rows.append(measure(case, roofline, scale))
            print(describe(rows[-1]), flush=True)
    result = {
        **provenance(device),
        "roofline": {"bandwidth": roofline.bandwidth, "flops": roofline.flops},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    if version("matplotlib") == "absent":
        print("matplotlib is absent: no kernels.png")
    else:
        plot(result, options.out / "kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
