"""Asking a host: what a probe that dies becomes, and that none loads the host's compiled files."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path

import pytest

from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.probe.ask import Answer, ProbeDiedError, Question, Target, ask
from dsa_plugin.probe.extensions import stand_in_for_extensions
from dsa_plugin.recipes.schema import HostName
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.forced_isa import force_avx2
from dsa_testbed.sglang_server import sglang_python
from dsa_testbed.watched_probe import PLANTED

MI300X = Target.of(find_gpu("mi300x"), 8)
TESTS = Path(__file__).resolve().parents[1]

Script = Callable[[str], str]


@pytest.fixture
def python(tmp_path: Path) -> Script:
    """A program that `ask` takes for a host's python."""

    def script(text: str) -> str:
        path = tmp_path / "python"
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return script


def dying(resolve: str) -> str:
    """A host whose probe answers questions without a model, and does this to the others."""
    return f"""#!{sys.executable}
import os, signal, sys
from dsa_plugin.probe.ask import Answer, answer

def resolve(question):
    if not question.arguments:
        return Answer("a host's refusal")
    sys.stdout.write("half a line")
    sys.stdout.flush()
    print("Only a single TORCH_LIBRARY can be used", file=sys.stderr, flush=True)
    {resolve}

answer(resolve)
"""


@pytest.mark.parametrize(
    ("end", "ending"),
    [
        ("os.abort()", "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getppid(), signal.SIGKILL); os._exit(0)", "SIGKILL"),
    ],
)
def test_a_probe_that_dies_is_no_refusal(python: Script, end: str, ending: str) -> None:
    ask_mi300x = Question(["--model", "a b"], MI300X, {"DSA_PLUGIN": "off"})
    questions = [Question([]), ask_mi300x, Question([])]
    with pytest.raises(ProbeDiedError) as died:
        ask(python(dying(end)), "vllm", questions)
    what, *written = str(died.value).splitlines()
    asked = "`DSA_PLUGIN=off vllm --model 'a b'` on 8 x MI300X (gfx942)"
    assert what.startswith(f"the probe of {asked} ended with {ending}; report it with ")
    assert written == ["half a line", "Only a single TORCH_LIBRARY can be used"]


def test_a_refusal_is_an_answer(python: Script) -> None:
    refusal = Answer("a host's refusal")
    assert ask(python(dying("os.abort()")), "vllm", [Question([])] * 2) == [refusal] * 2


def plant_extension(package: Path, name: str) -> None:
    """A file that the loader of compiled modules takes, and cannot open."""
    package.mkdir(parents=True, exist_ok=True)
    (package / f"{name}{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")


def test_a_compiled_module_of_a_host_is_stood_in_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("a_host", "another"):
        for name in ("_C", "_D"):
            plant_extension(tmp_path / package, name)
    monkeypatch.syspath_prepend(tmp_path)
    # Put back at the end.
    for name in ("create_module", "exec_module"):
        monkeypatch.setattr(ExtensionFileLoader, name, getattr(ExtensionFileLoader, name))
    with pytest.raises(ImportError):
        importlib.import_module("a_host._C")
    stand_in_for_extensions("a_host")
    for name in ("_C", "_D"):
        module = importlib.import_module(f"a_host.{name}")
        assert {key for key in vars(module) if not key.startswith("__")} == set()
    with pytest.raises(ImportError):
        importlib.import_module("another._C")


@pytest.mark.serving
@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_no_probe_loads_a_compiled_file(
    host: HostName, python: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_avx2(monkeypatch)
    if host == "sglang":  # a GPU build has its kernels, in a package of their own
        plant_extension(tmp_path / "site" / "sgl_kernel", "common_ops")
        (tmp_path / "site" / "sgl_kernel" / "__init__.py").write_text("from . import common_ops")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    program = sys.executable if host == "vllm" else sglang_python()
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    watched = python(f'#!/bin/sh\nexec {program} -m dsa_testbed.watched_probe "$@"\n')
    model = ["--model" if host == "vllm" else "--model-path", str(make_checkpoint("v32"))]
    gpus = [Target.of(find_gpu(gpu), 8) for gpu in ("a100-80g", "h200", "mi300x", "mi350x")]
    questions = [
        *(
            Question(model, gpu, {"DSA_PLUGIN": who}, kernels=True)
            for gpu in gpus
            for who in ("off", "on")
        ),
        Question(model, Target.here()),
    ]
    *pretended, here = ask(watched, host, questions)
    # The watch sees what each question imports at its end, where nothing stands in for it.
    planted = PLANTED[host].rpartition(".")[2]
    assert [name.partition(".")[0] for name in here.settled["loaded"]] == [planted]
    for question, found in zip(questions, pretended, strict=False):
        assert (found.error, found.settled["loaded"]) == (None, []), question
    if host == "vllm" and platform.machine() == "x86_64":
        at_start = {name for name in here.settled["before"] if name.startswith("_C")}
        assert at_start == {"_C_AVX2.abi3.so"}
