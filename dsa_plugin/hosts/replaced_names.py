"""Names of a module replaced for a while, for hosts whose constructors take no class argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced_names(module: ModuleType, **names: Any) -> Iterator[None]:
    """Let `module` have these values under these names while the context is open.

    Raises:
        AttributeError: the module has no such name, so replacing it would change nothing.
    """
    originals = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)
