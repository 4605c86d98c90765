"""`dsa convert` run, or killed at a piece of its work, and what it has written."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin import cli
from dsa_plugin.convert.manifest import MANIFEST

# Says each piece that it has read, and waits for a line before the next.
_STEPPED = """
import sys
from pathlib import Path
from dsa_plugin.convert.model_parallel import plan_ranks
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.run import convert
def told(count):
    print("piece", flush=True)
    sys.stdin.readline()
source, target, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
planned = plan_ranks(source, target, int(to)) if to.isdigit() else plan(source, target, to)
convert(planned, 2, told)
print("done", flush=True)
"""


def dsa_convert(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, *args: object
) -> tuple[Any, str]:
    """The exit code of `dsa convert`, and what it printed."""
    monkeypatch.setattr("sys.argv", ["dsa", "convert", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def kill_after(source: Path, target: Path, to: str, pieces: int) -> bool:
    """Whether a conversion was still running when it was killed at its next piece.

    Args:
        source: of the checkpoint.
        target: what it writes.
        to: a precision, or a number of ranks.
        pieces: after which it is killed.
    """
    command = [sys.executable, "-c", _STEPPED, str(source), str(target), to]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in range(pieces):
            if "done" in child.stdout.readline():
                return False
            child.stdin.write("\n")
            child.stdin.flush()
        child.send_signal(signal.SIGKILL)
    return child.returncode == -signal.SIGKILL


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the manifest, which says when each was written."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
