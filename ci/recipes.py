"""Write what is computed of recipes: the `needs` of each, their JSON Schema, and the list of them.

A test fails where they are not what this writes.
"""

from __future__ import annotations

import re
import sys

from dsa_plugin.recipes import FOLDER, load_recipe, recipe_names
from dsa_plugin.recipes.needs import compute_needs
from dsa_plugin.recipes.schema import Recipe, json_schema

README = FOLDER / "README.md"
START, END = "<!-- Written by ci/recipes -->\n", "<!-- until here -->\n"
_NEEDS = re.compile(r"^needs:.*?\n(?=expected:)|^(?=expected:)", re.DOTALL | re.MULTILINE)


def with_table(readme: str) -> str:
    """recipes/README.md with a table of every recipe: a row for each machine and model."""
    machines: dict[str, dict[str, list[str]]] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        row = f"{_machine(recipe)} | {name.partition('/')[0]}"
        links = machines.setdefault(row, {"vllm": [], "sglang": []})
        links[recipe.host_name].append(_link(name, recipe))
    rows = [
        f"| {row} | {' | '.join('<br>'.join(cell) for cell in links.values())} |\n"
        for row, links in sorted(machines.items())
    ]
    table = "".join(["| You have | Model | vLLM | SGLang |\n", "|---|---|---|---|\n", *rows])
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table}{END}{after}"


def _machine(recipe: Recipe) -> str:
    machine = recipe.hardware
    if machine.gpu == "cpu":
        return "no GPU"
    each = f"{machine.count} x {machine.gpu}"
    return each if machine.nodes == 1 else f"{machine.nodes} nodes, each {each}"


def _link(name: str, recipe: Recipe) -> str:
    """To the file, and what fits."""
    needs = recipe.needs
    fits = f": {needs.concurrency} x {needs.max_context:,}" if needs else ""
    return f"[{name.partition('/')[2]}]({name}.yaml){fits}"


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
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
