"""`dsa verify`: is a checkpoint whole and computed right here; or does a server compute right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsa_plugin.verification.compare import Cell
    from dsa_plugin.verification.report import Report


def verify(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a DSA checkpoint; with --quick a repository of the Hub. With --url: of "
            "the weights that the server has, if they are small enough to run here."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="config.json and the files' headers alone.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Such as 0,2,5-7: the first, the middle, the last, one that shares."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, such as 2K,64K: by index_topk unless given.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Check a running server instead, of OpenAI's API.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As the server of --url names it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the server of --url.")
    ] = None,
    index_topk: Annotated[
        int | None, typer.Option(help="Of the model at --url, where nothing else says it.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a prefill's chunk at --url.")] = None,
    questions: Annotated[
        int | None, typer.Option(help="For --url, of each length.  [default: 8]")
    ] = None,
    num_concurrent: Annotated[
        int | None, typer.Option(help="Requests of a batch to --url.  [default: 4]")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds --url has for one answer.  [default: 300]")
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(help="Seconds to ask --url in all.  [default: 900]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all figures as JSON instead.")
    ] = False,
) -> None:
    """Check CHECKPOINT's files and this machine's kernels on its layers, or what a server answers.

    The layers are computed beside fp64. Exits with 0 where all is right, with 1 where something is
    wrong, with 2 for bad input or a server that cannot be asked.
    """
    of_a_server = {
        "model": model,
        "index_topk": index_topk,
        "chunk": chunk,
        "questions": questions,
        "num_concurrent": num_concurrent,
        "timeout": timeout,
        "budget_s": budget_s,
    }
    given = {name: value for name, value in of_a_server.items() if value is not None}
    if url is not None:
        if quick or layers:
            raise ValueError("--quick and --layers read a checkpoint's files; leave out --url")
        raise typer.Exit(_server(url, api_key, checkpoint, lengths, given, as_json=as_json))
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names}: of a running server; name it with --url")
    if checkpoint is None:
        raise ValueError(
            "name a CHECKPOINT, a folder with --quick also a repository of the Hub, or a --url"
        )
    report = _quick(checkpoint, layers, lengths) if quick else _full(checkpoint, layers, lengths)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _show(report)
    raise typer.Exit(report.wrong)


def _server(
    url: str,
    api_key: str | None,
    checkpoint: str | None,
    lengths: str | None,
    given: dict[str, Any],
    *,
    as_json: bool,
) -> int:
    from dsa_plugin.cli.numbers import length_list
    from dsa_plugin.cli.verify_url import verify_url
    from dsa_plugin.server_check.settings import Settings

    settings = Settings(
        url,
        api_key=api_key,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        lengths=length_list(lengths) if lengths else None,
        **given,
    )
    return verify_url(settings, as_json=as_json)


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
