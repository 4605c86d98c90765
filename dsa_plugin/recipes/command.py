"""The host's command line, config file and environment of a recipe.

Nothing here imports a host: flags are the host's own words, and `dsa_plugin.hosts.<host>.resolve`
asks the host whether it knows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsa_plugin.recipes.schema import HostName, Recipe

LAUNCHERS: dict[HostName, list[str]] = {
    "vllm": ["vllm", "serve"],
    "sglang": ["python", "-m", "sglang.launch_server"],
}
_MODEL_FLAG: dict[HostName, str] = {"vllm": "model", "sglang": "model-path"}
PORTS: dict[HostName, int] = {"vllm": 8000, "sglang": 30000}
"""Where the host serves HTTP if nothing else is said."""
_RENDEZVOUS_PORT = 20000


@dataclass(frozen=True)
class Node:
    """One machine of a deployment on several.

    Attributes:
        rank: its number, from 0; text where something else fills it in.
        head: address of the machine of rank 0.
    """

    rank: int | str
    head: str


def flags(recipe: Recipe, model: str | None = None) -> dict[str, Any]:
    """The host's flags, without dashes, as its `--config` file takes them.

    Args:
        model: instead of the recipe's, e.g. the folder of a download.
    """
    found = {_MODEL_FLAG[recipe.host_name]: model or recipe.model, **recipe.args}
    if recipe.hardware.nodes > 1:
        found["nnodes"] = recipe.hardware.nodes
    return found


def node_flags(recipe: Recipe, node: Node) -> dict[str, Any]:
    """What differs from node to node."""
    if recipe.host_name == "sglang":
        return {"node-rank": node.rank, "dist-init-addr": f"{node.head}:{_RENDEZVOUS_PORT}"}
    found: dict[str, Any] = {"node-rank": node.rank, "master-addr": node.head}
    if node.rank != 0:
        found["headless"] = True
    return found


def to_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments += [f"--{name}"]
        else:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def command(
    recipe: Recipe,
    *,
    model: str | None = None,
    node: Node | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """The command that serves the recipe; hosts let the last of a repeated flag win.

    Raises:
        ValueError: several nodes, and not said which this is; or the other way round.
    """
    check_node(recipe, node)
    found = flags(recipe, model) | (node_flags(recipe, node) if node else {})
    # `vllm serve` takes its model by place, and --model in a config file alone.
    place = [found.pop("model")] if recipe.host_name == "vllm" else []
    return [*LAUNCHERS[recipe.host_name], *place, *to_arguments(found), *overrides]


def check_node(recipe: Recipe, node: Node | None) -> None:
    """Raises ValueError unless a node is named if and only if the recipe has several."""
    nodes = recipe.hardware.nodes
    if nodes > 1 and node is None:
        raise ValueError(
            f"this recipe is for {nodes} nodes: run it on each, with --node-rank 0 to {nodes - 1} "
            "and --head ADDRESS, the address of the node of rank 0"
        )
    if nodes == 1 and node is not None:
        raise ValueError("--node-rank and --head are for recipes of several nodes; this has one")
    if node is not None and isinstance(node.rank, int) and not 0 <= node.rank < nodes:
        raise ValueError(f"--node-rank {node.rank}; allowed: 0 to {nodes - 1}")
