"""A model that is none of ours sees nothing of the plugin, which is loaded beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dsa_plugin.doctor.findings import Finding
from dsa_plugin.hosts.refusal import refuse
from dsa_testbed.engine import in_engine, seen_beside_another_model
from dsa_testbed.footprint import replaced
from dsa_testbed.hosts import HOSTS
from dsa_testbed.other_model import write_llama
from dsa_testbed.prompts import text_tokens
from dsa_testbed.sglang_model import with_model

pytestmark = pytest.mark.serving

MAX_TOKENS = 8
PROMPTS = [text_tokens(0, 100), text_tokens(500, 33)]


def expected(folder: Path) -> list[list[int]]:
    """Greedy tokens of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(MAX_TOKENS):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize("host", HOSTS)
def test_it_is_served_as_without_the_plugin(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would take every DSA model there (DSA_PLUGIN=on)."""
    monkeypatch.setenv("DSA_PLUGIN", "on")
    model = write_llama(tmp_path / "llama")
    arguments: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    if host == "vllm":
        seen = in_engine(seen_beside_another_model, model, {"max_model_len": 1024}, **arguments)
    else:
        flags = ("--context-length", "1024")
        seen = with_model("seen_beside_another_model", model, *flags, **arguments)
    tokens, classes, replaced, said = seen
    assert tokens == expected(model)
    assert [name for name in classes if "dsa" in name.lower()] == []
    assert any("LlamaAttention" in name for name in classes)
    assert replaced == []
    assert said == []


def test_what_is_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModuleType("host.layers")
    host.Theirs = type("Theirs", (), {"forward": refuse, "__module__": host.__name__})  # type: ignore[attr-defined]
    host.function, host.layer, host.other = refuse, Finding, Path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, host.__name__, host)
    ours = ["Theirs.forward", "function", "layer"]
    assert replaced("host") == [f"host.layers.{name}" for name in ours]
