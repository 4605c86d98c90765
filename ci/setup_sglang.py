"""Create a virtual environment with SGLang on a CPU, and this plugin.

Run by `make sglang`; any Python >= 3.11 will do. Run again, it does nothing while the environment
is as it left it, and otherwise installs only what is missing.

SGLang goes in without its requirements. What: `--no-deps`, and sglang_requirements.txt. Why: its
own are CUDA wheels of several GB (torch, sgl-kernel, flashinfer); a CPU runs none. Upstream:
https://github.com/sgl-project/sglang/blob/v0.5.23/python/pyproject.toml. Remove when: SGLang has an
extra for a CPU whose wheels are on PyPI.

What else a CPU lacks is a package of its own, for tests alone: ci/sglang_cpu.
"""

from __future__ import annotations

from environment import ROOT, Environment, parse_arguments

PYTHONS = ("3.11", "3.12", "3.13")  # wheels of SGLang 0.5.23
# CPU builds that run it. SGLang pins the CUDA build of 2.14.1; every call of ours is older.
TORCH_OF_SGLANG = {"0.5.23": "2.13.0"}


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
    env.step("what SGLang imports (about 500 MB)")
    env.install([env.torch_requirement, "-r", str(ROOT / "ci" / "sglang_requirements.txt")], again)
    env.step(f"sglang {args.version}, dsa-plugin from this folder, a CPU platform for tests")
    env.install(["--no-deps", f"sglang=={args.version}"], again)
    # --no-build-isolation: without it pip would download setuptools once more for each.
    for folder in (ROOT, ROOT / "ci" / "sglang_cpu"):
        env.install(["--no-deps", "--no-build-isolation", "--editable", str(folder)], again)
    env.step("check that the plugin takes")
    # Outside this folder, whose packages would be found without having been installed.
    check = [str(env.python), "-P", "-m", "dsa_plugin.hosts.sglang.check"]
    env.run(check, f"remove {env.venv} and run it again")
    env.finish()


if __name__ == "__main__":
    main()
