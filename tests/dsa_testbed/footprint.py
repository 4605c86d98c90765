"""What the plugin has left in a host's process that serves another model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

_LOGGERS = ("dsa_plugin", "dsa_kernels", "vllm.dsa_plugin")


class Said(logging.Handler):
    """Every line of ours from here on, of any level."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG)
            logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def replaced(package: str) -> list[str]:
    """What of a package's loaded modules, and of their classes, is ours."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != package or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if _is_ours(value):
                found.append(f"{name}.{attribute}")
            elif isinstance(value, type) and value.__module__ == name:
                found += [f"{name}.{attribute}.{inner}" for inner in _of_class(value)]
    return found


def classes(model: Any) -> list[str]:
    """Of a model's layers, each once."""
    types = {type(layer) for layer in model.modules()}
    return sorted(f"{layer.__module__}.{layer.__qualname__}" for layer in types)


def _of_class(cls: type) -> Iterator[str]:
    for name, value in list(vars(cls).items()):
        if _is_ours(getattr(value, "__func__", value)):
            yield name


def _is_ours(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return "/dsa_plugin/" in value.__code__.co_filename  # whatever name functools.wraps gave
    return isinstance(value, type) and value.__module__.startswith("dsa_plugin.")
