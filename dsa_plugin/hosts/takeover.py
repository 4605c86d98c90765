"""Who serves the DSA models in this process, the plugin or its host: what `DSA_PLUGIN` means."""

from __future__ import annotations

import os
from collections.abc import Callable

from dsa_plugin import env


def decide(host: str, native_path: Callable[[], str | None]) -> tuple[bool, str]:
    """Whether the plugin takes the DSA models, and why.

    A bad `DSA_PLUGIN` counts as taking over: the host's config hook then names it to a user of a
    DSA model.

    Args:
        host: the host's name, for the reason.
        native_path: the host's own DSA path on this device, in words; None where it has none.
            Asked only where the answer matters.
    """
    try:
        mode = env.read(env.PLUGIN, os.environ)
    except ValueError as error:
        return True, str(error)
    if mode != "auto":
        return mode == "on", f"DSA_PLUGIN={mode}"
    native = native_path()
    if native is None:
        return True, f"{host} has no native path on this device (DSA_PLUGIN=auto)"
    return False, f"{native} (DSA_PLUGIN=auto; DSA_PLUGIN=on takes over)"
