"""A checkpoint's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in a folder says.

    Raises:
        ValueError: there is none, or it holds no JSON object.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json; name the folder that holds a checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return config
