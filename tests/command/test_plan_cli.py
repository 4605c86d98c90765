"""`dsa plan`: what it prints, its exit codes, and where it reads a model from."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest

from dsa_plugin import cli
from dsa_plugin.cli import plan as plan_module
from dsa_plugin.cli.model_config import find_model
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.measured import SHIPPED
from dsa_testbed.checkpoint import make_checkpoint


class Output(NamedTuple):
    code: object
    out: str
    err: str


Dsa = Callable[..., Output]


@pytest.fixture
def dsa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dsa:
    """Runs `dsa` in this process, where no measured kernels are at hand."""

    def run(*args: str) -> Output:
        monkeypatch.setattr(sys, "argv", ["dsa", *args])
        monkeypatch.setattr(plan_module, "_MEASURED", Path("none.json"))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Output(exit_.value.code, captured.out, captured.err)

    return run


_LOAD = """
import sys
from importlib import import_module
from pkgutil import iter_modules
from dsa_plugin import planning
for module in iter_modules(planning.__path__, "dsa_plugin.planning."):
    import_module(module.name)
print(*sorted(name for name in sys.modules if "." not in name or name.startswith("dsa_")))
"""


def test_a_plan_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"dsa_plugin.planning.sizes", "dsa_kernels.dims"} <= loaded
    assert not {"torch", "numpy", "triton"} & loaded


H200 = ("--gpu", "h200", "--count", "8")


def test_tables(dsa: Dsa) -> None:
    code, out, err = dsa("plan", "DeepSeek-V3.2", *H200, "--dp", "8", "--kv-dtype", "fp8")
    assert (code, err) == (0, "")
    assert "deepseek-ai/DeepSeek-V3.2: 671.9B parameters (685.4B with MTP" in out
    assert "8 x h200 (tp 1, dp 8, ep 8): fits" in out
    assert "tokens of 40,016 + 8,052 bytes" in out
    for title in ("Memory of one GPU", "Decode", "Prefill", "Dollars", "DeepSeek's published"):
        assert title in out
    assert "One layer at 131,072: 5 decode(s), a prompt's last chunk" in out
    assert (
        "estimate: H100's measured efficiency on this chip's roofline, of h200's published" in out
    )
    assert "measured:" not in out
    assert "Decode at a context: a plan has every request there, as many as fit; DeepSeek's" in out
    assert "Estimated: activations, and every time and cost, which are sums" in out


def test_json(dsa: Dsa) -> None:
    code, out, _ = dsa("plan", "zai-org/GLM-5.2-FP8", *H200, "--context", "4096", "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["tp"], plan["dp"], plan["ep"], plan["index_dtype"]) == (8, 1, 1, "fp8")
    assert plan["weights_note"] is None
    assert plan["caches"]["latent_bytes_per_token"] == 78 * 1152
    assert plan["caches"]["requests"] == plan["caches"]["tokens"] // 4096
    assert [row["context"] for row in plan["prefill"]] == [2048, 4096]
    assert len(plan["published"]) == 10


def test_what_does_not_fit_exits_with_1(dsa: Dsa) -> None:
    code, out, _ = dsa("plan", "GLM-5.2-FP8", "--gpu", "a100-80g", "--count", "8")
    assert code == 1
    assert "\nNote: a100-80g has no fp8 units: vLLM holds the weights in fp8" in out
    would_do = ["--count", "16", "--tp", "8", "--dp", "2", "--ep", "16"]
    assert f"FIT one request of 131,072 tokens; {' '.join(would_do)} would do; or" in out
    assert dsa("plan", "GLM-5.2-FP8", "--gpu", "a100-80g", *would_do).code == 0


def test_plot(dsa: Dsa, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "cost.png"
    assert dsa("plan", "GLM-5.2-FP8", *H200, "--plot", str(figure)).code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(dsa: Dsa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = dsa("plan", "GLM-5.2-FP8", *H200, "--plot", "cost.png")
    assert code == 2
    assert "--plot needs matplotlib: pip install it" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("GLM-5.3-Flash", *H200), "GLM-5.3-Flash is not served by this plugin: it scores pools"),
        (("GLM-5.4", *H200), "did you mean zai-org/GLM-5.3? Without a network there are:"),
        (("GLM-5.2", "--gpu", "h2000", "--count", "8"), "did you mean h200? Known: a100-40g"),
        (("GLM-5.2", *H200, "--kv-dtype", "fp9"), "'fp9' is not one of 'bf16', 'fp8', 'fp32'"),
        (("GLM-5.2", *H200, "--contxt", "1"), "No such option: --contxt"),
        (("GLM-5.2", *H200, "--gpu-hour-price", "-2"), "--gpu-hour-price is -2.0; allowed: above"),
        (("GLM-5.2", *H200, "--kernels", "none.json"), "'none.json' does not exist"),
        (("GLM-5.2", *H200, "--plot", "cost.foo"), "Format 'foo' is not supported"),
        (("GLM-5.2", "--gpu", "h200", "--count", "0"), "--count is 0; allowed: an integer >= 1"),
        (("GLM-5.2", *H200, "--dp", "0"), "--dp is 0; allowed: an integer >= 1"),
    ],
)
def test_bad_input_is_one_line(dsa: Dsa, args: tuple[str, ...], message: str) -> None:
    code, out, err = dsa("plan", *args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert message in err.splitlines()[-1]


def test_measured_kernels_are_of_the_gpu_named(
    dsa: Dsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "decode 32K, 1 rows, 64 heads, fp8"
    row = {"op": "sparse_mla", "case": case, "flops": 1e9, "bytes": 1e6, "us": 20.0}
    content = {
        "device": "NVIDIA H200",
        "date": "2026-11-25",
        "roofline": {"bandwidth": 4.3e12, "flops": 790e12},
        "rows": [row],
    }
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"kernels": content}))
    (tmp_path / "a100.json").write_text('{"layer": {"rows": []}}')
    out = dsa("plan", "GLM-5.2-FP8", *H200, "--kernels", str(path)).out
    assert (
        f"measured: sparse_mla, on NVIDIA H200, 2026-11-25, {path}; estimate: another form" in out
    )
    assert "estimate: H100's measured efficiency" in out
    plan = json.loads(dsa("plan", "GLM-5.2-FP8", *H200, "--kernels", str(path), "--json").out)
    devices = {row["op"]: case["device"] for row in plan["kernels"] for case in row["measured"]}
    assert devices["sparse_mla"] == "NVIDIA H200"
    assert devices["topk_select"] == "NVIDIA H100 80GB HBM3"
    other = ("plan", "GLM-5.2-FP8", "--gpu", "b200", "--count", "8")
    assert "was measured on NVIDIA H200, not on b200" in dsa(*other, "--kernels", str(path)).err
    # Unasked, a file of the repository serves only the GPU that it is of.
    monkeypatch.setattr(plan_module, "_MEASURED", tmp_path)
    shipped = plan_module._figures(find_gpu("b200"), None)
    assert [each.path for each in shipped] == [SHIPPED]
    own, *rest = plan_module._figures(find_gpu("h200"), None)
    assert own.path == path
    assert [each.path for each in rest] == [SHIPPED]


def test_an_h100s_times_are_measured(dsa: Dsa) -> None:
    args = ("plan", "DeepSeek-V3.2", "--gpu", "h100", "--count", "16", "--dp", "16")
    out = dsa(*args, "--kv-dtype", "fp8").out
    assert "measured: " in out
    assert "on NVIDIA H100 80GB HBM3, 2026-11-2" in out
    assert "estimate: H100" not in out
    assert "estimate: another form of these, and kernels that were others then: " in out
    assert "roofline: every other op, dense attention too, by h100's published peaks" in out
    plan = json.loads(dsa(*args, "--kv-dtype", "fp8", "--json").out)
    basis = {row["op"]: row["basis"] for row in plan["kernels"]}
    assert (basis["sparse_mla"], basis["experts"]) == ("measured", "roofline")
    [case] = [row for row in plan["kernels"] if row["op"] == "sparse_mla"][-1]["measured"]
    assert set(case) == {"case", "us", "device", "date", "triton", "config", "source", "former"}


def test_a_folder(dsa: Dsa) -> None:
    folder = make_checkpoint("v32-fp8")
    out = dsa("plan", str(folder), "--gpu", "rtx-4090", "--count", "1", "--context", "4096").out
    assert f"{folder}: 0.0B parameters" in out
    assert "fits" in out


def test_a_repository_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*args: str, local_files_only: bool) -> str:
        asked.append((*args, local_files_only))
        return str(make_checkpoint("v32-fp8") / "config.json")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_model("someone/small-v32").num_hidden_layers == 4
    assert asked == [("someone/small-v32", "config.json", False)]
    # Registered releases ask nobody.
    assert find_model("zai-org/GLM-5.2").num_hidden_layers == 78
    assert len(asked) == 1


def test_a_repository_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str) -> None:
        raise ConnectionError(f"no network to {url}\nand more")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(ValueError, match=r"someone/x .*ConnectionError: no network.*HF_") as caught:
        find_model("someone/x")
    assert "\n" not in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    for text, message in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_model(str(tmp_path))
