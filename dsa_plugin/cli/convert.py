"""`dsa convert`: a checkpoint in another precision, or cut for ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dsa_plugin.convert.compare import Compared
    from dsa_plugin.convert.formats import Precision
    from dsa_plugin.convert.plan import Plan
    from dsa_plugin.convert.run import Done


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint: bf16, or FP8 in blocks of 128.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write, or to go on with.")],
    to: Annotated[
        Literal["bf16", "w8a16", "w4a16"] | None,
        typer.Option(help="Precision of the weights; integers have groups of 128."),
    ] = None,
    model_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks of `dsa generate`: a file for each, precision as it is."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: compare TARGET with SOURCE.")
    ] = False,
    each: Annotated[
        bool, typer.Option("--each", help="With --check: a row for each tensor, not each kind.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Files at a time; one for each CPU core.")
    ] = None,
) -> None:
    """Convert SOURCE into TARGET, file by file; the same command goes on after a stop.

    Indexers, routers, kv_b_proj, embeddings and heads are never quantised. With --check it exits
    with 1 where a tensor is further off than its format allows, or a file is not as it was written.
    """
    if to and model_parallel:
        raise ValueError(
            f"--to {to} and --model-parallel {model_parallel}: one at a time. `dsa generate` reads "
            "bf16, fp32 and FP8: convert with --to bf16, then the new folder with --model-parallel"
        )
    wanted = to or model_parallel
    if check == (wanted is not None):
        raise ValueError(
            "give one of --to bf16, --to w8a16, --to w4a16, --model-parallel N and --check"
        )
    if each and not check:
        raise ValueError("--each goes with --check")
    workers = workers or os.cpu_count() or 1
    if wanted is None:
        raise typer.Exit(_check(source, target, workers, each=each))
    planned = _plan(source, target, wanted)
    done = _convert(planned, workers)
    for name in done.left_out:
        print(f"left out {name}: weights that the safetensors index does not name")
    files = f"{len(done.written)} files written, {len(done.kept)} kept from before"
    print(f"{target}: {planned.to}, {files}; sha256 of each in dsa_convert.json")


def _plan(source: Path, target: Path, to: Precision | int) -> Plan:
    """Of a conversion to a precision, or for so many ranks."""
    if isinstance(to, int):
        from dsa_plugin.convert.model_parallel import plan_ranks

        return plan_ranks(source, target, to)
    from dsa_plugin.convert.plan import plan

    return plan(source, target, to)


def _convert(planned: Plan, workers: int) -> Done:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from dsa_plugin.convert.run import convert as run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = sum(planned.read_bytes(name) for name in planned.files)
        task = progress.add_task("read", total=total)
        return run(planned, workers, lambda count: progress.advance(task, count))


def _check(source: Path, target: Path, workers: int, *, each: bool) -> bool:
    """Print what differs and how; whether anything is wrong."""
    from dsa_plugin.convert.compare import damaged_files

    found = list(_compare(source, target, workers))
    _print_table(found if each else _worst_of_kinds(found))
    wrong = [tensor for tensor in found if tensor.wrong]
    damaged = damaged_files(target, workers)
    for tensor in wrong[:20]:
        print(f"FAIL {tensor.name}: {tensor.form}, {tensor.of_allowed:.3g} of what is allowed")
    for name in damaged:
        print(f"FAIL {name}: not as it was written (sha256 of dsa_convert.json)")
    print(f"{len(found)} tensors compared, {len(wrong)} wrong; {len(damaged)} files damaged")
    return bool(wrong or damaged)


def _compare(source: Path, target: Path, workers: int) -> Iterator[Compared]:
    from dsa_plugin.safetensors_header import ranks_of

    if ranks := ranks_of(target):
        from dsa_plugin.convert.model_parallel import compare_ranks

        return compare_ranks(source, target, ranks, workers)
    from dsa_plugin.convert.compare import compare

    return compare(source, target, workers)


def _worst_of_kinds(found: Iterable[Compared]) -> list[Compared]:
    """Of tensors whose names differ in numbers or rank alone, the one with the largest error."""
    import re
    from dataclasses import replace

    kinds: dict[tuple[str, str], list[Compared]] = {}
    for tensor in found:
        kind = re.sub(r"(?<=\.)\d+(?=\.)|(?<= of rank )\d+$", "*", tensor.name)
        kinds.setdefault((kind, tensor.form), []).append(tensor)
    return [
        replace(max(tensors, key=lambda t: t.of_allowed), name=f"{kind} x {len(tensors)}")
        for (kind, _), tensors in kinds.items()
    ]


def _print_table(rows: Iterable[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "stored", box=None)
    for heading in ("max error", "relative error", "of allowed"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (f"{n:.3g}" for n in (row.max_error, row.relative_error, row.of_allowed))
        table.add_row(row.name, row.form, *numbers)
    Console(width=None if Console().is_terminal else 160).print(table)
