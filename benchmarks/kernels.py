"""Each op against the chip's roofline, and against other libraries in the same process.

    python benchmarks/kernels.py [--peers DIR ...] [--only REGEX] [--seconds 300] [--resume]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run    # tiny, on a CPU: tests the script

A DIR is an unzipped wheel, or a site-packages, of vLLM or SGLang. vLLM 0.26.0's CUDA wheel has
FlashMLA, DeepGEMM, vLLM's top-k and its Triton kernels; SGLang 0.5.23's Triton kernels run from any
of its wheels. A peer gets the same inputs and its result is compared with ours; one that cannot run
is listed with the reason. Under the interpreter bf16 peers differ: it multiplies bit patterns.

Times are CUDA events around a captured graph, so without the host's launch cost. The graph runs
over copies of the inputs and begins with a cold second-level cache, so that no call finds its own
there, whatever its size. The roofline is measured too: a copy's bandwidth, and matrix products in
bf16 and fp8. Usual shapes come first, and each figure is written at once (results.py). A GPU's
fault, or a case that takes minutes, ends the process: --resume goes on behind it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cache_write_cases
import indexer_logits_cases
import sparse_mla_cases
import topk_select_cases
import torch
from benchmark_case import Case, Scale
from measuring import provenance, seconds
from peers import Peers
from results import UNFINISHED, Results, add_options, why

from dsa_kernels.testing import error

OPS = (
    sparse_mla_cases.cases,
    indexer_logits_cases.cases,
    topk_select_cases.cases,
    cache_write_cases.cases,
)


@dataclass(frozen=True)
class Roofline:
    """What this device reaches: bytes a second of a copy, multiply-adds (times two) a second.

    In bf16, and in fp8, which not every chip multiplies.
    """

    bandwidth: float
    flops: float
    fp8_flops: float | None

    @classmethod
    def measure(cls, scale: Scale) -> Roofline:
        size = 4096 if scale.tiny else 1 << 30
        source = torch.zeros(size, dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        n = 64 if scale.tiny else 8192
        a = torch.randn(n, n, device=scale.device).bfloat16()
        b, c = torch.randn_like(a), torch.empty_like(a)
        one, a8 = torch.ones((), device=scale.device), a.to(torch.float8_e4m3fn)
        try:
            fp8 = seconds(
                [lambda: torch.ops.aten._scaled_mm(a8, a8.t(), one, one, out_dtype=a.dtype)],
                scale.device,
            )
        except (RuntimeError, ValueError):
            fp8 = None
        return cls(
            2 * size / seconds([lambda: target.copy_(source)], scale.device),
            2 * n**3 / seconds([lambda: torch.mm(a, b, out=c)], scale.device),
            None if fp8 is None else 2 * n**3 / fp8,
        )

    def least_seconds(self, case: Case) -> float:
        flops = (self.fp8_flops if case.fp8 else None) or self.flops
        return max(case.bytes / self.bandwidth, case.flops / flops)


def measure(
    case: Case, roofline: Roofline, device: torch.device, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One row of the result; `write` takes what there is of it before each peer."""
    calls = case.make()
    time = seconds(calls.ours, device)
    row: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "us": time * 1e6,
        "roofline_fraction": roofline.least_seconds(case) / time,
        "flops": case.flops,
        "bytes": case.bytes,
        "peers": {},
    }
    for name, runs in calls.peers.items():
        if isinstance(runs, str):
            row["peers"][name] = {"absent": runs}
            continue
        row["peers"][name] = {"absent": UNFINISHED}
        write(row)
        try:
            # In this order: what a run writes, another may write, too.
            theirs, ours = (calls.comparable(first()).clone() for first in (runs[0], calls.ours[0]))
            difference = error(theirs, ours).rms
            peer_time = seconds(runs, device)
        except Exception as failure:  # noqa: BLE001 (a library that is not ours may raise anything)
            row["peers"][name] = {"absent": why(failure)}
            continue
        row["peers"][name] = {
            "us": peer_time * 1e6,
            "ratio": peer_time / time,
            "rms_difference": difference,
            "agrees": difference <= case.tolerance,
        }
    return row


def describe(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['case']:60} {row['failed']}"
    peers = [
        f"{name} absent ({peer['absent'][:60]})"
        if "absent" in peer
        else f"{name} {peer['us']:.1f} us, {peer['ratio']:.2f} of ours"
        + ("" if peer["agrees"] else f", DIFFERS by {peer['rms_difference']:.2g}")
        for name, peer in row["peers"].items()
    ]
    return (
        f"{row['case']:60} {row['us']:10.1f} us "
        f"{row['roofline_fraction']:6.1%} of roofline; {'; '.join(peers)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Ops against the roofline and their peers.")
    parser.add_argument(
        "--peers", type=Path, nargs="+", default=[], help="folders that hold vllm or sglang"
    )
    add_options(parser)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU found; --dry-run with TRITON_INTERPRET=1 runs tiny shapes on a CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    scale = Scale(device, options.dry_run, Peers(tuple(options.peers)))
    results = Results("kernels", provenance(device) | {"peers": scale.peers.versions()}, options)
    if "roofline" not in results.part:
        results.part["roofline"] = asdict(Roofline.measure(scale))
    roofline = Roofline(**results.part["roofline"])
    cases = [case for op in OPS for case in op(scale)]
    for case in sorted(cases, key=lambda case: case.order):
        if not results.wants(case.name):
            continue
        results.add_unfinished({"case": case.name, "failed": UNFINISHED})
        try:
            row = measure(case, roofline, device, results.add_unfinished)
        except Exception as failure:  # noqa: BLE001 (no memory, or a kernel's fault)
            row = {"case": case.name, "failed": why(failure)}
        results.add(row)
        print(describe(row), flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where a fault has ended the GPU's context
    return 0


if __name__ == "__main__":
    sys.exit(main())
