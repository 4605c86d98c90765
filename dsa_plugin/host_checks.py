"""Print what a host says of each thing that was registered with it: `hosts/<host>/check.py`.

A line is `ok   NAME`, or `FAIL NAME: WHAT: REMEDY`; `dsa doctor` reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

_REPORT = "install releases that go together (README), or report it with both versions"


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
