"""Write what is computed of recipes: the `needs` of each, and their JSON Schema.

A test fails where they are not what this writes.
"""

from __future__ import annotations

import re
import sys

from dsa_plugin.recipes import FOLDER, load_recipe, recipe_names
from dsa_plugin.recipes.needs import compute_needs
from dsa_plugin.recipes.schema import json_schema

_NEEDS = re.compile(r"^needs:.*?\n(?=expected:)|^(?=expected:)", re.DOTALL | re.MULTILINE)


def main() -> None:
    (FOLDER / "recipe.schema.json").write_text(json_schema())
    for name in recipe_names():
        path = FOLDER / f"{name}.yaml"
        try:
            needs = compute_needs(load_recipe(name))
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        if needs is not None:
            lines = [f"  {key}: {value}\n" for key, value in needs.model_dump().items()]
            text = "".join(["needs:\n", *lines])
            path.write_text(_NEEDS.sub(text, path.read_text(), count=1))


if __name__ == "__main__":
    main()
