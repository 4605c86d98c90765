"""Create a virtual environment with SGLang on a CPU, and this plugin.

Run by `make sglang`; any Python >= 3.11 will do. Run again, it does nothing while the environment
is as it left it, and otherwise installs only what is missing.

SGLang goes in without its requirements. What: `--no-deps`, and sglang_requirements.txt in the
versions that SGLang's metadata asks for. Why: it requires CUDA wheels of several GB (torch,
sgl-kernel, flashinfer) as well; a CPU runs none. Upstream:
https://github.com/sgl-project/sglang/blob/v0.5.23/python/pyproject.toml. Remove when: SGLang has an
extra for a CPU whose wheels are on PyPI.

What else a CPU lacks is a package of its own, for tests alone: ci/sglang_cpu.
"""

from __future__ import annotations

import re
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

from environment import ROOT, Environment, parse_arguments

PYTHONS = ("3.11", "3.12", "3.13")  # wheels of SGLang 0.5.23
# CPU builds that run it. SGLang pins CUDA builds: 2.13.0 up to 0.5.21, 2.14.1 after it.
TORCH_OF_SGLANG = {
    "0.5.20": "2.13.0",
    "0.5.21": "2.13.0",
    "0.5.22": "2.13.0",
    "0.5.23": "2.13.0",
}


def main() -> None:
    args = parse_arguments("SGLang", TORCH_OF_SGLANG, default="0.5.23")
    env = Environment(
        host="SGLang",
        venv=args.venv.absolute(),
        recipe=args.version,
        pythons=PYTHONS,
        torch=TORCH_OF_SGLANG[args.version],
        torch_index=args.torch_index,
        steps=5,
    )
    if env.is_complete():
        return
    again = "check the network, then run it again: what is installed is kept"
    env.create()
    env.install_torch()
    env.step(f"sglang {args.version} and what it imports (about 500 MB)")
    wheel = env.download(f"sglang=={args.version}", again)
    versions = env.venv / "sglang-versions.txt"
    versions.write_text("\n".join(versions_asked_for(wheel)))
    names = ROOT / "ci" / "sglang_requirements.txt"
    env.install([env.torch_requirement, "-r", str(names), "-c", str(versions)], again)
    env.install(["--no-deps", str(wheel)], again)
    env.step("dsa-plugin from this folder, a CPU platform for tests")
    # --no-build-isolation: without it pip would download setuptools once more for each.
    for folder in (ROOT, ROOT / "ci" / "sglang_cpu"):
        env.install(["--no-deps", "--no-build-isolation", "--editable", str(folder)], again)
    env.step("check that the plugin takes")
    # Outside this folder, whose packages would be found without having been installed.
    check = [str(env.python), "-P", "-m", "dsa_plugin.hosts.sglang.probe.check"]
    env.run(check, f"remove {env.venv} and run it again")
    env.finish()


def versions_asked_for(wheel: Path) -> list[str]:
    """The requirements of a wheel as pip's constraints: without extras, and without torch."""
    [metadata] = (p for p in zipfile.Path(wheel).iterdir() if p.name.endswith(".dist-info"))
    required = PathDistribution(metadata).requires or []
    plain = [line for line in required if "extra ==" not in line and not line.startswith("torch=")]
    return [re.sub(r"\[.*?\]", "", line) for line in plain]


if __name__ == "__main__":
    main()
