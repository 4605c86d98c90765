"""Every switch that a host has: the flags of its own parser, and its environment variables.

`python -m dsa_plugin.hosts.<host>.probe.switches` prints what `write` is given; `read_switches`
runs it in a host's environment.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_PREFIX = "switches: "


@dataclass(frozen=True)
class Switch:
    """One flag or variable of a release.

    Attributes:
        name: --flag-with-dashes, --config.field of a flag that takes a JSON object, or VARIABLE.
        values: what it takes, where the host lists that; else empty.
        help: the host's own words.
    """

    name: str
    values: tuple[str, ...] = ()
    help: str = ""


@dataclass(frozen=True)
class Switches:
    """All of one release of a host."""

    version: str
    flags: dict[str, Switch]
    variables: dict[str, Switch]


def flags_of(parser: argparse.ArgumentParser) -> Iterable[Switch]:
    """The options of a parser, each under its longest name without a `--no-` of its own."""
    for action in parser._actions:
        name = _name(action)
        if name:
            values = tuple(sorted(str(value) for value in action.choices or ()))
            yield Switch(name, values, " ".join(str(action.help or "").split()))


def _name(action: argparse.Action) -> str | None:
    names = [name for name in action.option_strings if name.startswith("--")]
    spelt = sorted(name.replace("_", "-") for name in names if not name.startswith("--no-"))
    if not spelt:
        return None
    by_field = "--" + action.dest.replace("_", "-")
    return by_field if by_field in spelt else max(spelt, key=len)


@dataclass(frozen=True)
class Written:
    """A flag of a command line.

    Attributes:
        given: as the user wrote it, such as -tp or --no-enable-prefix-caching.
        name: as `Switch`; --config.field where a field is given with a dot.
        values: its words; "False" of a flag that is switched off.
    """

    given: str
    name: str
    values: tuple[str, ...]


def written(arguments: Sequence[str], names: Mapping[str, str]) -> list[Written]:
    """The flags of a command line, in order.

    Args:
        names: by every spelling, short ones included: `spellings`; empty: as they are written.
    """
    found: list[Written] = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        name = _spelt(flag, names)
        if name is not None:
            off = flag.startswith("--no-") and not name.startswith("--no-")
            found.append(Written(flag, name, (value,) if equals else ("False",) if off else ()))
        elif found:
            last = found[-1]
            found[-1] = Written(last.given, last.name, (*last.values, word))
    return found


def spellings(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The name of each option string of a parser."""
    return {
        spelling: name
        for spelling, action in parser._option_string_actions.items()
        if (name := _name(action))
    }


def _spelt(flag: str, names: Mapping[str, str]) -> str | None:
    """The name of what may be a flag; None: it is a value."""
    base, dot, field = flag.partition(".")
    for spelling in (base, base.replace("_", "-")):
        if spelling in names:
            return names[spelling] + dot + field
    if not names and re.match(r"--?[a-zA-Z]", base):
        return base.replace("_", "-") + dot + field
    return None


def write(version: str, flags: Iterable[Switch], variables: Iterable[Switch]) -> None:
    """Host side: print all of them."""
    found = {"version": version, "flags": [asdict(f) for f in flags]}
    found["variables"] = [asdict(v) for v in variables]
    sys.stdout.write(f"\n{_PREFIX}{json.dumps(found)}\n")


def read_switches(python: str, host: str) -> Switches:
    """Ask the host installed beside an interpreter.

    Raises:
        ValueError: it cannot be asked; with the end of what it wrote.
    """
    done = subprocess.run(
        [python, "-P", "-m", f"dsa_plugin.hosts.{host}.probe.switches"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_PREFIX):
            found: dict[str, Any] = json.loads(line.removeprefix(_PREFIX))
            return Switches(
                found["version"], _by_name(found["flags"]), _by_name(found["variables"])
            )
    raise ValueError(f"{host} did not list its flags:\n{done.stderr[-2000:]}")


def _by_name(switches: list[dict[str, Any]]) -> dict[str, Switch]:
    return {s["name"]: Switch(s["name"], tuple(s["values"]), s["help"]) for s in switches}
