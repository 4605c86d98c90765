"""`dsa doctor`: what it prints, its JSON and its exit codes; a stand-in answers for the host."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsa_plugin import cli
from dsa_plugin.doctor import report, serving
from dsa_plugin.doctor.findings import Finding
from dsa_plugin.doctor.serving import Serving
from dsa_plugin.probe.ask import Answer, ProbeDiedError, Question
from dsa_plugin.probe.host_kernel import HostKernel, ask_host_code
from dsa_plugin.probe.our_kernels import our_kernels
from dsa_plugin.recipes import launch


class Output(NamedTuple):
    code: object
    out: str
    err: str


Dsa = Callable[..., Output]
NATIVE = [
    {"op": "cache_write", "verdict": "unchecked", "text": "somewhere"},
    {"op": "indexer_logits", "verdict": "yes", "text": "DeepGEMM"},
    {"op": "topk_select", "verdict": "unchecked", "text": "auto"},
    {"op": "sparse_mla", "verdict": "no", "text": "capability not supported"},
]
OURS = dict.fromkeys(("cache_write", "indexer_logits", "topk_select", "sparse_mla"), "Triton")


class Host:
    """Answers as a host would that refuses sparse_mla; a test changes what it answers."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.served_by = {"off": "vllm", "auto": "dsa_plugin"}
        self.native = NATIVE
        self.ours = OURS
        self.error: str | None = None

    def ask(self, python: str, host: str, questions: list[Question]) -> list[Answer]:
        assert (python, host) == (sys.executable, "vllm")
        self.asked = questions
        return [self.answer(question.env["DSA_PLUGIN"]) for question in questions]

    def answer(self, mode: str) -> Answer:
        if self.error and mode != "off":
            return Answer(self.error)
        by = self.served_by[mode]
        return Answer(None, {"served_by": by, "native": self.native, "ours": self.ours})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(serving, "ask", host.ask)
    monkeypatch.setattr(report, "examine_environment", lambda name: [Finding(name, True, "0.32.0")])
    monkeypatch.delenv("DSA_PLUGIN", raising=False)
    return host


@pytest.fixture
def dsa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dsa:
    def run(*args: str) -> Output:
        monkeypatch.setattr(sys, "argv", ["dsa", "doctor", *args])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Output(exit_.value.code, captured.out, captured.err)

    return run


def test_both_families_by_default(dsa: Dsa, host: Host) -> None:
    code, out, err = dsa("--gpu", "a100")
    assert (code, err) == (0, "")
    assert out.startswith("vllm on 8 x a100-80g\n\nok   vllm: 0.32.0\n")
    for model in ("deepseek-ai/DeepSeek-V3.2", "zai-org/GLM-5.2"):
        for cache in ("bfloat16", "fp8_ds_mla"):
            assert f"{model}, --kv-cache-dtype {cache}: served by the plugin\n" in out
    assert "sparse_mla      vllm alone: no: capability not supported\n" in out
    assert "cache_write     vllm alone: not checked before it runs: somewhere\n" in out
    assert out.count("the plugin: Triton") == 16
    # Without --model only the families are asked about, not whether weights fit.
    assert "memory" not in out
    first = host.asked[0]
    assert first.arguments[2:] == ["--tensor-parallel-size", "8", "--kv-cache-dtype", "bfloat16"]
    assert first.target
    assert (first.target.arch, first.target.count, first.kernels) == ("sm80", 8, True)


@pytest.mark.usefixtures("host")
def test_json(dsa: Dsa) -> None:
    code, out, _ = dsa("--gpu", "h200", "--model", "DeepSeek-V3.2", "--count", "16", "--json")
    answer = json.loads(out)
    assert code == 0
    assert list(answer) == ["host", "gpu", "count", "findings", "serving", "blocked"]
    assert (answer["host"], answer["gpu"], answer["count"]) == ("vllm", "h200", 16)
    assert answer["blocked"] is False
    assert [list(finding) for finding in answer["findings"]] == [
        ["what", "ok", "text", "remedy"]
    ] * 2
    first = answer["serving"][0]
    assert first["native"] == NATIVE
    assert first["ours"] == OURS
    assert {key: first[key] for key in ("host", "gpu", "model", "cache_dtype", "served_by")} == {
        "host": "vllm",
        "gpu": "h200",
        "model": "DeepSeek-V3.2",
        "cache_dtype": "bfloat16",
        "served_by": "dsa_plugin",
    }
    assert (first["native_error"], first["refusal"], first["blocker"]) == (None, None, None)


