"""Asking a host: what a probe that dies becomes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.probe.ask import Answer, ProbeDiedError, Question, Target, ask

MI300X = Target.of(find_gpu("mi300x"), 8)

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
