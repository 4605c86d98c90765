"""Whether recipes hold: their keys by the schema, their flags by the host's own parser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsa_plugin.probe.ask import Question, ask
from dsa_plugin.recipes import load_recipe
from dsa_plugin.recipes.command import LAUNCHERS, Node, command
from dsa_plugin.recipes.launch import installed_version, takes_version
from dsa_plugin.recipes.schema import HostName, Recipe


@dataclass(frozen=True)
class Finding:
    """Of one recipe. "keys": only the schema was asked, since no host that it is for is here."""

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
        findings |= _check_flags(host, recipes)
    return [findings[name] for name in names]


def host_arguments(recipe: Recipe, *, model: str | None = None) -> list[str]:
    """What the host's parser gets, on the last node where there are several."""
    nodes = recipe.hardware.nodes
    node = Node(nodes - 1, "127.0.0.1") if nodes > 1 else None
    return command(recipe, model=model, node=node)[len(LAUNCHERS[recipe.host_name]) :]


def _check_flags(host: HostName, recipes: dict[str, Recipe]) -> dict[str, Finding]:
    version = installed_version(host)
    here = f"{host} {version}" if version else f"{host} is not installed"
    findings = {
        name: Finding(name, "keys", f"flags not checked: for {recipe.host}, and here {here}")
        for name, recipe in recipes.items()
        if not takes_version(recipe, version)
    }
    asked = [name for name in recipes if name not in findings]
    questions = [Question(host_arguments(recipes[name]), env=recipes[name].env) for name in asked]
    answers = ask(sys.executable, host, questions) if questions else []
    for name, answer in zip(asked, answers, strict=True):
        findings[name] = Finding(name, "FAIL" if answer.error else "ok", answer.error or "")
    return findings
