"""`dsa verify --url`: does a running server compute DSA right."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from dsa_plugin.server_check.report import Report
    from dsa_plugin.server_check.settings import Settings


def verify_url(settings: Settings, *, as_json: bool) -> int:
    """Ask a server, with progress on stderr, and print what it does wrong.

    Returns:
        0 where it is right, 1 where it is wrong, 2 where it cannot be used or asked enough.

    Raises:
        ValueError: a setting or the checkpoint is not usable, or the server has no such model.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from dsa_plugin.server_check.run import check_server

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(settings.url, total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        report = check_server(settings, progress)
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        _show(report, Console())
    return report.exit_code


def _show(report: Report, console: Console) -> None:
    from dsa_plugin.server_check.faults import LIKELY_CAUSES

    if report.answers:
        console.print(_answers(report))
    if report.bands:
        console.print(_bands(report))
    for note in report.notes:
        print(f"note: {note}")
    if report.problem is not None:
        print(f"{report.verdict}: {report.problem}", file=sys.stderr)
    for finding in report.findings:
        print(f"{finding.fault}, by {finding.by}: {finding.evidence}")
        print(f"  likely: {LIKELY_CAUSES[finding.fault]}")
    print(f"verdict: {report.verdict} ({report.model} at {report.url}, {report.seconds:.0f} s)")


def _answers(report: Report) -> object:
    from rich.table import Table

    from dsa_plugin.server_check.grid import MODES

    table = Table("tokens", *(mode.name for mode in MODES), title="right answers")
    cells = {(cell["length"], cell["mode"]): cell for cell in report.cells()}
    for length in sorted({length for length, _ in cells}):
        row = [cells.get((length, mode.name)) for mode in MODES]
        tokens = max(cell["prompt_tokens"] for cell in row if cell)
        counts = [f"{cell['right']} of {cell['asked']}" if cell else "" for cell in row]
        table.add_row(f"{tokens:,}", *counts)
    return table


def _bands(report: Report) -> object:
    from rich.table import Table

    table = Table(
        *("positions", "asked", "tokens", "mean", "allowed", "largest", ""),
        title="distance of log-probabilities from transformers', nats",
    )
    for band in sorted(report.bands, key=lambda band: (band.mode.batch, band.mode.cached)):
        table.add_row(
            *(band.positions, band.mode.name, f"{band.tokens:,}", f"{band.mean:.2g}"),
            *(f"{band.allowed:.2g}", f"{band.largest:.2g}", "wrong" if band.is_wrong else ""),
        )
    return table
