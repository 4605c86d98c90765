"""The files of `dsa recipe render`, read by each host's own `--config` reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_plugin.recipes import load_recipe, recipe_names
from dsa_plugin.recipes.check import host_arguments
from dsa_plugin.recipes.command import Node, node_flags, to_arguments
from dsa_plugin.recipes.render import render
from dsa_plugin.recipes.schema import HostName, Recipe
from dsa_testbed.host_arguments import Parsed, parse
from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving

RECIPES = {name: load_recipe(name) for name in recipe_names()}
PYTHON: dict[HostName, Callable[[], str]] = {
    "vllm": lambda: sys.executable,
    "sglang": lambda: str(sglang_python()),
}
# No recipe has a flag whose value is a mapping; both hosts have some.
MAPPING: dict[HostName, dict[str, object]] = {
    "vllm": {"speculative-config": {"method": "mtp", "num_speculative_tokens": 2}},
    "sglang": {"json-model-override-args": {"index_topk": 1024}},
}
MISSPELT = "tensor-paralel-size"


def config_line(recipe: Recipe, folder: Path) -> list[str]:
    """What the host is told beside the rendered file, on the last node where there are several."""
    render(recipe, "test", folder)
    last = recipe.hardware.nodes - 1
    node = to_arguments(node_flags(recipe, Node(last, "127.0.0.1"))) if last else []
    return ["--config", str(folder / "config.yaml"), *node]


def with_args(recipe: Recipe, **more: object) -> Recipe:
    return recipe.model_copy(update={"args": {**recipe.args, **more}})


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HostName], dict[str, Parsed]]:
    """By host: what it reads from each recipe's file, and after "line of" from its command line."""
    root = tmp_path_factory.mktemp("rendered")
    of_host: dict[HostName, dict[str, Parsed]] = {}

    def ask(host: HostName) -> dict[str, Parsed]:
        demo = RECIPES[f"demo/{host}-cpu"]
        recipes = {name: recipe for name, recipe in RECIPES.items() if recipe.host_name == host}
        recipes["mapping"] = with_args(demo, **MAPPING[host])
        recipes["misspelt"] = with_args(demo, **{MISSPELT: 8})
        files = {name: config_line(recipe, root / name) for name, recipe in recipes.items()}
        lines = {f"line of {name}": host_arguments(recipe) for name, recipe in recipes.items()}
        asked = files | lines
        return dict(zip(asked, parse(PYTHON[host](), host, list(asked.values())), strict=True))

    def answers(host: HostName) -> dict[str, Parsed]:
        if host not in of_host:
            of_host[host] = ask(host)
        return of_host[host]

    return answers


def same(parsed: dict[str, Parsed], name: str) -> dict[str, object]:
    """What the host reads from a recipe's file, which is what it reads from its command line."""
    read = parsed[name]
    assert isinstance(read, dict), read
    assert read == parsed[f"line of {name}"]
    return read


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_says_what_the_command_line_does(
    name: str, parsed: Callable[[HostName], dict[str, Parsed]]
) -> None:
    recipe = RECIPES[name]
    read = same(parsed(recipe.host_name), name)
    assert recipe.model in (read.get("model"), read.get("model_path"))


@pytest.mark.parametrize("host", PYTHON)
def test_a_mapping_survives(
    host: HostName, parsed: Callable[[HostName], dict[str, Parsed]]
) -> None:
    read = same(parsed(host), "mapping")
    [(flag, value)] = MAPPING[host].items()
    assert str(read[flag.replace("-", "_")]).replace('"', "'") == str(value)


@pytest.mark.parametrize("host", PYTHON)
def test_a_misspelt_flag_is_refused(
    host: HostName, parsed: Callable[[HostName], dict[str, Parsed]]
) -> None:
    assert f"unrecognized arguments: --{MISSPELT}" in str(parsed(host)["misspelt"])
