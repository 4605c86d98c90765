"""Write the support matrix: docs/support_matrix.md, and the README's short table of it.

    ci/support_matrix PYTHON

Cells are what `dsa doctor` says for each GPU. A test fails where they are not what this writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, get_args

from dsa_plugin.doctor.model_folder import model_folder
from dsa_plugin.doctor.serving import CACHE_DTYPES, Serving, ask_serving
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import find_registered
from dsa_plugin.probe.ask import Target
from dsa_plugin.probe.host_kernel import Op
from dsa_plugin.recipes.schema import HostName

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "docs" / "support_matrix.md"
README = ROOT / "README.md"
START, END = "<!-- Written by ci/support_matrix -->\n", "<!-- until here -->\n"

CPU = "cpu"
GPUS = ("a100-80g", "l40s", "h200", "b200", "rtx-pro-6000", "mi300x", "mi350x", CPU)
MODELS = ("DeepSeek-V3.2", "GLM-5.2")
COUNT = 8
TITLES: dict[HostName, str] = {"vllm": "vLLM", "sglang": "SGLang"}
HEAD = """# Who runs what

Written by `ci/support_matrix` from what `dsa doctor` says; do not edit. Each host's own code was
asked on a machine without a GPU, told that it is on eight of that GPU with all that its GPU builds
bring (FlashInfer, DeepGEMM, FlashAttention 3), and with its defaults, so without AITER on ROCm.
What did run on a GPU is in [measured.md](measured.md).

"no" is the host's refusal, in its own words. "not checked" is what it would run without asking the
device first: whether that works there is not known. SGLang's resolution refuses nothing, so its
"no" are the answers of checks that it has elsewhere: `dsa_plugin/hosts/sglang/probe/native.py`
names them. On a CPU SGLang has the platform of `ci/sglang_cpu`.

"""

Key = TypeVar("Key", bound=Hashable)


def ask(host: HostName, python: str) -> list[Serving]:
    """What a host says of every GPU and model."""
    machines = {gpu: (Target.of(find_gpu(gpu), COUNT), COUNT) for gpu in GPUS if gpu != CPU}
    machines[CPU] = Target.here(), 1
    with TemporaryDirectory() as scratch:
        models = {}
        for name in MODELS:
            model = find_registered(name)
            assert model is not None
            models[name] = model_folder(name, model, Path(scratch))
        return ask_serving(python, host, machines, models, "auto")


def host_version(host: HostName, python: str) -> str:
    """Of an environment, without the suffix of a build."""
    code = f"from importlib.metadata import version; print(version('{host}').split('+')[0])"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def matrix(hosts: dict[HostName, tuple[str, list[Serving]]]) -> str:
    """docs/support_matrix.md."""
    parts = [HEAD]
    for host, (version, servings) in hosts.items():
        parts.append(f"## {TITLES[host]} {version}\n")
        for gpu in GPUS:
            of_gpu = [serving for serving in servings if serving.gpu == gpu]
            parts.append(f"\n### {gpu}\n\nServed by {_alike(of_gpu, _served_by)}.\n\n")
            parts.append(f"| op | for | {TITLES[host]} alone | the plugin |\n|---|---|---|---|\n")
            for op in get_args(Op):
                for (alone, ours), which in _group(of_gpu, partial(_cells, op)):
                    parts.append(f"| {op} | {which or 'all'} | {alone} | {ours} |\n")
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def short_table(hosts: dict[HostName, tuple[str, list[Serving]]]) -> str:
    """The README's: who serves by default."""
    titles = [f"{TITLES[host]} {version}" for host, (version, _) in hosts.items()]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for gpu in GPUS:
        cells = [
            _alike([s for s in servings if s.gpu == gpu], _served_by)
            for _, servings in hosts.values()
        ]
        lines.append(f"| {gpu} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """The README with its table replaced."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table}{END}{after}"


def _served_by(serving: Serving) -> str:
    if serving.served_by is None:
        return "nobody"
    if serving.served_by == "dsa_plugin":
        return "the plugin"
    # Left to a host that refuses: docs/support_matrix.md says why.
    return f"{TITLES[serving.host]}{', which refuses' if serving.blocker else ''}"


def _cells(op: Op, serving: Serving) -> tuple[str, str]:
    ours = serving.ours.get(op, "refused")
    if serving.native_error is not None:
        return f"no: {serving.native_error}", ours
    [kernel] = [kernel for kernel in serving.native if kernel.op == op]
    verdict = "not checked" if kernel.verdict == "unchecked" else kernel.verdict
    return f"{verdict}: {kernel.text}".replace("|", "\\|"), ours


def _alike(servings: list[Serving], value: Callable[[Serving], str]) -> str:
    """One word where all agree, else each with what it is of."""
    groups = _group(servings, value)
    return "; ".join(f"{found} ({which})" if which else found for found, which in groups)


def _group(servings: Iterable[Serving], value: Callable[[Serving], Key]) -> list[tuple[Key, str]]:
    """Each value with the models and cache dtypes that have it; "" if all do."""
    found: dict[Key, list[Serving]] = {}
    for serving in servings:
        found.setdefault(value(serving), []).append(serving)
    if len(found) == 1:
        return [(key, "") for key in found]
    return [(key, _name(group)) for key, group in found.items()]


def _name(servings: list[Serving]) -> str:
    """Which these are: a model alone where it is with every cache dtype, and the reverse."""
    pairs = {(serving.model, serving.cache_dtype) for serving in servings}
    caches = sorted({cache for _, cache in pairs})
    all_caches = CACHE_DTYPES[servings[0].host]
    models = [model for model in MODELS if pairs >= {(model, cache) for cache in all_caches}]
    rest = {pair for pair in pairs if pair[0] not in models}
    names = [*models]
    for cache in caches:
        of_cache = [model for model in MODELS if (model, cache) in rest]
        if len(of_cache) == len(MODELS):
            names.append(cache)
        else:
            names += [f"{model} in {cache}" for model in of_cache]
    return ", ".join(names)


def generate() -> tuple[str, str]:
    """The matrix and the README's table."""
    folder = Path(os.environ.get("DSA_TEST_SGLANG", ROOT / ".venv" / "sglang"))
    pythons: dict[HostName, str] = {
        "vllm": sys.executable,
        "sglang": str(folder / "bin" / "python"),
    }
    hosts: dict[HostName, tuple[str, list[Serving]]] = {
        host: (host_version(host, python), ask(host, python)) for host, python in pythons.items()
    }
    return matrix(hosts), short_table(hosts)


def main() -> None:
    text, table = generate()
    MATRIX.write_text(text, encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
