"""What the hosts' checks share: each `probe/check.py` asks for every thing that was registered.

A line is `ok   NAME`, or `FAIL NAME: WHAT: REMEDY`; `dsa doctor` reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

_REPORT = "install releases that go together (README), or report it with both versions"


def left_out(group: str, variable: str, allowed: Sequence[str] | None) -> str | None:
    """Why a host does not load our entry point; None: it does.

    Args:
        group: of entry points, the host's.
        variable: that filters them.
        allowed: its names; None: all.
    """
    ours = [e for e in entry_points(group=group) if e.value.startswith("dsa_plugin.")]
    if not ours:
        return "dsa-plugin is not installed in this environment: pip install it"
    if allowed is not None and ours[0].name not in allowed:
        return f"{variable}={','.join(allowed)} leaves {ours[0].name} out: add it"
    return None


def run_checks(checks: Mapping[str, Callable[[], str | None]]) -> int:
    """Print a line for each check up to the first that fails, on which the others rest.

    Args:
        checks: by name, in order; each returns None, or what is wrong and, after a colon, a remedy.

    Returns:
        The exit code: 1 if one failed.
    """
    for name, check in checks.items():
        try:
            reason = check()
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            words = " ".join(str(error).split())
            reason = f"{type(error).__name__}: {words}: {_REPORT}"
        if reason is not None:
            remedy = "" if ": " in reason else f": {_REPORT}"
            sys.stdout.write(f"FAIL {name}: {reason}{remedy}\n")
            return 1
        sys.stdout.write(f"ok   {name}\n")
    return 0
