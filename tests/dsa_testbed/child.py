"""Work that a test has another process do, asked and answered in JSON."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]


def ask_child(command: Sequence[str], request: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """What a command, which finds the tests' modules, answers in its last line to its input.

    Raises:
        RuntimeError: it failed; the message is its last output.
    """
    search = os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        input=json.dumps(request),
        env={**env, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-6000:])
    return json.loads(done.stdout.splitlines()[-1])
