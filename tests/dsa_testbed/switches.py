"""Switches of the hosts installed here, each asked once a test run."""

from __future__ import annotations

import sys
from functools import cache

from dsa_plugin.probe.switches import Switches, read_switches
from dsa_plugin.recipes.schema import HostName
from dsa_testbed.sglang_server import sglang_python


def python_of(host: HostName) -> str:
    """The interpreter of a host's environment."""
    return sys.executable if host == "vllm" else str(sglang_python())


@cache
def switches_of(host: HostName) -> Switches:
    """Every flag and variable of a host."""
    return read_switches(python_of(host), host)
