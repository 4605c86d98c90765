"""A host's compiled modules, none of which is for a machine that this process only pretends."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any


def stand_in_for_extensions(*packages: str) -> None:
    """Let each compiled module of these packages be an empty one; cannot be undone.

    What: their loader makes the module and runs nothing. Why: a host may have a library for each
    kind of CPU and GPU, with the same operators in each; torch ends the process that loads two.
    What was loaded before stays.
    """
    loader: Any = ExtensionFileLoader
    create, execute = loader.create_module, loader.exec_module

    def is_theirs(name: str) -> bool:
        return name.partition(".")[0] in packages

    def create_module(self: ExtensionFileLoader, spec: ModuleSpec) -> ModuleType | None:
        return None if is_theirs(spec.name) else create(self, spec)  # None: an empty one

    def exec_module(self: ExtensionFileLoader, module: ModuleType) -> None:
        if not is_theirs(module.__name__):
            execute(self, module)

    loader.create_module, loader.exec_module = create_module, exec_module
