"""The value of every name of the stand-in."""

from __future__ import annotations

from typing import Any


class _AnyName(type):
    """Attributes are placeholders too: enums such as InterpolationMode are read at import."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class Absent(metaclass=_AnyName):
    """What nothing may be made of."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this environment has a stand-in for torchvision, for text models alone")


def name(name: str) -> type:
    """A module's `__getattr__`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent
