"""Results of `dsa eval` as tables: for a terminal, and as Markdown for a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from dsa_plugin.evaluation.results import Results
from dsa_plugin.evaluation.summary import perplexity, recall
from dsa_plugin.evaluation.variants import VARIANTS

_ALL = "all"


class Grid(NamedTuple):
    """A table without its looks: a title, names of columns, and rows that begin with theirs."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def show(results: Results) -> None:
    """Print every table to standard output."""
    console = Console(highlight=False, markup=False)
    setting = results.setting
    console.print(f"{setting.model} through {setting.through}, {setting.dtype}", soft_wrap=True)
    for grid in grids(results):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column()
        for name in grid.columns:
            table.add_column(name, justify="right")
        for row in grid.rows:
            table.add_row(*row)
        console.print(f"\n{grid.title}")
        console.print(table)


def markdown(results: Results) -> str:
    """Every table, each under its title."""
    blocks = []
    for grid in grids(results):
        lines = [["", *grid.columns], ["---"] * (1 + len(grid.columns)), *grid.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks.append(f"{grid.title}:\n\n{table}\n")
    return "\n".join(blocks)


def grids(results: Results) -> Iterator[Grid]:
    """Recall by kind, recall by length, perplexity by length; a row for each variant."""
    cells = results.cells
    variants = [name for name in VARIANTS if any(cell.variant == name for cell in cells)]
    lengths = [str(length) for length in sorted({cell.length for cell in cells})]
    whole = recall(cells, lambda cell, _: (cell.variant, _ALL))
    asked = max((found.asked for found in whole.values()), default=0)
    by_kind = whole | recall(cells, lambda cell, answer: (cell.variant, answer.kind))
    by_length = recall(cells, lambda cell, _: (cell.variant, str(cell.length)))
    kinds = {key: f"{found.points:.1f}" for key, found in by_kind.items()}
    yield _grid(
        f"Recall of 100 by kind, {asked} questions a variant",
        kinds,
        variants,
        [*results.setting.kinds, _ALL],
    )
    points = {key: f"{found.points:.1f}" for key, found in by_length.items()}
    yield _grid("Recall of 100 by length in tokens", points, variants, lengths)
    likely = perplexity(cells, lambda cell: (cell.variant, str(cell.length)))
    if likely:
        texts = {key: f"{value:.3f}" for key, value in likely.items()}
        yield _grid("Perplexity of held-out prose by length", texts, variants, lengths)


def _grid(
    title: str,
    texts: Mapping[tuple[str, str], str],
    variants: Sequence[str],
    columns: Sequence[str],
) -> Grid:
    rows = [[v, *(texts.get((v, column), "-") for column in columns)] for v in variants]
    return Grid(title, list(columns), rows)
