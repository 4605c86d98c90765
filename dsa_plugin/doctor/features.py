"""What becomes of each switch of a host: its `features.yaml`, and the names in its `refused.py`.

A switch is served (a test shows it), of no concern (why), or refused (the message).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.specifiers import SpecifierSet

import dsa_plugin
from dsa_plugin.probe.switches import Switch, Switches
from dsa_plugin.recipes.schema import HostName

Class = Literal["served", "no_concern", "refused"]
_REASON: dict[Class, str] = {"served": "test", "no_concern": "why"}


@dataclass(frozen=True)
class Feature:
    """A switch, or one value of it.

    Attributes:
        name: of the flag or variable.
        value: where only this one is meant; else empty.
        reason: the test of one that is served, the reason for the others.
    """

    name: str
    classed: Class
    reason: str
    value: str = ""


@dataclass(frozen=True)
class Features:
    """Everything that is said of one host.

    Attributes:
        releases: of switches that not every release has, which have it.
        host_first: refused switches that the host itself ends on, before the plugin is asked, where
            no other flag is given; each with its value where it is one of several.
    """

    flags: tuple[Feature, ...]
    variables: tuple[Feature, ...]
    releases: Mapping[str, SpecifierSet]
    host_first: frozenset[str]


def refused_table(host: HostName) -> tuple[Any, ...]:
    """What the host's `refused.py` lists, a `dsa_plugin.hosts.refusal.Refused` each."""
    table: tuple[Any, ...] = import_module(f"dsa_plugin.hosts.{host}.refused").REFUSED
    return table


def load_features(host: HostName) -> Features:
    """Read a host's lists."""
    path = Path(dsa_plugin.__file__).parent / "hosts" / host / "features.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    against = [
        Feature(entry.name, "refused", f"{entry.why}; {entry.instead}")
        for entry in refused_table(host)
    ]
    flags = (*_entries(found["flags"]), *(f for f in against if f.name.startswith("--")))
    variables = (*_entries(found["variables"]), *(f for f in against if f.name[:2] != "--"))
    releases = {
        name: SpecifierSet(wanted) for wanted, names in found["only_in"].items() for name in names
    }
    return Features(flags, variables, releases, frozenset(found["host_first"]))


def faults(features: Features, switches: Switches) -> list[str]:
    """What is wrong with the list for the release that has these switches; empty if nothing is."""
    return [
        *_compare(features.flags, switches.flags, switches.version, features.releases),
        *_compare(features.variables, switches.variables, switches.version, features.releases),
    ]


def _entries(section: Mapping[str, Any]) -> Iterator[Feature]:
    for classed, key in _REASON.items():
        for group in section[classed]:
            for name in group["names"]:
                yield Feature(name, classed, group[key])
    for name, values in section.get("by_value", {}).items():
        for test, served in values["served"].items():
            yield from (Feature(name, "served", test, value) for value in served)
        takes = ", ".join(value for served in values["served"].values() for value in served)
        why = f"the plugin's caches are not kept so; use {takes}"
        yield from (Feature(name, "refused", why, value) for value in values["refused"])


def _compare(
    listed: Iterable[Feature],
    switches: Mapping[str, Switch],
    version: str,
    releases: Mapping[str, SpecifierSet],
) -> Iterator[str]:
    by_name: dict[str, list[Feature]] = {}
    for feature in listed:
        by_name.setdefault(feature.name, []).append(feature)
    for name, switch in switches.items():
        if name not in by_name and name != "--help":
            yield f"{name} is new and unclassified: {switch.help}"
    for name, entries in by_name.items():
        if len({(e.classed, e.value) for e in entries}) != len(entries) or (
            len(entries) > 1 and not all(e.value for e in entries)
        ):
            yield f"{name} is classified twice"
        if name not in switches and releases.get(name, SpecifierSet()).contains(version):
            yield f"{name} is classified, and {version} does not have it"
        elif name in switches and not releases.get(name, SpecifierSet()).contains(version):
            yield f"{name} is in {version}, and only_in says that it is not"
        elif name in switches and entries[0].value:
            for value in sorted(set(switches[name].values) - {e.value for e in entries}):
                yield f"{name} {value} is new and unclassified"
