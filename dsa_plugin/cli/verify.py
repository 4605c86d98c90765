"""`dsa verify`: is a checkpoint whole, and does this machine compute its attention right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsa_plugin.verification.compare import Cell
    from dsa_plugin.verification.report import Report


def verify(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder of a DSA checkpoint; with --quick a repository of the Hub."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="config.json and the files' headers alone.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Such as 0,2,5-7: the first, the middle, the last, one that shares."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens, such as 2K,64K: around index_topk, and 32 times it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures into this file.")
    ] = None,
) -> None:
    """Check CHECKPOINT's files, and this machine's kernels on its layers against fp64.

    Exits with 0 where all is right, with 1 where something is wrong, with 2 for bad input.
    """
    if checkpoint is None:
        raise ValueError("name a CHECKPOINT: a folder, or with --quick a repository of the Hub")
    if json_file is not None:
        json_file.open("a").close()  # before minutes of work
    report = _quick(checkpoint, layers, lengths) if quick else _full(checkpoint, layers, lengths)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    _show(report)
    raise typer.Exit(report.wrong)


def _quick(checkpoint: str, layers: str | None, lengths: str | None) -> Report:
    from dsa_plugin.verification.run import check_files, check_folder

    if layers or lengths:
        raise ValueError("--quick runs no layer; leave out --layers and --lengths, or --quick")
    folder = Path(checkpoint)
    if folder.is_dir():
        return check_folder(folder)
    from dsa_plugin.cli.hub_headers import read_repository

    repository = _repository(checkpoint)
    with _bar("headers") as progress:
        config, headers, weight_map = read_repository(
            repository, lambda done, total: progress(done, total, "headers")
        )
    return check_files(repository, config, headers, weight_map)


def _full(checkpoint: str, layers: str | None, lengths: str | None) -> Report:
    from importlib.util import find_spec

    from dsa_plugin.cli.numbers import layer_list, length_list

    if missing := [name for name in ("safetensors", "tokenizers") if find_spec(name) is None]:
        raise ValueError(
            f"{' and '.join(missing)} is not installed: pip install 'dsa-plugin[verify]'; --quick "
            "works without"
        )
    from dsa_plugin.verification import run

    chosen = layer_list(layers) if layers else None
    tokens = length_list(lengths) if lengths else None
    folder = Path(checkpoint)
    if not folder.is_dir():
        repository = _repository(checkpoint)
        raise ValueError(
            f"{repository} is a repository, and only --quick reads those; add --quick, or "
            f"download it (hf download {repository}) and name the folder"
        )
    with _bar("reading") as progress:
        return run.verify(folder, chosen, tokens, progress)


def _repository(name: str) -> str:
    repository = name.removeprefix("hf://")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise ValueError(
            f"{name!r} is no folder and no repository (organisation/name) of the Hugging Face Hub"
        )
    return repository


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, gone when the block ends."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


def _show(report: Report) -> None:
    for name, value in report.facts.items():
        print(f"{name + ':':18} {value}")
    if report.cells:
        _show_cells(report)
    print()
    for finding in sorted(report.findings, key=lambda finding: finding.level, reverse=True):
        print(f"{'WRONG' if finding.level == 'wrong' else 'note '} {finding}")
    compared = f"{len(report.cells)} comparisons with fp64" if report.cells else "headers alone"
    print(f"{'WRONG' if report.wrong else 'right'}: {report.checkpoint} ({compared})")


def _show_cells(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    lengths = sorted({cell.length for cell in report.cells})
    table = Table("layer", *(f"{length:,}" for length in lengths))
    for layer in sorted({cell.layer for cell in report.cells}):
        cells = [cell for cell in report.cells if cell.layer == layer]
        source = cells[0].source
        name = str(layer) if source == layer else f"{layer} (shares {source})"
        table.add_row(name, *(_verdict([c for c in cells if c.length == n]) for n in lengths))
    Console().print(table, markup=False)
    print(f"Worst agreement with fp64's selection, {_caches(report)}. Read: {report.inputs}.")


def _caches(report: Report) -> str:
    return " and ".join(dict.fromkeys(f"{cell.caches} caches" for cell in report.cells))


def _verdict(cells: list[Cell]) -> str:
    """Of one layer at one length, whatever the caches."""
    if wrong := [f"{cell.caches}: {', '.join(cell.wrong)}" for cell in cells if cell.wrong]:
        return "WRONG " + "; ".join(wrong)
    agreed = [cell.agreement for cell in cells if cell.agreement is not None]
    return f"ok {min(agreed):.1%}" if agreed else "ok"
