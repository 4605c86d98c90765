"""Times of kernels that were measured, and from them those of other sizes.

The plugin ships an H100's, h100.json, which ci/measured writes; benchmarks/kernels.py makes others.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from math import log
from pathlib import Path
from typing import Any

from dsa_plugin.planning.forms import read_form
from dsa_plugin.planning.gpus import GPUS, Gpu
from dsa_plugin.planning.work import Precision, Work

SHIPPED = Path(__file__).parent / "h100.json"


@dataclass(frozen=True, kw_only=True)
class MeasuredCase:
    """A time that a kernel's is computed from.

    Attributes:
        case: what the benchmark called it.
        us: what it took.
        device, date, triton, config, source: on what, when, with which version, launched how, in
            which file; "": not known.
        former: how the kernel was another then; "": it is what the plugin has.
    """

    case: str
    us: float
    device: str
    date: str
    triton: str
    config: str
    source: str
    former: str


@dataclass(frozen=True)
class Row:
    """A measured case, and its work.

    Attributes:
        op, form: as of `Work`.
        flops, bytes, precision: its work.
        measured: the time, and where it is from.
    """

    op: str
    form: str
    flops: float
    bytes: float
    precision: Precision
    measured: MeasuredCase

    @property
    def seconds(self) -> float:
        return self.measured.us / 1e6

    @property
    def size(self) -> float:
        return _size(self.flops, self.bytes)


@dataclass(frozen=True)
class MeasuredKernels:
    """One GPU's times.

    Attributes:
        path: the file.
        device, date: as it says.
        bandwidth, flops: what the same run measured of the device, a second.
        fp8_flops: the same in fp8; None: was not measured.
        rows: the cases.
    """

    path: Path
    device: str
    date: str
    bandwidth: float
    flops: float
    fp8_flops: float | None
    rows: tuple[Row, ...]

    @classmethod
    def load(cls, path: Path) -> MeasuredKernels:
        """Read a file that benchmarks/kernels.py has written, or the shipped one.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            content: dict[str, Any] = whole.get("kernels", whole)
            roofline = content["roofline"]
            return cls(
                path,
                content["device"],
                content["date"],
                roofline["bandwidth"],
                roofline["flops"],
                roofline.get("fp8_flops"),
                tuple(_row(row, content, path) for row in content["rows"] if "failed" not in row),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a file that benchmarks/kernels.py wrote ({error!r}); run it again"
            ) from None

    @staticmethod
    def are_in(path: Path) -> bool:
        """Whether a file of results has those of kernels."""
        return "kernels" in json.loads(path.read_text(encoding="utf-8"))

    def fits(self, gpu: Gpu) -> bool:
        """Whether it was measured on this kind of GPU."""
        return re.search(rf"\b{re.escape(gpu.device)}\b", self.device) is not None

    @cached_property
    def gpu(self) -> Gpu:
        """The kind that it was measured on.

        Raises:
            ValueError: none that plans know.
        """
        for gpu in GPUS.values():
            if self.fits(gpu):
                return gpu
        raise ValueError(f"{self.path} was measured on {self.device}, which no --gpu names")

    def family(self, work: Work) -> tuple[Row, ...]:
        """The op's rows of that form, or of the form most like it, by size; (): it has none."""
        forms = self._families.get(work.op, {})
        if work.form in forms or not forms:
            return forms.get(work.form, ())
        # Of two as alike, the first.
        return forms[max(sorted(forms), key=lambda form: _alike(form, work.form))]

    def seconds(self, work: Work) -> tuple[float, tuple[Row, ...]]:
        """What one call of an op that has a family takes there, and the rows that say so.

        Size is FLOPs, or bytes of an op that multiplies nothing. Between two rows, logarithms of
        time and size are interpolated. Above the largest, time grows with size. Below the smallest,
        what it took beyond the family's best rate stays, as launches do, and the rest shrinks; a
        family of one row takes that fixed part from the op's others.
        """
        rows, size = self.family(work), _size(work.flops, work.bytes)
        first, last = rows[0], rows[-1]
        if size <= first.size:
            others = [_fixed(family) for family in self._families[work.op].values()]
            fixed = _fixed(rows) or min(filter(None, others), default=0.0)
            fixed = min(fixed, first.seconds)
            return fixed + (first.seconds - fixed) * size / first.size, (first,)
        if size >= last.size:
            return last.seconds * size / last.size, (last,)
        above = bisect_left(rows, size, key=lambda row: row.size)
        low, high = rows[above - 1], rows[above]
        way = log(size / low.size) / log(high.size / low.size)
        return low.seconds * (high.seconds / low.seconds) ** way, (low, high)

    @property
    def provenance(self) -> str:
        """Chip, days, versions of Triton, file."""
        cases = [row.measured for row in self.rows]
        days, versions = (
            " to ".join(sorted({min(texts), max(texts)})) if texts else ""
            for texts in ([case.date for case in cases], [case.triton for case in cases])
        )
        known = [self.device, days, versions and f"Triton {versions}", str(self.path)]
        return ", ".join(filter(None, known))

    @cached_property
    def _families(self) -> dict[str, dict[str, tuple[Row, ...]]]:
        families: dict[str, dict[str, tuple[Row, ...]]] = {}
        for row in sorted(self.rows, key=lambda row: row.size):
            forms = families.setdefault(row.op, {})
            forms[row.form] = (*forms.get(row.form, ()), row)
        return families


def _alike(form: str, other: str) -> int:
    """How many parts agree, from the first, which matters most."""
    parts = zip(form.split(", "), other.split(", "), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))


def _fixed(family: tuple[Row, ...]) -> float:
    """What the smallest took beyond the best rate; 0 of one alone, which cannot tell."""
    first = family[0]
    return first.seconds - first.size * min(row.seconds / row.size for row in family)


def _size(flops: float, nbytes: float) -> float:
    return flops or nbytes


def _row(row: dict[str, Any], content: dict[str, Any], path: Path) -> Row:
    case = row["case"].removeprefix(f"{row['op']} ")
    op, form = read_form(row["op"], case)
    return Row(
        op=op,
        form=form,
        flops=row["flops"],
        bytes=row["bytes"],
        precision="fp8" if op == "indexer_logits" and "fp8" in form else "bf16",
        measured=MeasuredCase(
            case=case,
            us=row["us"],
            device=content["device"],
            date=row.get("date", content["date"])[:10],
            triton=row.get("triton") or content.get("versions", {}).get("triton", ""),
            config=row.get("config", ""),
            source=row.get("source", path.name),
            former=row.get("former", ""),
        ),
    )
