"""What is refused is refused by name and at once; what is taken is; other models hear nothing.

On eight A100s, so that what only GPUs have is asked for too. One process a host answers for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from dsa_plugin.doctor.features import load_features, refused_table
from dsa_plugin.doctor.serving import MODEL_FLAG
from dsa_plugin.hosts.refusal import Refused
from dsa_plugin.probe.ask import Answer, Question, Target, ask
from dsa_plugin.recipes.schema import HostName
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.other_model import write_llama
from dsa_testbed.switches import python_of, switches_of

pytestmark = pytest.mark.serving

A100S = Target("NVIDIA A100-SXM4-80GB", "sm80", 80 << 30, 8)
# Flags without which the host itself ends first.
BESIDE = {
    "--dcp-size": ["--tp-size", "4"],
    "--decode-context-parallel-size": ["--tensor-parallel-size", "2"],
    "--prefill-context-parallel-size": ["--tensor-parallel-size", "2"],
    "--speculative-eagle-topk": ["--speculative-algorithm", "EAGLE"],
}
# Refused flags of every kind together, and the beginning of each reason.
TOGETHER: dict[HostName, tuple[list[str], dict[str, str], list[str]]] = {
    "vllm": (
        [
            *("--enable-dbo", "--cpu-offload-gb", "1", "--kv-cache-dtype", "fp8_e5m2"),
            *("--attention-config", '{"sparse_mla_force_mqa": true}', "-tp", "3"),
            *("--block-size", "32", "--kv-offloading-size", "1"),
        ],
        {"VLLM_BATCH_INVARIANT": "1", "DSA_INDEX_CACHE_DTYPE": "fp8"},
        [
            *("--enable-dbo: ", "--cpu-offload-gb 1", "--kv-cache-dtype fp8_e5m2 with"),
            *("--attention-config.sparse_mla_force_mqa: ", "tensor parallel size 3 does not"),
            *("--block-size 32: ", "--kv-offloading-size 1", "VLLM_BATCH_INVARIANT=1: "),
        ],
    ),
    "sglang": (
        [
            *("--enable-pdmux", "--cpu-offload-gb", "1", "--kv-cache-dtype", "fp8_e5m2"),
            *("--dsa-prefill-backend", "fa3", "--tp-size", "3", "--page-size", "32"),
            *("--enable-torch-compile", "--enable-memory-saver"),
        ],
        {"SGLANG_DSA_TOPK_BROADCAST": "1"},
        [
            *("--enable-pdmux: ", "--cpu-offload-gb 1: ", "--kv-cache-dtype fp8_e5m2 with"),
            *("--dsa-prefill-backend fa3: ", "tensor parallel size 3 does not"),
            *("--page-size 32: ", "--enable-torch-compile: ", "--enable-memory-saver: "),
            "SGLANG_DSA_TOPK_BROADCAST=1: ",
        ],
    ),
}
# Of the cache: what is settled on, with a model in bf16, or in float16 where that is named.
CACHES: dict[HostName, dict[str, str]] = {
    "vllm": {"auto": "auto", "bfloat16": "bfloat16", "float16": "float16"},
    "sglang": {"auto": "auto", "bf16": "bf16", "bfloat16": "bfloat16"},
}
BACKEND_FLAGS = ["--attention-backend", "--prefill-attention-backend", "--decode-attention-backend"]
# Refused for a DSA model, and any other's business.
OF_OTHERS: dict[HostName, list[str]] = {
    "vllm": ["--cpu-offload-gb", "1", "--kv-cache-dtype", "fp8_e5m2", "--block-size", "32"],
    "sglang": ["--enable-memory-saver", "--kv-cache-dtype", "fp8_e5m2", "--page-size", "32"],
}


def arguments_of(entry: Refused) -> tuple[list[str], dict[str, str]]:
    """Flags and variables with the example of an entry."""
    if not entry.at:
        return [], {entry.name: entry.example}
    if entry.name.startswith("--speculative-config."):
        values = {"method": '"mtp"', entry.name.partition(".")[2]: f'"{entry.example}"'}
        pairs = ", ".join(f'"{key}": {value}' for key, value in values.items())
        return ["--speculative-config", f'{{{pairs}, "num_speculative_tokens": 2}}'], {}
    given = [entry.name, *([entry.example] if entry.example else [])]
    return [*BESIDE.get(entry.name, []), *given], {}


Asked = dict[str, Answer]


@pytest.fixture(scope="module", params=get_args(HostName))
def host(request: pytest.FixtureRequest) -> HostName:
    name: HostName = request.param
    return name


@pytest.fixture(scope="module")
def asked(host: HostName, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Every answer, by what the question was about."""
    switches = switches_of(host)
    known = {*switches.flags, *switches.variables}
    folder = tmp_path_factory.mktemp("models")
    other = write_llama(folder / "llama")
    model, in_bf16 = make_checkpoint("v32"), make_checkpoint("v32-bf16")

    def question(at: Path, flags: list[str], **env: str) -> Question:
        return Question([MODEL_FLAG[host], str(at), *flags], A100S, {"DSA_PLUGIN": "on"} | env)

    questions: dict[str, Question] = {}
    for entry in refused_table(host):
        if entry.name in known:
            flags, env = arguments_of(entry)
            questions[entry.name] = question(model, flags, **env)
    for feature in load_features(host).flags:
        taken = switches.flags[feature.name].values if feature.value else ()
        if feature.value in taken and feature.classed == "refused":
            name = f"{feature.name} {feature.value}"
            questions[name] = question(model, name.split())
    flags, env, _ = TOGETHER[host]
    questions["together"] = question(model, flags, **env)
    for value in CACHES[host]:
        flags = ["--kv-cache-dtype", value, *(["--dtype", value] if value == "float16" else [])]
        questions[f"cache {value}"] = question(in_bf16, flags)
    for flag in BACKEND_FLAGS if host == "sglang" else []:
        for named in ("dsa_plugin", "flashinfer"):
            questions[f"{flag} {named}"] = question(model, [flag, named], DSA_PLUGIN="auto")
    for plugin in ("on", "off"):
        questions[f"other, {plugin}"] = question(other, OF_OTHERS[host], DSA_PLUGIN=plugin)
    answers = ask(python_of(host), host, questions.values())
    return dict(zip(questions, answers, strict=True))