@pytest.mark.usefixtures("host")
def test_a_model_that_does_not_fit_exits_with_1(dsa: Dsa) -> None:
    code, out, _ = dsa("--gpu", "a100", "--model", "DeepSeek-V3.2")
    assert code == 1
    assert "FAIL memory: weights take 81 of 80 GiB on each of 8 x a100-80g\n" in out
    assert "     what would work: 16 GPUs, or a smaller checkpoint; `dsa plan" in out


def test_left_to_a_host_that_refuses(dsa: Dsa, host: Host) -> None:
    host.served_by["auto"] = "vllm"
    code, out, _ = dsa("--gpu", "h200")
    assert code == 1
    refusal = "left to vllm, which refuses: sparse_mla: capability not supported; DSA_PLUGIN=on"
    assert out.count(f"  FAIL {refusal} has the plugin serve it\n") == 4
    assert "served by vllm\n" in out


def test_left_to_a_host_because_the_plugin_is_not_loaded(dsa: Dsa, host: Host) -> None:
    host.served_by["auto"], host.ours = "vllm", {}
    code, out, _ = dsa("--gpu", "h200")
    assert code == 1
    assert "capability not supported; the plugin is not loaded\n" in out
    assert "the plugin: does not run\n" in out


def test_the_environment_decides_who_serves(
    dsa: Dsa, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSA_PLUGIN", "off")
    assert dsa("--gpu", "a100").code == 1
    assert {question.env["DSA_PLUGIN"] for question in host.asked} == {"off"}


def test_left_to_a_host_that_serves(dsa: Dsa, host: Host) -> None:
    host.served_by["auto"] = "vllm"
    host.native = [kernel | {"verdict": "yes"} for kernel in NATIVE]
    assert dsa("--gpu", "h200").code == 0


def test_refused_by_both(dsa: Dsa, host: Host) -> None:
    host.error = "ValueError: LoRA"
    code, out, _ = dsa("--gpu", "h200")
    assert code == 1
    assert "served by nobody\n  FAIL ValueError: LoRA\n" in out


@pytest.mark.usefixtures("host")
def test_a_finding_exits_with_1(dsa: Dsa, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Finding("torch", False, "another", "reinstall")
    monkeypatch.setattr(report, "examine_environment", lambda _: [fault])
    code, out, _ = dsa("--gpu", "a100")
    assert code == 1
    assert "FAIL torch: another\n     what would work: reinstall\n" in out


def test_a_host_that_does_not_answer(dsa: Dsa, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*_: Any) -> list[Answer]:
        raise ValueError("vllm did not answer (exit code 1):\nTraceback\nImportError: cli_args")

    monkeypatch.setattr(serving, "ask", no_answer)
    code, out, err = dsa("--gpu", "a100")
    assert (code, err, host.asked) == (1, "", [])
    assert "FAIL asking vllm: ImportError: cli_args\n     what would work: vllm's log" in out


@pytest.mark.usefixtures("host")
def test_a_probe_that_dies_refuses_nothing(dsa: Dsa, monkeypatch: pytest.MonkeyPatch) -> None:
    what = "the probe of `vllm` on 8 x A100 (sm80) ended with SIGABRT"

    def die(*_: Any) -> list[Answer]:
        raise ProbeDiedError(what, "line 1\nline 2")

    monkeypatch.setattr(serving, "ask", die)
    code, out, err = dsa("--gpu", "a100")
    assert (code, err) == (1, "")
    fault = f"FAIL asking vllm: {what}:\nline 1\nline 2\n"
    assert f"{fault}     what would work: report it with what was written: " in out
    assert "served by" not in out


def test_this_machine(dsa: Dsa, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "examine_device", lambda: [Finding("GPU", True, "none")])
    code, out, _ = dsa()
    assert code == 0
    assert out.startswith("vllm on this machine\n")
    assert "ok   GPU: none\n" in out
    assert host.asked[0].target
    assert host.asked[0].target.arch == ""


def test_a_folder_keeps_its_own_config(dsa: Dsa, host: Host, tmp_path: Path) -> None:
    from dsa_testbed.small_models import small_model

    config = small_model("glm52").config
    del config["indexer_rope_interleave"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = dsa("--gpu", "h200", "--model", str(tmp_path))
    assert code == 1
    assert "FAIL RoPE of the indexer: config.json lacks indexer_rope_interleave" in out
    # Its 4 heads are for 4 ranks at most.
    assert host.asked[0].arguments[1:4] == [str(tmp_path), "--tensor-parallel-size", "4"]


def test_a_host_that_is_not_installed(dsa: Dsa, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = dsa("--host", "sglang", "--gpu", "h200")
    assert (code, err) == (1, "")
    assert "FAIL sglang: not installed in " in out
    assert out.endswith("\nNothing more can be asked.\n")
    monkeypatch.setattr(launch, "installed_version", lambda _: None)
    code, out, err = dsa("--gpu", "h200")
    assert (code, out) == (2, "")
    assert err.startswith("Error: neither vllm nor sglang is installed in ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "/no/such/folder"), "'/no/such/folder' is no folder and no repository"),
        (("--model", "GLM-5.4"), "did you mean zai-org/GLM-5.3? Without a network there are:"),
        (("--gpu", "h2000"), "did you mean h200? Known: a100-40g"),
        (("--host", "triton"), "--host triton; allowed: vllm, sglang"),
        (("--gpu", "h200", "--count", "0"), "--count is 0; allowed: an integer >= 1"),
        (("--modle", "x"), "No such option: --modle"),
    ],
)
def test_bad_usage_is_one_line(dsa: Dsa, args: tuple[str, ...], message: str) -> None:
    code, out, err = dsa(*args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert message in err.splitlines()[-1]


def test_a_misspelt_variable(dsa: Dsa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_PLUGINS", "on")
    code, _, err = dsa("--gpu", "h200")
    assert code == 2
    assert "DSA_PLUGINS is not a variable of dsa-plugin; did you mean DSA_PLUGIN?" in err


def test_help_documents_the_exit_codes(dsa: Dsa) -> None:
    out = " ".join(dsa("--help").out.split())
    assert "Exits with 0 where everything asked about is served" in out
    assert "with 1 where something stands in the way; with 2 where the command itself" in out


def test_a_host_that_cannot_be_asked_has_not_refused() -> None:
    def check() -> str:
        raise AttributeError("no such function")

    unasked = HostKernel("sparse_mla", "unchecked", "could not be asked: AttributeError: no such f")
    found = ask_host_code("sparse_mla", check, ValueError)
    assert replace(found, text=found.text[: len(unasked.text)]) == unasked
    assert ask_host_code("sparse_mla", check, ValueError, instead="fa3").text.startswith("fa3; cou")
    assert ask_host_code("sparse_mla", check, AttributeError).verdict == "no"
    assert ask_host_code("sparse_mla", lambda: "fa3").verdict == "yes"


def test_a_host_that_ended_before_it_chose() -> None:
    ended = Serving("vllm", "h200", "m", "auto", (), "ValueError: no", {}, "vllm", None)
    assert ended.native_refusals == ["ValueError: no"]
    assert ended.blocker == "left to vllm, which refuses: ValueError: no; the plugin is not loaded"


def test_our_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa_kernels.dispatch import use_triton

    def ours(**variables: str) -> dict[Any, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        use_triton.cache_clear()
        return our_kernels(fp8_latents=True)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = {
        "cache_write": "torch, reference",
        "indexer_logits": "torch, for CPUs",
        "topk_select": "torch, for CPUs",
        "sparse_mla": "torch, for CPUs",
    }
    assert ours() == on_cpu
    assert ours(TRITON_INTERPRET="1") == {
        # The latents; index keys are in the model's dtype on a CPU.
        "cache_write": "Triton for sm80, e4m3 by integers",
        "indexer_logits": "Triton for sm80",
        "topk_select": "Triton for sm80",
        "sparse_mla": "Triton for sm80, e4m3 by integers",
    }
    with pytest.raises(ValueError, match="DSA_KERNELS='cuda'; allowed"):
        ours(DSA_KERNELS="cuda")
    use_triton.cache_clear()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["A=1", "vllm", "serve", "m", "-tp", "2"], ("vllm", ["m", "-tp", "2"], {"A": "1"})),
        (["python", "-m", "sglang.launch_server", "--tp", "2"], ("sglang", ["--tp", "2"], {})),
    ],
)
def test_a_command_line_is_taken_apart(words: list[str], expected: object) -> None:
    from dsa_plugin.doctor.command_line import split_command

    assert split_command(words) == expected


def test_a_command_that_starts_no_server() -> None:
    from dsa_plugin.doctor.command_line import split_command

    with pytest.raises(ValueError, match="starts no server; allowed after --: `vllm serve`"):
        split_command(["vllm", "bench"])
