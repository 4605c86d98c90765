"""What a host and the plugin say of a command line that serves a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsa_plugin.doctor.findings import Finding
from dsa_plugin.probe.ask import Question, Target, ask
from dsa_plugin.recipes.schema import HostName

_PROGRAMS: dict[tuple[str, ...], HostName] = {
    ("vllm", "serve"): "vllm",
    ("sglang", "serve"): "sglang",
    ("python", "-m", "sglang.launch_server"): "sglang",
    ("python3", "-m", "sglang.launch_server"): "sglang",
}


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
    raise ValueError(f"`{' '.join(rest)}` starts no server; allowed after --: {known}")


def examine_command(words: Sequence[str], target: Target) -> Finding:
    """Whether the host takes it there, with every reason of the plugin's against it."""
    host, arguments, env = split_command(words)
    [answer] = ask(sys.executable, host, [Question(arguments, target, env)])
    if answer.error is not None:
        return Finding("command", False, answer.error)
    return Finding("command", True, f"served by {answer.settled['served_by']}")