def reasons(answer: Answer) -> str:
    assert answer.error is not None
    return answer.error


def test_what_is_refused_is_refused_by_name(host: HostName, asked: Asked) -> None:
    """The host may end before us, on what is listed as such."""
    why = {entry.name: entry.why for entry in refused_table(host)}
    refused = {name: answer for name, answer in asked.items() if name.partition(" ")[0] in why}
    refused |= {name: a for name, a in asked.items() if name.startswith("--kv-cache-dtype ")}
    assert [name for name, answer in refused.items() if answer.error is None] == []
    by_us = {
        name
        for name, answer in refused.items()
        if f". {name}" in reasons(answer) and why.get(name, "") in reasons(answer)
    }
    others = {name: answer.error for name, answer in refused.items() if name not in by_us}
    assert set(others) == load_features(host).host_first, others
    assert len(by_us) >= 0.7 * len(refused)


def test_all_reasons_come_in_one_message(host: HostName, asked: Asked) -> None:
    """Before weights load: what is asked here never comes to that."""
    message = reasons(asked["together"])
    expected = TOGETHER[host][2]
    assert f"dsa_plugin cannot serve this model as asked, for {len(expected)} reasons:" in message
    assert [reason for reason in expected if f". {reason}" not in message] == []


def test_cache_dtypes_that_are_taken(host: HostName, asked: Asked) -> None:
    for value, settled in CACHES[host].items():
        answer = asked[f"cache {value}"]
        assert answer.error is None
        assert answer.settled["served_by"] == "dsa_plugin"
        assert answer.settled["kv_cache_dtype"] == settled


@pytest.mark.parametrize("host", ["sglang"], indirect=True)
@pytest.mark.parametrize("flag", BACKEND_FLAGS)
@pytest.mark.parametrize(("named", "by"), [("dsa_plugin", "dsa_plugin"), ("flashinfer", "sglang")])
def test_a_backend_that_is_named_decides(asked: Asked, flag: str, named: str, by: str) -> None:
    answer = asked[f"{flag} {named}"]
    assert answer.settled.get("served_by", "sglang") == by
    assert "dsa_plugin cannot" not in str(answer.error)


def test_refusals_do_not_concern_another_model(asked: Asked) -> None:
    with_us, without = asked["other, on"], asked["other, off"]
    assert with_us == without
    assert with_us.error is None
    assert with_us.settled["served_by"] != "dsa_plugin"
