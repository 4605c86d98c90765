"""The `dsa` command. One module a subcommand: it parses and prints; the work is done elsewhere.

A subcommand is a function of its own name, added below by `app.command()(plan.plan)`, or, where it
has subcommands itself, a typer app: `app.add_typer(recipe.app, name="recipe")`.

`dsa --help` imports every subcommand's module, so these import typer alone at their top, and
what is slow (rich, pydantic, huggingface_hub, matplotlib, torch) inside their functions. Bad input
is a ValueError or an OSError, as everywhere in this package.
"""

import sys
from typing import Annotated

import typer

from dsa_plugin import __version__
from dsa_plugin.cli import (
    chat,
    convert,
    doctor,
    evaluate,
    explain,
    generate,
    plan,
    recipe,
    serve,
    train,
    verify,
)

# Without rich's boxes: errors stay one line that can be searched for, and --help is quick.
app = typer.Typer(
    name="dsa",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run `dsa`; exit with 2 and one line on stderr for bad input."""
    try:
        app(prog_name="dsa")
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsa-plugin {__version__}")
        raise typer.Exit


@app.callback()
def dsa(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """DeepSeek Sparse Attention for vLLM and SGLang."""


app.command()(plan.plan)
app.command()(convert.convert)
app.command()(doctor.doctor)
app.command("eval")(evaluate.evaluate)
app.command()(explain.explain)
app.add_typer(recipe.app, name="recipe")
app.command()(serve.serve)
app.command()(chat.chat)
app.command()(generate.generate)
app.add_typer(train.app, name="train")
app.command()(verify.verify)
