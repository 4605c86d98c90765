"""`dsa recipe`: the deployments that are known."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Known deployments: list, show, check, render.")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name of `dsa recipe list`, or a .yaml file.")
]
Model = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Checkpoint to use in place of the recipe's.")
]


@app.command("list")
def list_recipes() -> None:
    """Name every recipe, with its hardware and sizes."""
    from dsa_plugin.recipes import load_recipe, recipe_names

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        recipe = load_recipe(name)
        machine, needs = recipe.hardware, recipe.needs
        nodes = f"{machine.nodes} x " if machine.nodes > 1 else ""
        sizes = f"{needs.concurrency} x {needs.max_context:,} tokens" if needs else ""
        print(f"{name:{width}}  {f'{nodes}{machine.count} {machine.gpu}':18}  {sizes}".rstrip())


@app.command()
def show(name: RecipeName) -> None:
    """Print a recipe's sizes, command and notes."""
    from dsa_plugin.recipes import load_recipe
    from dsa_plugin.recipes.describe import describe

    print(describe(load_recipe(name), name))


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Names or .yaml files; none: all of them."),
    ] = None,
) -> None:
    """Check recipes: their keys, and their flags by the parser of the host installed here."""
    from dsa_plugin.recipes import recipe_names
    from dsa_plugin.recipes.check import check_recipes

    findings = check_recipes(names or recipe_names())
    for finding in findings:
        print(f"{finding.verdict:5} {finding.name}  {finding.text}".rstrip())
    raise typer.Exit(any(finding.verdict == "FAIL" for finding in findings))


@app.command()
def render(
    name: RecipeName,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    model: Model = None,
    image: Annotated[
        str | None, typer.Option(help="Image of the manifest's containers; has the plugin in it.")
    ] = None,
) -> None:
    """Write the file that the host's --config takes, an env file, and with --image a manifest."""
    from dsa_plugin.recipes import load_recipe
    from dsa_plugin.recipes.render import render as write

    print(write(load_recipe(name), name, folder, model=model, image=image), file=sys.stdout)
