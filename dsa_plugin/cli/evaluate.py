"""`dsa eval`: does a model recall what a long text says, whatever chooses its tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dsa_plugin.evaluation.exams import Paper
    from dsa_plugin.evaluation.results import Results, Setting
    from dsa_plugin.evaluation.sources import Source
    from dsa_plugin.evaluation.variants import Variant

Through = Literal["transformers", "vllm", "sglang"]
Dtype = Literal["auto", "float32", "bfloat16"]
_NAMES = "Names with commas between"


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a checkpoint and its tokenizer.")
    ] = None,
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]...", help="The host's own; they win.")
    ] = None,
    through: Annotated[
        Through, typer.Option(help="What runs it: transformers, or a server started here.")
    ] = "transformers",
    url: Annotated[
        str | None, typer.Option(help="A running server's, of OpenAI's API, in place of all that.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As the server of --url names it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the server of --url.")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help=f"{_NAMES}; all that --through has. With --url: the one it serves."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of text and question, such as 2048 or 2K,16K.")
    ] = "1K,2K,4K,8K,16K",
    kinds: Annotated[str | None, typer.Option(help=f"Of questions. {_NAMES}; all.")] = None,
    questions: Annotated[int, typer.Option(help="Of each kind at each length.")] = 20,
    seed: Annotated[int, typer.Option(help="Of texts and questions.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="Of weights and caches; auto: the checkpoint's.")
    ] = "auto",
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"], typer.Option(help="A host's; fp8: of latents and index keys.")
    ] = "auto",
    max_gen_toks: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 48,
    num_concurrent: Annotated[int, typer.Option(help="Questions a server is asked at once.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds a server has for one answer.")] = 600,
    perplexity: Annotated[bool, typer.Option(help="Of held-out prose, too.")] = True,
    out: Annotated[Path, typer.Option(help="JSON of all answers; grows as they come.")] = Path(
        "dsa_eval.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --out ends.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw recall by length and depth into this PNG.")
    ] = None,
    max_recall_loss: Annotated[
        float | None, typer.Option(help="Points of 100 that dsa may lose against dense, by kind.")
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(help="Points of 100 that dsa needs, by kind and length.")
    ] = None,
    same_as: Annotated[
        Path | None, typer.Option(help="Results whose answers these must be, word for word.")
    ] = None,
) -> None:
    """Ask a model about long texts with each way of choosing tokens; recall and perplexity.

    Exits with 1 where a gate (--max-recall-loss, --min-recall, --same-as) fails, and with 2 where
    the command is wrong or a server fails; --resume then goes on.
    """
    from dsa_plugin.cli.evaluate_tables import show
    from dsa_plugin.cli.model_config import find_model
    from dsa_plugin.cli.numbers import length_list
    from dsa_plugin.evaluation.completions import Patience
    from dsa_plugin.evaluation.exams import papers
    from dsa_plugin.evaluation.gates import Gates
    from dsa_plugin.evaluation.results import Results, Setting
    from dsa_plugin.evaluation.sources import running, started
    from dsa_plugin.training.facts import KINDS

    if (checkpoint is None) == (url is None):
        raise ValueError("name either a checkpoint's folder or a server's --url")
    if flags and (url or through == "transformers"):
        raise ValueError(f"{' '.join(flags)}: flags after -- are for --through vllm or sglang")
    if num_concurrent < 1 or timeout <= 0 or max_gen_toks < 1:
        raise ValueError("--num-concurrent, --timeout and --max-gen-toks have to be above 0")
    asked = _names(kinds) if kinds else list(KINDS)
    exam = list(papers(seed, length_list(lengths), asked, questions))
    setting = Setting(
        model=str(checkpoint or model or url),
        through=url or through,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        seed=seed,
        kinds=asked,
        max_gen_toks=max_gen_toks,
        flags=flags or [],
    )
    gates = Gates(max_recall_loss, min_recall, Results.load(same_as) if same_as else None)
    results = _begin(out, setting, resume=resume)
    patience = Patience(timeout=timeout, concurrency=num_concurrent)
    if url:
        source = running(url, model, api_key, patience)
        chosen = source.choose(_names(variants) if variants else ["dsa"])
    else:
        longest = max(paper.length for paper in exam)
        source = started(setting, find_model(str(checkpoint)), longest, patience)
        chosen = source.choose(_names(variants) if variants else None)
    if url and len(chosen) > 1:
        raise ValueError("--variants: a server serves one; name it, and ask another for the next")
    gates.check(setting, [(v.name, p.length, p.document) for v in chosen for p in exam])
    results = _run(source, chosen, exam, results, out, perplexity=perplexity)
    show(results)
    if plot:
        from dsa_plugin.cli.evaluate_figure import draw

        draw(results, plot)
    failed = list(gates.failures(results))
    for line in failed:
        print(f"FAIL {line}")
    raise typer.Exit(bool(failed))


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _begin(out: Path, setting: Setting, *, resume: bool) -> Results:
    """The results so far: those of the file with --resume, else none."""
    from dsa_plugin.evaluation.results import Results

    if not out.exists():
        return Results(setting=setting, cells=[])
    if not resume:
        raise ValueError(f"{out} is there already; --resume goes on with it, or name another --out")
    results = Results.load(out)
    results.check_continues(setting)
    return results


def _run(
    source: Source,
    variants: Sequence[Variant],
    exam: Sequence[Paper],
    results: Results,
    out: Path,
    *,
    perplexity: bool,
) -> Results:
    """Add each cell that is missing to the results and their file, with progress on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from dsa_plugin.evaluation.run import cells

    done = {cell.key for cell in results.cells}
    work = [
        (variant, [p for p in exam if (variant.name, p.length, p.document) not in done])
        for variant in variants
    ]
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = sum(len(papers) for _, papers in work)
        task = progress.add_task("texts", total=total)
        try:
            for cell in cells(
                source.under, work, results.setting.max_gen_toks, perplexity=perplexity
            ):
                results = results.with_cell(cell)
                results.save(out)
                at = f"{cell.variant} at {cell.length}"
                progress.update(task, advance=1, description=at)
        except (OSError, ValueError):
            kept = len(results.cells)
            print(f"{out} holds {kept} texts' answers; --resume goes on with it", file=sys.stderr)
            raise
    return results
