"""`dsa serve`: run a recipe's server."""

import sys
from typing import Annotated

import typer

from dsa_plugin.cli.recipe import Model, RecipeName


def serve(
    name: RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]...", help="The host's own flags; they win."),
    ] = None,
    model: Model = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Of several nodes, which this is, from 0.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Address of the node of rank 0.")] = None,
) -> None:
    """Serve a recipe in the foreground: dsa serve RECIPE [-- FLAGS OF THE HOST].

    Prints the host's command line and becomes it.
    """
    from dsa_plugin.recipes import load_recipe
    from dsa_plugin.recipes.command import Node, command
    from dsa_plugin.recipes.launch import (
        check_gpus,
        check_host,
        check_model,
        effective,
        environment,
        replace_process,
    )

    recipe = load_recipe(name)
    check_host(recipe)
    check_model(model or recipe.model)
    if (node_rank is None) != (head is None):
        raise ValueError("--node-rank and --head go together")
    node = None if node_rank is None or head is None else Node(node_rank, head)
    line = command(recipe, model=model, node=node, overrides=overrides or ())
    if note := check_gpus(recipe):
        print(f"Note: {note}", file=sys.stderr)
    env = environment(recipe)
    print(effective(line, env), flush=True)
    replace_process(line, env)
