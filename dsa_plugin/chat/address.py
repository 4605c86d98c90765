"""Where a server is: by its URL, or by the recipe that `dsa serve` starts it from."""

from __future__ import annotations

from dsa_plugin.recipes import load_recipe
from dsa_plugin.recipes.command import PORTS

_EVERYWHERE = ("0.0.0.0", "::")  # addresses to listen at, none to ask


def server_url(name: str) -> str:
    """The URL of a server, without /v1.

    Args:
        name: a URL, host:port, or a recipe: its own address then, on this machine.

    Raises:
        ValueError: neither a URL nor a recipe.
        FileNotFoundError: no file of a recipe's path.
    """
    if "://" in name:
        if not name.startswith(("http://", "https://")):
            raise ValueError(f"{name}: allowed are http:// and https://")
        return name.rstrip("/").removesuffix("/v1")
    if ":" in name:
        return server_url(f"http://{name}")
    recipe = load_recipe(name)
    host = str(recipe.args.get("host", "127.0.0.1"))
    port = recipe.args.get("port", PORTS[recipe.host_name])
    return f"http://{'127.0.0.1' if host in _EVERYWHERE else host}:{port}"
