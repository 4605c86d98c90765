"""Kernel times measured by benchmarks/kernels.py, for shapes near the ones that it ran."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import hypot, log
from pathlib import Path
from typing import Any

from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.work import Work


@dataclass(frozen=True)
class Row:
    """One measured case: its work, and the share of the roofline that it reached."""

    op: str
    flops: float
    bytes: float
    roofline_fraction: float


@dataclass(frozen=True)
class MeasuredKernels:
    """The kernels.json of one GPU.

    Attributes:
        path: the file.
        device, date: as it says.
        bandwidth, flops: what the same run measured of the device, a second.
        rows: the cases.
    """

    path: Path
    device: str
    date: str
    bandwidth: float
    flops: float
    rows: tuple[Row, ...]

    @classmethod
    def load(cls, path: Path) -> MeasuredKernels:
        """Read the file that benchmarks/kernels.py writes.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(
                Row(row["op"], row["flops"], row["bytes"], row["roofline_fraction"])
                for row in content["rows"]
            )
            roofline = content["roofline"]
            return cls(
                path,
                content["device"],
                content["date"],
                roofline["bandwidth"],
                roofline["flops"],
                rows,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a file that benchmarks/kernels.py wrote ({error!r}); run it again"
            ) from None

    def fits(self, gpu: Gpu) -> bool:
        """Whether it was measured on this kind of GPU."""
        return gpu.device in self.device

    def has(self, op: str) -> bool:
        return any(row.op == op for row in self.rows)

    def seconds(self, work: Work) -> float:
        """Roofline time by the measured device, over the share that the nearest case reached.

        Nearest: by the ratios of FLOPs and of bytes.
        """
        near = min(
            (row for row in self.rows if row.op == work.op),
            key=lambda row: hypot(
                log((1 + row.flops) / (1 + work.flops)), log(row.bytes / work.bytes)
            ),
        )
        least = max(work.flops / self.flops, work.bytes / self.bandwidth)
        return least / near.roofline_fraction

    def describe(self) -> str:
        ops = ", ".join(dict.fromkeys(row.op for row in self.rows))
        return f"{ops} measured on {self.device}, {self.date} ({self.path})"
