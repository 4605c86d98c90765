"""`dsa train`: the demo model from nothing, or an indexer for a checkpoint."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsa_plugin.training.run import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Train with DeepSeek Sparse Attention; needs `pip install dsa-plugin[train]`.",
)

Dtype = Literal["fp32", "bf16"]
Out = Annotated[Path, typer.Option(help="Folder of the run; one that was cut short goes on.")]
Device = Annotated[str, typer.Option(help="cpu, or a GPU such as cuda:0.")]
Precision = Annotated[Dtype, typer.Option(help="Of matrix products; weights are fp32.")]
Threads = Annotated[int | None, typer.Option(help="Of the CPU; all of them unless given.")]
SaveSeconds = Annotated[float, typer.Option(help="At most so long between two saves.")]
Model = Annotated[Path, typer.Option(help="Folder of a DeepSeek-V3 or V3.2 checkpoint.")]
Data = Annotated[list[Path], typer.Option(help=".txt, or .jsonl with a key text; repeatable.")]
Tokens = Annotated[int, typer.Option(help="Tokens a window; more than index_topk to select.")]
Batch = Annotated[int, typer.Option(help="Windows a step.")]
Steps = Annotated[int, typer.Option(help="Steps of the stage.")]
Rate = Annotated[float, typer.Option(help="At its height.")]
Seed = Annotated[int, typer.Option(help="Of the windows and of a new indexer.")]


@app.command()
def demo(
    out: Out,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON of another recipe than the demo model's.")
    ] = None,
    device: Device = "cpu",
    dtype: Precision = "fp32",
    threads: Threads = None,
    save_seconds: SaveSeconds = 60.0,
) -> None:
    """Train the demo model through all stages.

    After each, OUT has a folder of its name with a checkpoint that hosts serve: pretrain, warmup
    and sparse.
    """
    from dsa_plugin.training.curves import draw_curves
    from dsa_plugin.training.lessons import total_steps
    from dsa_plugin.training.recipe import demo_recipe, read_recipe, run_recipe

    path = recipe or demo_recipe()
    steps = sum(total_steps(lessons) for lessons in read_recipe(path).stages.values())
    with _settings(out, device, dtype, threads, save_seconds, 0, steps) as settings:
        run_recipe(path, settings)
    draw_curves(out, out / "curves.png")


@app.command()
def measure(
    model: Annotated[Path, typer.Option(help="Checkpoint that `dsa train demo` exported.")],
    length: Annotated[list[int], typer.Option(help="Tokens of a text; repeatable.")],
    tokens: Annotated[int, typer.Option(help="Of all texts of a length together.")] = 32768,
) -> None:
    """Print a JSON line a length: exact answers, perplexity, KL and recall of the indexer."""
    import json

    from dsa_plugin.training.measure import measure

    for measured in measure(model, length, tokens):
        print(json.dumps(measured), flush=True)


@app.command()
def pretrain(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens = 4096,
    batch: Batch = 1,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-4,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Go on training MODEL on DATA with dense attention."""
    lesson = (tokens, batch, steps, learning_rate)
    _adapt("pretrain", model, data, out, lesson, (seed, device, dtype), (64, 2048))


@app.command()
def warmup(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens = 4096,
    batch: Batch = 1,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-3,
    index_heads: Annotated[int, typer.Option(help="Of an indexer that is added.")] = 64,
    index_topk: Annotated[int, typer.Option(help="Keys it will select.")] = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Teach an indexer what MODEL attends to; a model without one gets one. Nothing else moves."""
    lesson = (tokens, batch, steps, learning_rate)
    sizes = (index_heads, index_topk)
    _adapt("warmup", model, data, out, lesson, (seed, device, dtype), sizes)


@app.command()
def sparse(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens = 4096,
    batch: Batch = 1,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-5,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Train MODEL and its indexer on DATA with the top-k selected."""
    lesson = (tokens, batch, steps, learning_rate)
    _adapt("sparse", model, data, out, lesson, (seed, device, dtype), (64, 2048))


def _adapt(
    stage: Literal["pretrain", "warmup", "sparse"],
    model: Path,
    data: list[Path],
    out: Path,
    lesson: tuple[int, int, int, float],
    run: tuple[int, str, Dtype],
    indexer: tuple[int, int],
) -> None:
    from dsa_plugin.training.adapt import Adaptation, adapt
    from dsa_plugin.training.checkpoint import IndexerSizes
    from dsa_plugin.training.curves import draw_curves
    from dsa_plugin.training.lessons import Lesson

    work = Adaptation(stage, model, data, Lesson(*lesson), IndexerSizes(*indexer))
    seed, device, dtype = run
    with _settings(out, device, dtype, None, 60.0, seed, lesson[2]) as settings:
        folder = adapt(work, settings)
    draw_curves(out, out / "curves.png")
    print(f"wrote {folder}")


@contextmanager
def _settings(
    out: Path,
    device: str,
    dtype: Dtype,
    threads: int | None,
    save_seconds: float,
    seed: int,
    steps: int,
) -> Iterator[Settings]:
    """The run's settings, with a progress bar of `steps` steps as their report."""
    import torch
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dsa_plugin.training.lessons import Lesson
    from dsa_plugin.training.run import Settings
    from dsa_plugin.training.stages import Figures
    from dsa_plugin.training.state import Place

    if threads is not None:
        torch.set_num_threads(threads)
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*Progress.get_default_columns()[1:2], *columns) as progress:
        task = progress.add_task("", total=steps)

        def report(place: Place, lesson: Lesson, figures: Figures) -> None:
            told = " ".join(f"{name} {value:.3g}" for name, value in figures.items())
            text = f"{place.stage} at {lesson.tokens} tokens: {told}"
            progress.update(task, advance=1, description=text)

        yield Settings(out, torch.device(device), dtype, seed, save_seconds, report=report)
