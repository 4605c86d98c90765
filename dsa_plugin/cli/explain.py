"""`dsa explain`: which tokens each layer's indexer chose to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsa_plugin.explain.selections import Selections


def explain(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Folder of a DSA checkpoint.", exists=True, file_okay=False),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to read.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with the text to read, UTF-8.", exists=True, dir_okay=False),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate after it.")] = 16,
    out: Annotated[
        Path, typer.Option(help="The page: a file, or a folder that gets explain.html.")
    ] = Path("explain.html"),
    figure: Annotated[Path | None, typer.Option(help="Draw layers x positions into it.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to show, such as 0,2,5-7: all of them.")
    ] = None,
    mark: Annotated[
        str | None, typer.Option(help="Passage to mark, and to count how much of it was read.")
    ] = None,
) -> None:
    """Run a prompt through CHECKPOINT and show what each layer's indexer chose.

    By transformers, greedily, on a GPU that PyTorch sees, else in fp32 on the CPU. The page needs
    no network. It keeps the newest rows where all of them are too many.
    """
    import torch

    from dsa_plugin.cli.numbers import layer_list
    from dsa_plugin.explain.checkpoint import load_model
    from dsa_plugin.explain.page import render
    from dsa_plugin.explain.pieces import find_passage, token_pieces
    from dsa_plugin.in_transformers.checkpoint import load_tokenizer

    text = _text(prompt, prompt_file)
    chosen = None if layers is None else layer_list(layers)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(text)["input_ids"]
    marked = [] if mark is None else find_passage(token_pieces(tokenizer, ids), mark)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, device, len(ids) + new_tokens)
    selections = _record(model, ids, new_tokens, chosen)

    title = f"What the indexers of {checkpoint.resolve().name} chose"
    pieces = token_pieces(tokenizer, selections.tokens)
    page = out / "explain.html" if out.is_dir() else out
    page.write_text(render(selections, pieces, title, marked), encoding="utf-8")
    if figure is not None:
        from dsa_plugin.explain.figure import draw

        draw(selections, figure, title, marked)
    print(f"generated: {''.join(pieces[len(ids) :])!r}")
    for layer, share in selections.shares_read(marked).items() if marked else ():
        print(f"layer {layer}: the rows that chose it read {share:.0%} of the marked tokens")
    print(*(f"wrote {path}" for path in (page, figure) if path is not None), sep="\n")


def _record(model: Any, ids: list[int], new_tokens: int, layers: list[int] | None) -> Selections:
    from rich.console import Console
    from rich.progress import Progress

    from dsa_plugin.explain.selections import record_selections

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=len(ids) + new_tokens)
        return record_selections(
            model,
            ids,
            new_tokens=new_tokens,
            layers=layers,
            progress=lambda done: bar.update(task, completed=done),
        )


def _text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give one of --prompt TEXT and --prompt-file FILE")
    if prompt_file is None:
        return prompt or ""
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 ({error}); convert it") from None
