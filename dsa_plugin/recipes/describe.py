"""A recipe in words, for `dsa recipe show`."""

from __future__ import annotations

from dsa_plugin.recipes.command import Node, command
from dsa_plugin.recipes.launch import effective
from dsa_plugin.recipes.schema import Recipe


def describe(recipe: Recipe, name: str) -> str:
    """Several lines: what it is, what it needs, what was measured, how it is started."""
    machine = recipe.hardware
    nodes = f" on each of {machine.nodes} nodes" if machine.nodes > 1 else ""
    lines = [
        f"{name}: {recipe.model} ({recipe.weights} weights)",
        f"host      {recipe.host}" + (f", image {recipe.image}" if recipe.image else ""),
        f"hardware  {machine.count} x {machine.gpu}{nodes}",
    ]
    if recipe.needs:
        needs = recipe.needs
        lines.append(
            f"needs     {needs.weights_gb_per_gpu:.1f} GB of weights a GPU, leaves "
            f"{needs.kv_gb_per_gpu:.1f} GB to caches: {needs.concurrency} requests of "
            f"{needs.max_context:,} tokens (computed)"
        )
    if recipe.expected == "unmeasured":
        lines.append("expected  unmeasured")
    else:
        lines += [
            f"expected  {f.what}: {f.value:g} {f.unit} ({f.by}; {f.source})"
            for f in recipe.expected
        ]
    ranks = range(machine.nodes) if machine.nodes > 1 else [None]
    for rank in ranks:
        node = None if rank is None else Node(rank, "HEAD")
        prefix = "" if rank is None else f"node {rank}: "
        lines += ["", prefix + effective(command(recipe, node=node), recipe.env)]
    return "\n".join([*lines, "", recipe.notes.rstrip()])
