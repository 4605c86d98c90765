"""Every flag and variable of both hosts is classified; what is served has a test that sets it."""

import ast
import os
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_args

import pytest

from dsa_plugin.doctor.features import Feature, faults, load_features
from dsa_plugin.hosts.refusal import Refused, refuse
from dsa_plugin.probe.switches import Switch, Switches, read_switches
from dsa_plugin.recipes.schema import HostName
from dsa_testbed.new_switch import FLAG, HELP, VARIABLE
from dsa_testbed.switches import python_of, switches_of

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# Tests that set a switch without its name: how it reads there.
SET_AS = {
    "--compilation-config": "CompilationConfig",
    "--compilation-config.mode": "CompilationMode",
    "--model-path": "launcher",  # of every server
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


@pytest.fixture(scope="module", params=get_args(HostName))
def host(request: pytest.FixtureRequest) -> HostName:
    name: HostName = request.param
    return name


@pytest.fixture(scope="module")
def switches(host: HostName) -> Switches:
    return switches_of(host)


@pytest.mark.serving
def test_every_switch_is_classified(
    host: HostName, switches: Switches, capsys: pytest.CaptureFixture[str]
) -> None:
    code = SCRIPT.check({host: switches})
    assert capsys.readouterr().out == "every switch is classified\n"
    assert code == 0


@pytest.mark.serving
def test_a_new_flag_is_noticed(
    host: HostName,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the host's own parser and table of variables, as `ci/host_features --check` reads them."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {python_of(host)} -m dsa_testbed.new_switch "$@"\n')
    python.chmod(0o755)
    grown = read_switches(str(python), host)
    assert SCRIPT.check({host: grown}) == 1
    release = f"{SCRIPT.TITLES[host]} {grown.version}"
    assert capsys.readouterr().out.splitlines() == [
        f"{release}: {FLAG} is new and unclassified: {HELP}",
        f"{release}: {VARIABLE} is new and unclassified: ",
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


def reads(test: str) -> str:
    """What a test runs: its function, what its file has outside of tests, and the testbed it uses.

    Empty where there is no such test.
    """
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    body = ast.parse(text).body
    is_test = [isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in body]
    mine = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not mine:
        return ""
    outside = [node for node, left in zip(body, is_test, strict=True) if not left]
    parts = [ast.get_source_segment(text, node) or "" for node in (*outside, *mine)]
    used = re.findall(r"from dsa_testbed\.(\w+) import", "\n".join(parts))
    if "hosts" in used:
        used += ["server", "sglang_server"]
    parts += [(TESTS / "dsa_testbed" / f"{module}.py").read_text() for module in used]
    decorators = [node for each in mine for node in each.decorator_list]
    parts += [ast.get_source_segment(text, node) or "" for node in decorators]
    return "\n".join(parts)


def sets(text: str, feature: Feature) -> bool:
    """Whether a test's text has the switch, or the field that it sets, and its value."""
    field = feature.name.rpartition(".")[2]
    spelt = {feature.name, field, field.lstrip("-").replace("-", "_"), SET_AS.get(feature.name)}

    def has(word: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None

    return any(map(has, filter(None, spelt))) and (not feature.value or has(feature.value))


def test_each_test_that_is_named_sets_the_switch(host: HostName) -> None:
    features = load_features(host)
    served = [f for f in features.flags + features.variables if f.classed == "served"]
    texts = {test: reads(test) for test in {feature.reason for feature in served}}
    assert [test for test, text in texts.items() if not text] == []
    wrong = [f"{f.name} {f.value}: {f.reason}" for f in served if not sets(texts[f.reason], f)]
    assert wrong == []


def test_a_test_that_does_not_set_a_switch_is_noticed() -> None:
    engine = "tests/serving/test_vllm_engine.py"
    lora = reads(f"{engine}::test_lora")
    assert sets(lora, Feature("--max-lora-rank", "served", ""))
    assert not sets(lora, Feature("--weight-transfer-config", "served", ""))
    assert not sets(lora, Feature("--max-lora-rank", "served", "", "12345"))
    assert not sets(
        reads(f"{engine}::test_pipeline_stages"), Feature("--max-lora-rank", "served", "")
    )
    assert reads(f"{engine}::test_nothing") == ""


@pytest.mark.serving
def test_the_document_is_what_it_says() -> None:
    fix = "run ci/host_features and commit what it writes"
    written = SCRIPT.document({host: switches_of(host) for host in get_args(HostName)})
    assert SCRIPT.DOCUMENT.read_text(encoding="utf-8") == written, fix


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
