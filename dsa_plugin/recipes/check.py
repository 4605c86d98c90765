"""Whether recipes hold: their keys by the schema, their flags by the host's own parser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsa_plugin.ask_host import Question, ask
from dsa_plugin.recipes import load_recipe
from dsa_plugin.recipes.command import LAUNCHERS, Node, command
from dsa_plugin.recipes.launch import installed_version
from dsa_plugin.recipes.schema import HostName, Recipe


@dataclass(frozen=True)
class Finding:
    """Of one recipe. "keys": only the schema was asked, since its host is not installed here."""

    name: str
    verdict: Literal["ok", "keys", "FAIL"]
    text: str = ""


def check_recipes(names: Sequence[str]) -> list[Finding]:
    """One finding a recipe, in order."""
    findings: dict[str, Finding] = {}
    of_host: dict[HostName, dict[str, Recipe]] = {}
    for name in names:
        try:
            recipe = load_recipe(name)
        except (ValueError, OSError) as error:
            findings[name] = Finding(name, "FAIL", str(error))
            continue
        of_host.setdefault(recipe.host_name, {})[name] = recipe
    for host, recipes in of_host.items():
        findings |= _ask_parser(host, recipes)
    return [findings[name] for name in names]


def host_arguments(recipe: Recipe, *, model: str | None = None) -> list[str]:
    """What the host's parser gets, on the last node where there are several."""
    nodes = recipe.hardware.nodes
    node = Node(nodes - 1, "127.0.0.1") if nodes > 1 else None
    return command(recipe, model=model, node=node)[len(LAUNCHERS[recipe.host_name]) :]


def _ask_parser(host: HostName, recipes: dict[str, Recipe]) -> dict[str, Finding]:
    version = installed_version(host)
    if version is None:
        text = f"{host} is not installed here, so its flags are unchecked"
        return {name: Finding(name, "keys", text) for name in recipes}
    questions = [Question(host_arguments(recipe), env=recipe.env) for recipe in recipes.values()]
    answers = ask(sys.executable, host, questions)
    return {
        name: Finding(name, "FAIL", answer.error) if answer.error else Finding(name, "ok")
        for name, answer in zip(recipes, answers, strict=True)
    }
