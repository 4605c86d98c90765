"""A chip's file of results, written anew after each case: a run cut off keeps what it has."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
UNFINISHED = "did not end"
CASE_TIMEOUT_S = 180


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cases, for how long, and where results go."""
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name has it")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no case after so many"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file has, and skip those cases"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/<chip>.json; of a dry run, one in the scratch folder",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")


class Results:
    """The rows of one benchmark; those of others in the same file stay as they are.

    A row has the name of its case, and figures, or "failed" with the reason.
    """

    def __init__(self, benchmark: str, head: dict[str, Any], options: argparse.Namespace) -> None:
        scratch = Path(tempfile.gettempdir()) / "dsa_dry_run.json"
        default = scratch if options.dry_run else FOLDER / f"{chip(head['device'])}.json"
        self.path: Path = options.out or default
        self._benchmark = benchmark
        self._only = re.compile(options.only)
        self._deadline = time.monotonic() + options.seconds
        self._lock = threading.Lock()
        before = self._read().get(benchmark) if options.resume else None
        self.part: dict[str, Any] = before or {**head, "rows": []}
        differing = [key for key in head if key != "date" and self.part.get(key) != head[key]]
        if differing:
            raise SystemExit(
                f"{self.path} is of another {', '.join(differing)}; without --resume it begins anew"
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.part["rows"]
        return rows

    @property
    def seconds_left(self) -> float:
        left: float = self._deadline - time.monotonic()
        return left

    def wants(self, case: str) -> bool:
        """Whether a case is to run: by its name, by the time, and if the file has it not."""
        if self.seconds_left <= 0 or not self._only.search(case):
            return False
        return all(row["case"] != case for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, in place of the one of its case."""
        faulthandler.cancel_dump_traceback_later()
        with self._lock:
            others = [each for each in self.rows if each["case"] != row["case"]]
            self.part["rows"] = [*others, row]
            whole = self._read() | {self._benchmark: self.part}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.path.with_suffix(".partial")
            scratch.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            os.replace(scratch, self.path)

    def add_unfinished(self, row: dict[str, Any]) -> None:
        """Write a row before what may never come back, which ends the process after a while.

        --resume then passes over it.
        """
        self.add(row)
        faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content


def why(failure: Exception) -> str:
    """What a row says in place of figures; the cause is at the end of a server's message."""
    return f"{type(failure).__name__}: {failure}"[-2000:]


def chip(device: str) -> str:
    """A file's name: "NVIDIA H100 80GB HBM3" -> h100-80gb-hbm3"""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("amd-")
