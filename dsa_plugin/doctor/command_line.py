"""What a host and the plugin say of a command line that serves a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsa_plugin.doctor.features import Class, Feature, load_features, refused_table
from dsa_plugin.doctor.findings import Finding
from dsa_plugin.doctor.redact import Redactor
from dsa_plugin.doctor.serving import MODEL_FLAG
from dsa_plugin.probe.ask import Question, Target, ask
from dsa_plugin.probe.switches import Written, written
from dsa_plugin.recipes.launch import installed_version
from dsa_plugin.recipes.schema import HostName

_PROGRAMS: dict[tuple[str, ...], HostName] = {
    ("vllm", "serve"): "vllm",
    ("sglang", "serve"): "sglang",
    ("python", "-m", "sglang.launch_server"): "sglang",
    ("python3", "-m", "sglang.launch_server"): "sglang",
}
_OTHER_VALUES = "other values of it are refused, this one is not"
_UNKNOWN = "not a switch of the releases that the plugin was written for, or misspelt"


@dataclass(frozen=True)
class UsedSwitch:
    """A flag or variable of a command line, or one field of a flag that takes a JSON object.

    Attributes:
        name: as the host's own help has it.
        value: its words; empty where it takes none.
        classed: what becomes of it.
        reason: the test of one that is served, the message of a refusal, else why.
    """

    name: str
    value: str
    classed: Class | Literal["unclassified"]
    reason: str


@dataclass(frozen=True)
class Command:
    """A command line, taken apart and examined.

    Attributes:
        switches: variables first, then flags, in their order.
        finding: whether the host takes it, with every reason of the plugin's against it.
    """

    host: HostName
    switches: list[UsedSwitch]
    finding: Finding

    def redacted(self, redactor: Redactor) -> Command:
        """Without secrets, and names of people and machines."""
        switches = [replace(s, value=redactor.value(s.name, s.value)) for s in self.switches]
        finding = replace(self.finding, text=redactor.text(self.finding.text))
        return replace(self, switches=switches, finding=finding)


def split_command(words: Sequence[str]) -> tuple[HostName, list[str], dict[str, str]]:
    """Host, arguments and variables of `[NAME=VALUE ...] vllm serve ...` or SGLang's.

    Raises:
        ValueError: it starts neither host.
    """
    env: dict[str, str] = {}
    rest = list(words)
    while rest and "=" in rest[0] and not rest[0].startswith("-"):
        name, _, env[name] = rest.pop(0).partition("=")
    for program, host in _PROGRAMS.items():
        if tuple(rest[: len(program)]) == program:
            return host, rest[len(program) :], env
    known = ", ".join(f"`{' '.join(program)}`" for program in _PROGRAMS)
    raise ValueError(f"`{' '.join(rest[:3])}` starts no server; allowed after --: {known}")


def examine_command(words: Sequence[str], target: Target) -> Command:
    """What becomes of each switch, and whether the host takes all of them there.

    Where the host is not installed, flags are looked up as they are written.

    Raises:
        ValueError: it starts neither host, or the host cannot be asked.
    """
    host, arguments, env = split_command(words)
    if installed_version(host) is None:
        names: Mapping[str, str] = {}
        finding = Finding("command", False, f"{host} is not installed in {sys.prefix}")
    else:
        # Alone: the host says nothing of its flags where one of these is unknown to it.
        nothing = Question([MODEL_FLAG[host], "model"])
        spelt, answer = ask(sys.executable, host, [nothing, Question(arguments, target, env)])
        names = spelt.settled.get("spellings", {})
        by = f"served by {answer.settled.get('served_by')}"
        finding = Finding("command", answer.error is None, answer.error or by)
    return Command(host, classify(host, written(arguments, names), env), finding)


def classify(
    host: HostName, flags: Iterable[Written], variables: Mapping[str, str]
) -> list[UsedSwitch]:
    """What becomes of each of a host's switches."""
    features = load_features(host)
    # A flag that sets one field of an object is refused as that field of the object's flag too.
    table = refused_table(host)
    refused = {f"--{entry.at.replace('_config.', '-config.')}": entry for entry in table}
    refused |= {entry.name: entry for entry in table}
    known: dict[str, list[Feature]] = {}
    for feature in (*features.flags, *features.variables):
        known.setdefault(feature.name, []).append(feature)

    def one(name: str, value: str) -> UsedSwitch:
        entries = known.get(name, [])
        feature = next((f for f in entries if f.value in ("", value)), None)
        if feature is None:
            return UsedSwitch(name, value, "unclassified", _UNKNOWN)
        if entry := refused.get(name):
            if entry.takes(value):
                return UsedSwitch(name, value, "served", _OTHER_VALUES)
            return UsedSwitch(name, value, "refused", f"{entry.why}; {entry.instead}")
        return UsedSwitch(name, value, feature.classed, feature.reason)

    used = [one(name, value) for name, value in variables.items()]
    for flag in flags:
        used.append(one(flag.name, " ".join(flag.values)))
        used += [
            one(f"{flag.name}.{field}", value)
            for field, value in _fields(flag.values)
            if any(name.startswith(_object(f"{flag.name}.{field}")) for name in known)
        ]
    return used


def _object(field: str) -> str:
    return field.rpartition(".")[0] + "."


def _fields(values: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The fields of a JSON object and of objects within it, with dots."""
    try:
        found = json.loads(" ".join(values))
    except ValueError:
        return
    waiting: list[tuple[str, Any]] = list(found.items()) if isinstance(found, dict) else []
    while waiting:
        name, value = waiting.pop(0)
        yield name, value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, dict):
            waiting += [(f"{name}.{inner}", item) for inner, item in value.items()]
