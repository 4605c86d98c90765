"""Recipes: deployments that are known, one a file, recipes/<model>/<host>-<hardware>.yaml.

schema.py      what a recipe says
command.py     the host's command line, config file and environment from it
kubernetes.py  a recipe of several nodes as a LeaderWorkerSet
needs.py       its sizes, by `dsa_plugin.planning`
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import yaml

from dsa_plugin.recipes.schema import Recipe, parse_recipe


def _folder() -> Path:
    """`recipes/` beside the package where it is run from its source, else as pip installed it.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    source = Path(__file__).resolve().parents[2] / "recipes"
    if (source / "recipe.schema.json").is_file():
        return source
    spec = find_spec("dsa_recipes")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the recipes that come with dsa-plugin are neither at {source} nor installed as "
            "dsa_recipes; pip install dsa-plugin again"
        )
    return Path(spec.submodule_search_locations[0])


FOLDER = _folder()


def recipe_names() -> list[str]:
    """Every recipe that comes with the plugin, as <model>/<host>-<hardware>."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a file that ends in .yaml.

    Raises:
        ValueError: no recipe of that name, naming the nearest; or a bad file.
        FileNotFoundError: no file of that path.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in recipe_names():
        path = FOLDER / f"{name}.yaml"
    else:
        near = get_close_matches(name, recipe_names(), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no recipe {name!r}; did you mean {near}? `dsa recipe list` names all; a "
            "file of your own is named with its ending, .yaml"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {path}; a recipe that comes with the plugin is named without an "
            "ending, and `dsa recipe list` names them all"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return parse_recipe(data, str(path))
