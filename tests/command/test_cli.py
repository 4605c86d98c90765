"""The `dsa` command as a shell sees it: what it prints, where, and its exit code."""

import subprocess
import sys
import tomllib
from pathlib import Path

from dsa_plugin import __version__

ROOT = Path(__file__).resolve().parents[2]


def dsa(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsa_plugin.cli", *args], capture_output=True, text=True, check=False
    )


def test_version() -> None:
    done = dsa("--version")
    assert (done.returncode, done.stdout) == (0, f"dsa-plugin {__version__}\n")


def test_the_script_is_this_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dsa": "dsa_plugin.cli:main"}


def test_unknown_command_is_an_error_without_traceback() -> None:
    done = dsa("no-such-command")
    assert done.returncode == 2
    assert "Error: No such command 'no-such-command'" in done.stderr
    assert "Traceback" not in done.stderr


_SLOW = {
    "torch",
    "transformers",
    "rich",
    "pydantic",
    "yaml",
    "huggingface_hub",
    "matplotlib",
    "vllm",
    "sglang",
}
_HELP = """
import sys
from dsa_plugin.cli import app
app(["--help"], standalone_mode=False)
print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
"""


def test_help_imports_nothing_slow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HELP], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not _SLOW & set(done.stderr.split())
