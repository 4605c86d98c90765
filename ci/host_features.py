"""Write docs/host_features.md: what becomes of every flag and variable of both hosts.

ci/host_features PYTHON            # writes it; a test fails where it is not what this writes
ci/host_features PYTHON --check    # only compares the lists with the hosts' own switches
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from dsa_plugin.doctor.features import Class, Feature, Features, faults, load_features
from dsa_plugin.probe.switches import Switches, read_switches
from dsa_plugin.recipes.schema import HostName

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "host_features.md"
TITLES: dict[HostName, str] = {"vllm": "vLLM", "sglang": "SGLang"}
HEAD = """# What becomes of every flag

Written by `ci/host_features` from `dsa_plugin/hosts/<host>/features.yaml` and `refused.py`; do not
edit. A switch is *served* (a test shows it), *refused* (before weights load, by name), or *of no
concern*: the plugin's part, the attention of DSA models, neither reads it nor is changed by it.
Fields of the JSON flags that touch attention, graphs, drafts and transfers count as flags. Names
are compared with the host's own parser in CI: one that is new and unclassified turns it red, as
does `ci/host_features PYTHON --check`.

All reasons of the plugin's against one start come in one message. On some flags the host itself
ends before the plugin is asked; "by the plugin" counts the refused switches, each value of a flag
with several, that the plugin refuses where each is given alone.

"""


def counts(features: Iterable[Feature], names: Iterable[str]) -> Counter[str]:
    """Switches of a release in each class; one with several values is `by value`."""
    classes: dict[str, str] = {}
    for feature in features:
        classes[feature.name] = "by value" if feature.value else feature.classed
    return Counter(classes[name] for name in names if name in classes)


def refused_names(features: Iterable[Feature], names: Iterable[str]) -> set[str]:
    """What of a release is refused: names, with the value where it is one of several."""
    known = set(names)
    return {
        f"{feature.name} {feature.value}".rstrip()
        for feature in features
        if feature.classed == "refused" and feature.name in known
    }


def document(releases: dict[HostName, Switches]) -> str:
    """docs/host_features.md."""
    parts = [
        HEAD,
        "| | all | served | by value | refused | no concern | refusals | by the plugin |\n",
        f"{'|---' * 8}|\n",
    ]
    said: dict[HostName, Features] = {host: load_features(host) for host in releases}
    for host, release in releases.items():
        kinds = (
            ("flags", said[host].flags, release.flags),
            ("variables", said[host].variables, release.variables),
        )
        for kind, listed, switches in kinds:
            found = counts(listed, switches)
            cells = [found[c] for c in ("served", "by value", "refused", "no_concern")]
            refusals = refused_names(listed, switches)
            ours = len(refusals - said[host].host_first)
            cells = [sum(cells), *cells, len(refusals), ours]
            title = f"{TITLES[host]} {release.version.split('+')[0]}, {kind}"
            parts.append(f"| {title} | {' | '.join(map(str, cells))} |\n")
    for host, features in said.items():
        for kind, listed in (("flags", features.flags), ("variables", features.variables)):
            parts.append(f"\n## {TITLES[host]}'s {kind}\n")
            parts += [_class(listed, classed) for classed in get_args(Class)]
    return "".join(parts)


def _class(listed: Iterable[Feature], classed: Class) -> str:
    groups: dict[str, list[str]] = {}
    for feature in listed:
        if feature.classed == classed:
            name = f"`{feature.name} {feature.value}".rstrip() + "`"
            groups.setdefault(feature.reason, []).append(name)
    if not groups:
        return ""
    lines = [f"- {reason}: {', '.join(names)}\n" for reason, names in groups.items()]
    return f"\n### {classed.replace('_', ' ').capitalize()}\n\n{''.join(lines)}"


def read_releases() -> dict[HostName, Switches]:
    """The switches of the releases installed here."""
    folder = Path(os.environ.get("DSA_TEST_SGLANG", ROOT / ".venv" / "sglang"))
    pythons: dict[HostName, str] = {
        "vllm": sys.executable,
        "sglang": str(folder / "bin" / "python"),
    }
    return {host: read_switches(python, host) for host, python in pythons.items()}


def check(releases: Mapping[HostName, Switches]) -> int:
    """Print what is wrong with the lists; the exit code."""
    found = [
        f"{TITLES[host]} {release.version}: {fault}"
        for host, release in releases.items()
        for fault in faults(load_features(host), release)
    ]
    print("\n".join(found) or "every switch is classified")
    return 1 if found else 0


def main() -> int:
    releases = read_releases()
    if sys.argv[1:] == ["--check"]:
        return check(releases)
    DOCUMENT.write_text(document(releases), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
