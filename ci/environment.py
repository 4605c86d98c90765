"""What the set-ups of both hosts' environments have in common: a venv, a CPU torch, a stamp.

torch goes first, as a CPU build. Left to the resolver, a plain `torch` brings the newest CUDA build
(several GB).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".dsa-setup"


@dataclass
class Environment:
    """A virtual environment that a set-up creates, step by step.

    Attributes:
        host: the host's name in messages; `make <host, lower case>` sets it up.
        venv: its folder.
        recipe: what decides what gets installed, besides the files of `ci/` and pyproject.toml.
        pythons: versions that the host supports.
        torch: version, without the local tag.
        torch_index: package index with torch's CPU builds; empty for the configured ones.
        steps: how many there are.
    """

    host: str
    venv: Path
    recipe: str
    pythons: tuple[str, ...]
    torch: str
    torch_index: str
    steps: int
    _step: int = field(default=0, init=False)

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def site(self) -> Path:
        """The environment's site-packages folder."""
        found = sorted((self.venv / "lib").glob("python3.*/site-packages"))
        if not found:
            raise self.failure(
                f"{self.venv} has no site-packages folder", f"remove {self.venv} and run it again"
            )
        return found[0]

    @property
    def torch_requirement(self) -> str:
        return f"torch=={self.torch}{'+cpu' if sys.platform == 'linux' else ''}"

    def is_complete(self) -> bool:
        """Whether a set-up with the same recipe finished, and nothing was installed since."""
        stamp = self.venv / STAMP
        return stamp.is_file() and stamp.read_text() == self.fingerprint()

    def finish(self) -> None:
        (self.venv / STAMP).write_text(self.fingerprint())

    def fingerprint(self) -> str:
        """Hash of the recipe (its words, ci/, pyproject.toml) and of what is installed."""
        digest = hashlib.sha256(f"{self.recipe} {self.torch} {ROOT}\n".encode())
        ci = (f for f in (ROOT / "ci").rglob("*") if f.suffix in {".py", ".toml", ".txt"})
        for file in (*sorted(ci), ROOT / "pyproject.toml"):
            digest.update(file.read_bytes())
        if (self.venv / "lib").is_dir():
            names = (entry.name for entry in self.site.glob("*.dist-info"))
            digest.update("\n".join(sorted(names)).encode())
        return digest.hexdigest()

    def create(self) -> None:
        # pip, not python: a venv that failed for want of ensurepip has the one without the other.
        if (self.venv / "bin" / "pip").exists():
            self.step(f"adopt {self.venv}")
            return
        base = self._find_python()
        self.step(f"create {self.venv} with {base}")
        self.run(
            [base, "-m", "venv", str(self.venv)], "install Python's venv module (python3-venv)"
        )

    def install_torch(self) -> None:
        version = self.torch_requirement.removeprefix("torch==")
        self.step(f"torch {version} (about 200 MB)")
        if (self.site / f"torch-{version}.dist-info").is_dir():
            return
        self.install(
            [self.torch_requirement],
            "PyPI has no CPU builds of torch for Linux; PyTorch's own package index has them. "
            "PyTorch's install page gives its address (Compute Platform CPU): "
            f"make {self.host.lower()} TORCH_INDEX=<address>",
        )

    def install(self, arguments: list[str], remedy: str) -> None:
        """pip install."""
        index = ["--extra-index-url", self.torch_index] if self.torch_index else []
        self._pip("install", [*index, *arguments], remedy)

    def download(self, requirement: str, remedy: str) -> Path:
        """The wheel of `<name>==<version>` alone, in a folder of the environment."""
        folder = self.venv / "wheels"
        self._pip("download", ["--no-deps", "--dest", str(folder), requirement], remedy)
        [wheel] = folder.glob(requirement.replace("==", "-") + "-*.whl")
        return wheel

    def step(self, text: str) -> None:
        self._step += 1
        print(f"\n[{self._step}/{self.steps}] {text}", flush=True)

    def run(self, command: list[str], remedy: str) -> None:
        """Run with its output shown as it comes; a failure ends the script with the remedy."""
        # These would put other packages in front of the environment's own.
        env = {k: v for k, v in os.environ.items() if k not in {"PYTHONHOME", "PYTHONPATH"}}
        code = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode
        if code != 0:
            raise self.failure(f"exit code {code} from: {' '.join(command)}", remedy)

    def failure(self, what: str, remedy: str) -> SystemExit:
        """The end of the script, with what failed and what to do about it."""
        return SystemExit(f"\nsetup of {self.host} failed: {what}\nWhat to do: {remedy}")

    def _pip(self, command: str, arguments: list[str], remedy: str) -> None:
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
        self.run([*pip, command, *arguments], remedy)

    def _find_python(self) -> str:
        """This interpreter if the host supports it, else the first on PATH that starts."""
        if f"{sys.version_info.major}.{sys.version_info.minor}" in self.pythons:
            return sys.executable
        for version in self.pythons:
            found = shutil.which(f"python{version}")
            # A version manager's shim may be on PATH for a Python that is not installed.
            if found and succeeds(found, ""):
                return found
        raise self.failure(
            f"no Python of {', '.join(self.pythons)} found (this is {platform.python_version()})",
            f"install one of them, or name it: make {self.host.lower()} "
            f"PYTHON3=/path/to/python{self.pythons[-1]}",
        )


def succeeds(python: str, code: str) -> bool:
    """Whether `python -c code` ends with exit code 0."""
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def parse_arguments(host: str, versions: dict[str, str], default: str) -> argparse.Namespace:
    """The command line of a set-up: `--<host> VERSION`, `--venv`, `--torch-index`."""
    name = host.lower()
    parser = argparse.ArgumentParser(description=f"create an environment with {host} on a CPU")
    parser.add_argument(f"--{name}", dest="version", default=default, choices=versions)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv" / name)
    parser.add_argument("--torch-index", default="", help="package index with torch's CPU builds")
    return parser.parse_args()
