"""The shape of the tree: which package may import which, and what loading the plugin costs."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "model_registry")
PACKAGES = ("dsa_plugin", "dsa_kernels", "dsa_registry")
HOSTS = ("vllm", "sglang")
CLI_LIBRARIES = {
    "huggingface_hub", "matplotlib", "pydantic", "rich", "transformers", "typer", "yaml",
}  # fmt: skip
EXPLAIN_LIBRARIES = {"matplotlib", "psutil", "tokenizers"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the three packages."""
    found = {}
    for root in SOURCE_ROOTS:
        for package in PACKAGES:
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
OPS = {path.parent.name for path in MODULES.values() if path.name == "api.py"}


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") + ["__init__"] * is_package
            base = parts[: len(parts) - node.level] if node.level else []
            origin = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None if it may."""
    mine, theirs = module.split("."), imported.split(".")
    if theirs[0] in sys.stdlib_module_names or theirs[0] == "__future__":
        return None
    allowed = {
        "dsa_registry": {"dsa_registry"},
        "dsa_kernels": {"dsa_kernels", "torch", "triton", "numpy"},
        "dsa_plugin": {"dsa_plugin", "dsa_kernels", "dsa_registry", "torch"},
    }[mine[0]]
    in_hosts = mine[:2] == ["dsa_plugin", "hosts"]
    if in_hosts and mine[2:] and mine[2] in HOSTS:
        allowed = allowed | {mine[2], "transformers"}
    if mine[:2] == ["dsa_plugin", "cli"]:
        allowed = allowed | CLI_LIBRARIES
    elif mine[1:2] == ["explain"]:
        allowed = allowed | EXPLAIN_LIBRARIES
    elif mine[1:2] in (["recipes"], ["doctor"]):
        allowed = allowed | {"packaging", "pydantic", "yaml"}
    elif mine[1:2] == ["chat"]:
        allowed = allowed | {"httpx", "openai"}
    elif mine[1:2] == ["generate"]:
        allowed = allowed | {"safetensors"}
    elif mine[1:2] == ["evaluation"]:
        allowed = allowed | {"httpx", "pydantic"}
    elif mine[1:2] == ["in_transformers"]:
        allowed = allowed | {"transformers"}
    elif mine[1:2] == ["training"]:
        allowed = allowed | {"matplotlib", "safetensors", "tokenizers"}
    elif mine[1:2] == ["verification"]:
        allowed = allowed | {"safetensors", "tokenizers"}
    if in_hosts and theirs[1:2] in (
        ["explain"],
        ["generate"],
        ["in_transformers"],
        ["server_check"],
        ["verification"],
    ):
        return "nothing that serves explains, verifies, or runs a model without its host"
    if mine[1:2] == ["chat"] and theirs[0] in ("torch", "dsa_kernels"):
        return "a conversation with a server needs no torch"
    if mine[:2] != ["dsa_plugin", "cli"] and theirs[:2] == ["dsa_plugin", "cli"]:
        return "nothing imports the command but the command itself"
    if "probe" not in mine and "dsa_plugin" in mine and "probe" in theirs and in_hosts:
        return "nothing that serves interrogates a host"
    is_numbers = theirs[:1] == ["dsa_kernels"] and theirs[1:2] in (["dims"], ["prefill_forms"])
    loads_torch = theirs[0] in ("torch", "dsa_kernels") and not is_numbers
    if mine[:2] == ["dsa_plugin", "planning"] and loads_torch:
        return "a plan needs no torch; of dsa_kernels, dims and prefill_forms load none"
    if theirs[0] not in allowed:
        return f"only {', '.join(sorted(allowed))} and the standard library"
    if theirs[:2] == ["dsa_plugin", "hosts"] and theirs[2:3] != mine[2:3]:
        if theirs[2] in HOSTS:
            return "nothing imports a host but the host itself"
        if not in_hosts:
            return "what hosts share is theirs alone"
    is_op = mine[0] == "dsa_kernels" and len(mine) > 1 and mine[1] in OPS
    if is_op and theirs[0] == "dsa_kernels" and len(theirs) > 1 and theirs[1] in OPS - {mine[1]}:
        return "an op folder never imports another op"
    if mine[-1].endswith("kernel") and "reference" in theirs:
        return "a kernel never leans on the reference it is checked against"
    return None


def imported_by(module: str, path: Path) -> set[str]:
    """Modules of ours that `module` imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imports(tree, module, is_package=path.name == "__init__.py")
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return (found & set(MODULES)) - {module}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, in some steps, all others of its group."""

    def reachable(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }
    return sorted(sorted(group) for group in groups)


def test_no_imports_go_in_circles() -> None:
    """Not even inside a function or for types alone: who reads one file need not read the other."""
    assert circles({module: imported_by(module, path) for module, path in MODULES.items()}) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "d"}}
    assert circles(graph) == [["b", "c"]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"{module} imports {imported}: {why}"
        for imported in imports(tree, module, is_package=path.name == "__init__.py")
        if (why := forbidden(module, imported))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dsa_registry.schema", "import torch"),
        ("dsa_registry.schema", "import dsa_kernels"),
        ("dsa_kernels.layout", "from dsa_registry import lookup"),
        ("dsa_kernels.layout", "import dsa_plugin"),
        ("dsa_plugin.attention", "import vllm"),
        ("dsa_plugin.attention", "def f():\n  from vllm.config import VllmConfig"),
        ("dsa_plugin.attention", "from .hosts import vllm"),
        ("dsa_plugin.attention", "from dsa_plugin.hosts.vllm import register"),
        ("dsa_plugin.attention", "import typer"),
        ("dsa_plugin.attention", "from dsa_plugin.cli import app"),
        ("dsa_plugin.hosts.vllm", "import yaml"),
        ("dsa_plugin.hosts.takeover", "import vllm"),
        ("dsa_plugin.hosts.takeover", "from dsa_plugin.hosts.vllm import register"),
        ("dsa_plugin.attention.layer", "from dsa_plugin.hosts import takeover"),
        ("dsa_plugin.hosts.vllm.model", "from dsa_plugin.hosts.vllm.probe import native"),
        ("dsa_plugin.hosts.vllm.model", "from dsa_plugin.probe.ask import Target"),
        ("dsa_plugin.explain.selections", "import vllm"),
        ("dsa_plugin.hosts.vllm.model", "from dsa_plugin.explain.page import render"),
        ("dsa_plugin.hosts.sglang.pool", "from dsa_plugin.generate.caches import PAGE"),
        ("dsa_plugin.generate.model", "import vllm"),
        ("dsa_plugin.generate.text", "import transformers"),
        ("dsa_plugin.chat.server", "import torch"),
        ("dsa_plugin.hosts.vllm.model", "from dsa_plugin.verification.run import verify"),
        ("dsa_plugin.cli.plan", "import vllm"),
        ("dsa_plugin.evaluation.run", "import vllm"),
        ("dsa_plugin.planning.sizes", "import httpx"),
        ("dsa_plugin.planning.sizes", "import torch"),
        ("dsa_plugin.planning.sizes", "from dsa_kernels.layout import check_latent_cache"),
        ("dsa_plugin.planning.sizes", "from dsa_kernels import layout"),
        ("dsa_plugin.hosts.sglang.model", "import vllm"),
        ("dsa_plugin.hosts.sglang.model", "from ..vllm.model import X"),
        ("dsa_kernels.sparse_mla.api", "from ..topk_select import topk_select"),
        ("dsa_kernels.sparse_mla.api", "from dsa_kernels import topk_select"),
        ("dsa_kernels.sparse_mla.kernel", "from .reference import sparse_mla"),
        ("dsa_kernels.sparse_mla.any_kernel", "from .reference import sparse_mla"),
    ],
)
def test_the_rules_catch(module: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OPS", {"sparse_mla", "topk_select"})
    (imported,) = imports(ast.parse(line), module, is_package=False)
    assert forbidden(module, imported)


def test_every_file_is_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (*PACKAGES, "kernels", "model_registry", "tests", "ci", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > 500} == {}


# Functions with more than 8 parameters, each with its reason; Triton's kernels are not counted.
MANY_PARAMETERS = {
    "dsa_plugin.cli.evaluate.evaluate": "typer makes a flag of each",
    "dsa_plugin.cli.generate.generate": "typer makes a flag of each",
    "dsa_plugin.cli.plan.plan": "typer makes a flag of each",
    "dsa_plugin.cli.train.pretrain": "likewise",
    "dsa_plugin.cli.train.sparse": "likewise",
    "dsa_plugin.cli.train.warmup": "likewise",
    "dsa_plugin.cli.verify.verify": "likewise",
    "dsa_plugin.hosts.vllm.attention.__init__": "vLLM's own",
}


def parameters(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and number of parameters of each function, without self."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if "triton.jit" in decorators or "gluon.jit" in decorators:
            continue
        arguments = node.args.posonlyargs + node.args.args
        names = [argument.arg for argument in arguments + node.args.kwonlyargs]
        yield node.name, len(names) - (names[:1] in (["self"], ["cls"]))


def test_few_functions_take_many_parameters() -> None:
    many = {
        f"{module}.{name}"
        for module, path in MODULES.items()
        for name, number in parameters(ast.parse(path.read_text(encoding="utf-8")))
        if number > 8
    }
    assert many == set(MANY_PARAMETERS)


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        ".".join(path.parent.relative_to(root).parts)
        for root in SOURCE_ROOTS
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders | {"dsa_recipes"}


def test_no_package_shadows_hugging_face_kernels() -> None:
    # Read from the repository's root, `import kernels` must keep finding Hugging Face's package:
    # only a folder without __init__.py loses to it.
    for root in (ROOT / "kernels", ROOT / "model_registry", ROOT / "tests"):
        assert not (root / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


_LOAD = """
import json, sys
before = set(sys.modules)
import dsa_plugin.hosts.{host}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
_MODULES = 24  # 16 with Python 3.11: three of ours, and what logging imports


@pytest.mark.parametrize("host", HOSTS)
def test_loading_the_plugin_is_cheap_and_imports_no_host(host: str) -> None:
    """Hosts load the plugin in every process and for every command, `vllm --help` too."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD.replace("{host}", host)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    ours = [name for name in new if name.startswith("dsa_")]
    assert ours == ["dsa_plugin", "dsa_plugin.hosts", f"dsa_plugin.hosts.{host}"]
    # Without torch in the process, CUDA cannot have been initialised either.
    roots = {name.split(".")[0] for name in new}
    assert not {*HOSTS, "torch", "triton", "transformers", "numpy"} & roots
    assert len(new) <= _MODULES
