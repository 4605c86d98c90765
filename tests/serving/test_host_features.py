"""Every flag and variable of both hosts is classified, and what is refused is refused by name."""

import argparse
import ast
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_args

import pytest

from dsa_plugin.doctor.features import faults, load_features, refused_table
from dsa_plugin.hosts.refusal import Refused, refuse
from dsa_plugin.probe.ask import Question, Target, ask
from dsa_plugin.probe.switches import Switch, Switches, flags_of, read_switches
from dsa_plugin.recipes.schema import HostName
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.sglang_server import sglang_python

ROOT = Path(__file__).resolve().parents[2]
A100S = Target("NVIDIA A100-SXM4-80GB", "sm80", 80 << 30, 8)
MODEL_FLAG = {"vllm": "--model", "sglang": "--model-path"}
# Flags without which the host itself ends first.
BESIDE = {
    "--dcp-size": ["--tp-size", "4"],
    "--decode-context-parallel-size": ["--tensor-parallel-size", "2"],
    "--prefill-context-parallel-size": ["--tensor-parallel-size", "2"],
    "--speculative-eagle-topk": ["--speculative-algorithm", "EAGLE"],
}


def load_script() -> Any:
    """ci/host_features.py."""
    spec = spec_from_file_location("host_features", ROOT / "ci" / "host_features.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def python_of(host: HostName) -> str:
    return sys.executable if host == "vllm" else str(sglang_python())


@pytest.fixture(scope="module", params=get_args(HostName))
def host(request: pytest.FixtureRequest) -> HostName:
    name: HostName = request.param
    return name


@pytest.fixture(scope="module")
def switches(host: HostName) -> Switches:
    return read_switches(python_of(host), host)


@pytest.mark.serving
def test_every_switch_is_classified(host: HostName, switches: Switches) -> None:
    assert faults(load_features(host), switches) == []


@pytest.mark.serving
def test_a_new_flag_is_noticed(host: HostName, switches: Switches) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fake-attention", help="Attend to fakes.")
    flags = switches.flags | {flag.name: flag for flag in flags_of(parser)}
    variables = switches.variables | {"FAKE_CACHE": Switch("FAKE_CACHE")}
    assert faults(load_features(host), Switches(switches.version, flags, variables)) == [
        "--fake-attention is new and unclassified: Attend to fakes.",
        "FAKE_CACHE is new and unclassified: ",
    ]


@pytest.mark.serving
def test_a_new_value_and_a_flag_that_is_gone_are_noticed(
    host: HostName, switches: Switches
) -> None:
    cache = switches.flags["--kv-cache-dtype"]
    more = Switch(cache.name, (*cache.values, "int1"), cache.help)
    flags = {name: flag for name, flag in switches.flags.items() if name != "--dtype"}
    found = faults(
        load_features(host),
        Switches(switches.version, flags | {cache.name: more}, switches.variables),
    )
    assert "--kv-cache-dtype int1 is new and unclassified" in found
    assert f"--dtype is classified, and {switches.version} does not have it" in found
    assert len(found) == 2


def test_each_test_named_is_there(host: HostName) -> None:
    features = load_features(host)
    missing = []
    for test in {f.reason for f in features.flags + features.variables if f.classed == "served"}:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(test)
    assert missing == []


@pytest.mark.serving
def test_the_document_is_what_it_says() -> None:
    fix = "run ci/host_features and commit what it writes"
    assert SCRIPT.DOCUMENT.read_text(encoding="utf-8") == SCRIPT.generate(), fix


def question(host: HostName, entry: Refused, model: Path, plugin: str) -> Question:
    """A command line with the example of an entry."""
    arguments = [MODEL_FLAG[host], str(model), *BESIDE.get(entry.name, [])]
    env = {"DSA_PLUGIN": plugin}
    if not entry.at:
        env[entry.name] = entry.example
    elif entry.name.startswith("--speculative-config."):
        values = {"method": '"mtp"', entry.name.partition(".")[2]: f'"{entry.example}"'}
        pairs = ", ".join(f'"{key}": {value}' for key, value in values.items())
        arguments += ["--speculative-config", f'{{{pairs}, "num_speculative_tokens": 2}}']
    else:
        arguments += [entry.name, *([entry.example] if entry.example else [])]
    return Question(arguments, A100S, env)


@pytest.mark.serving
def test_what_is_refused_is_refused_by_name(host: HostName, switches: Switches) -> None:
    """On eight A100s, so that what only GPUs have is asked for too; the host may end before us."""
    model = make_checkpoint("v32")
    known = {*switches.flags, *switches.variables}
    table = [entry for entry in refused_table(host) if entry.name in known]
    questions = [question(host, entry, model, "on") for entry in table]
    answers = ask(python_of(host), host, questions)
    served = [e.name for e, answer in zip(table, answers, strict=True) if answer.error is None]
    assert served == []
    by_us = {
        entry.name
        for entry, answer in zip(table, answers, strict=True)
        if answer.error and f". {entry.name}" in answer.error and entry.why in answer.error
    }
    others = {e.name: a.error for e, a in zip(table, answers, strict=True) if e.name not in by_us}
    assert len(by_us) >= 0.7 * len(table), others


def test_reasons_are_numbered() -> None:
    with pytest.raises(ValueError, match=r"for 2 reasons:\n1\. one\n2\. two"):
        refuse(["one", "two"])
    refuse([])


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        (Refused("--flag", "why", "a.b"), True, "--flag: why; drop the flag"),
        (Refused("--flag", "why", "a.b", (1,)), 2, "--flag 2: why; drop the flag"),
        (Refused("--flag", "why", "a.b"), {"long": "object"}, "--flag: why; drop the flag"),
        (Refused("NAME", "why", instead="unset it"), "1", "NAME=1: why; unset it"),
        (Refused("--flag", "why", "a.b"), None, None),
        (Refused("--flag", "why", "a.b", ("auto",)), "auto", None),
    ],
)
def test_a_reason(entry: Refused, value: object, reason: str | None) -> None:
    assert entry.reason(value) == reason
