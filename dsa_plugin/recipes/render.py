"""A recipe as files for the host's own tools: its --config file, an env file, a manifest."""

from __future__ import annotations

from pathlib import Path

import yaml

from dsa_plugin.recipes.command import LAUNCHERS, Node, flags, node_flags, to_arguments
from dsa_plugin.recipes.kubernetes import manifests
from dsa_plugin.recipes.schema import Recipe


def render(
    recipe: Recipe, name: str, folder: Path, *, model: str | None = None, image: str | None = None
) -> str:
    """Write config.yaml and env, and lws.yaml for several nodes; return how to use them, in words.

    Args:
        model: a folder in place of the recipe's model.
        image: of the manifest's containers. The host's own lacks the plugin, so without one there
            is no manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, env = folder / "config.yaml", folder / "env"
    config.write_text(yaml.safe_dump(flags(recipe, model), sort_keys=False))
    env.write_text("".join(f"{key}={value}\n" for key, value in recipe.env.items()))
    serve = f"{' '.join(LAUNCHERS[recipe.host_name])} --config {config}"
    nodes = recipe.hardware.nodes
    lines = [f"wrote {config} and {env}. With them:", "", f"  set -a; . {env}; set +a"]
    if nodes == 1:
        return "\n".join([*lines, f"  {serve}"])
    ranks = [" ".join(to_arguments(node_flags(recipe, Node(r, "HEAD")))) for r in range(nodes)]
    lines += [f"  {serve} {arguments}    # node {rank}" for rank, arguments in enumerate(ranks)]
    lines += ["", "HEAD is the address of node 0."]
    if image is None:
        last = "For a Kubernetes manifest name an image that has the plugin, with --image."
    else:
        manifest = folder / "lws.yaml"
        objects = manifests(recipe, name, image, model=model)
        manifest.write_text(yaml.safe_dump_all(objects, sort_keys=False))
        last = f"For Kubernetes with LeaderWorkerSet: kubectl apply -f {manifest}"
    return "\n".join([*lines, last])
