"""What a host offers and the plugin does not serve, as data; and one error for all of it.

Each host's `refused.py` lists its flags and variables; what depends on the model or on other flags
is in its `refusals.py`. `features.yaml` beside them says what becomes of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_ABSENT = object()


@dataclass(frozen=True)
class Refused:
    """A flag or variable that is refused unless it has a value that says nothing.

    Attributes:
        name: as a user writes it; of a field within a JSON flag, --flag.field.
        why: against serving it.
        at: where the host's configuration has it, with dots; empty: a variable.
        served: values that are not refused.
        example: a value that is, for a command line; empty: the flag takes none.
        instead: what would work.
    """

    name: str
    why: str
    at: str = ""
    served: tuple[Any, ...] = (None, False)
    example: str = ""
    instead: str = "drop the flag"

    def reason(self, value: Any) -> str | None:
        """Against this value; None where it is served."""
        if value is _ABSENT or any(value is served or value == served for served in self.served):
            return None
        plain = isinstance(value, str | int | float) and value is not True
        shown = f"{' ' if self.at else '='}{value}" if plain else ""
        return f"{self.name}{shown}: {self.why}; {self.instead}"

    def takes(self, text: str) -> bool:
        """Whether a value that is served is written so."""
        return text.lower() in {str(value).lower() for value in self.served}


def refused_flags(table: Iterable[Refused], read: Callable[[str], Any]) -> list[str]:
    """A reason for each flag of the table that is set.

    Args:
        read: the value at a dotted place, as `read_path`.
    """
    found = (entry.reason(read(entry.at)) for entry in table if entry.at)
    return [reason for reason in found if reason]


def refused_variables(table: Iterable[Refused], environ: Mapping[str, str]) -> list[str]:
    """A reason for each variable of the table that is set."""
    found = (e.reason(environ.get(e.name, _ABSENT)) for e in table if not e.at)
    return [reason for reason in found if reason]


def read_path(root: Any, path: str) -> Any:
    """The value at a dotted path; None where a step is None, a value of no flag where one lacks."""
    for name in path.split("."):
        if root is None:
            return None
        root = getattr(root, name, _ABSENT)
        if root is _ABSENT:
            return root
    return root


def attempt(reasons: list[str], check: Callable[[], T]) -> T | None:
    """What a check returns; None where it raised ValueError, whose text joins the reasons."""
    try:
        return check()
    except ValueError as refusal:
        reasons.append(str(refusal))
        return None


def refuse(reasons: list[str]) -> None:
    """Raise one ValueError with every reason, numbered; nothing where there are none."""
    if reasons:
        number = f"{len(reasons)} reason{'s' * (len(reasons) > 1)}"
        lines = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))
        raise ValueError(f"dsa_plugin cannot serve this model as asked, for {number}:\n{lines}")
