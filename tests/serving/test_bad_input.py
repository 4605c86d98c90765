"""What cannot be served is refused by name, with the remedy, before a request is taken."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.hosts import HOSTS
from dsa_testbed.server import ServerError
from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving

INDEXER = "model.layers.1.self_attn.indexer"
TESTS = Path(__file__).resolve().parents[1]
Edit = Callable[[dict[str, Any]], object]
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("v32")


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def refusal(host: str) -> Iterator[Refuse]:
    """refusal(model, *flags, env={}): the message with which a host refuses to configure itself."""
    if host == "vllm":
        yield vllm_refusal
        return
    environ = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [str(sglang_python()), "-m", "dsa_testbed.sglang_refusals"],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(model: Path, *flags: str, env: Mapping[str, str] | None = None) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        args = ["--model-path", str(model), *flags]
        process.stdin.write(json.dumps({"args": args, "env": env or {}}) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("refusal: "):
                message = json.loads(line.removeprefix("refusal: "))
                assert message is not None, "SGLang resolved these arguments"
                return str(message)
        raise AssertionError("SGLang's process ended; its output is above")

    yield ask
    process.kill()
    process.wait()


def vllm_refusal(model: Path, *flags: str, env: Mapping[str, str] | None = None) -> str:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(["--model", str(model), *flags])
    assert namespace is not None
    args = EngineArgs.from_cli_args(namespace)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with pytest.raises(ValueError, match=r".") as caught:
            args.create_engine_config()
    return str(caught.value)


def edited(checkpoint: Path, target: Path, *, config: Edit = dict, weights: Edit = dict) -> Path:
    """A copy of the checkpoint with its config.json and its tensors changed in place."""
    shutil.copytree(checkpoint, target)
    numbers = json.loads((target / "config.json").read_text())
    config(numbers)
    (target / "config.json").write_text(json.dumps(numbers))
    if weights is not dict:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda c: c.update(index_topk=0), "index_topk is 0; allowed: an integer >= 1"),
        (lambda c: c.update(index_topk=0), "architectures are [DeepseekV3ForCausalLM]"),
        (lambda c: c.pop("index_n_heads"), "lacks index_n_heads"),
        (lambda c: c.update(index_head_dim=64), "index_head_dim is 64; allowed: 128"),
        (lambda c: c.update(kv_lora_rank=256), "kv_lora_rank is 256; allowed: 512"),
        (lambda c: [c.pop("index_topk"), c.pop("index_head_dim")], "lacks index_"),
    ],
    ids=["topk 0", "dense", "key missing", "index dim", "latent dim", "two keys missing"],
)
def test_config(
    checkpoint: Path, tmp_path: Path, refusal: Refuse, config: Edit, expected: str
) -> None:
    assert expected in refusal(edited(checkpoint, tmp_path / "model", config=config))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            lambda w: w.pop(f"{INDEXER}.weights_proj.weight"),
            f"{INDEXER}.weights_proj.weight is missing; expected shape [",
        ),
        (
            lambda w: w.update(
                {f"{INDEXER}.k_norm.bias": w[f"{INDEXER}.k_norm.bias"][:64].clone()}
            ),
            f"{INDEXER}.k_norm.bias has shape [64]; expected [128]",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith(INDEXER)],
            "(5 faults)",
        ),
    ],
    ids=["half of a fused weight", "misshapen", "whole indexer"],
)
def test_indexer_weights(
    checkpoint: Path, tmp_path: Path, refusal: Refuse, weights: Edit, expected: str
) -> None:
    message = refusal(edited(checkpoint, tmp_path / "model", weights=weights))
    assert expected in message
    assert "Download the checkpoint again" in message


def packed(weights: dict[str, Any], projection: str) -> None:
    """As llm-compressor stores 4-bit weights."""
    rows, columns = weights.pop(f"{INDEXER}.{projection}.weight").shape
    weights[f"{INDEXER}.{projection}.weight_packed"] = torch.zeros(rows, columns // 8).int()
    weights[f"{INDEXER}.{projection}.weight_scale"] = torch.ones(rows, columns // 128)


def in_fp8(weights: dict[str, Any], projection: str) -> None:
    """With its scale lost."""
    name = f"{INDEXER}.{projection}.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("host", "store", "projection", "tensor"),
    [
        ("vllm", packed, "weights_proj", "weight_packed (I32 [16, 32])"),
        ("sglang", packed, "weights_proj", "weight_packed (I32 [16, 32])"),
        ("vllm", packed, "wk", "weight_packed (I32 [128, 32])"),
        ("sglang", packed, "wk", "weight_packed (I32 [128, 32])"),
        ("vllm", in_fp8, "wk", "weight (F8_E4M3 [128, 256])"),
        ("sglang", in_fp8, "weights_proj", "weight (F8_E4M3 [16, 256])"),
    ],
    indirect=["host"],
)
def test_indexer_quantised_where_the_host_does_not_expect_it(
    checkpoint: Path,
    tmp_path: Path,
    refusal: Refuse,
    store: Callable[[dict[str, Any], str], None],
    projection: str,
    tensor: str,
) -> None:
    model = edited(checkpoint, tmp_path / "model", weights=lambda w: store(w, projection))
    message = refusal(model)
    assert f"{INDEXER}.{projection}.{tensor}" in message
    assert "Quantise the model again with these left out" in message


@pytest.mark.parametrize("keep", [4, 1000, 0.5, 0.999])
def test_truncated_safetensors(
    checkpoint: Path, tmp_path: Path, refusal: Refuse, keep: float
) -> None:
    model = edited(checkpoint, tmp_path / "model")
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    message = refusal(model)
    assert str(path) in message
    assert "Download it again" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "DSA_INDEX_CACHE_DTYPE",
            "int4",
            "DSA_INDEX_CACHE_DTYPE='int4'; allowed: auto, model, fp8",
        ),
        ("DSA_LOGITS_WORKSPACE_MB", "0", "allowed: an integer >= 1"),
        ("DSA_INDEX_CACHE_DTPYE", "fp8", "did you mean DSA_INDEX_CACHE_DTYPE?"),
    ],
)
def test_environment(
    checkpoint: Path, refusal: Refuse, name: str, value: str, expected: str
) -> None:
    assert expected in refusal(checkpoint, env={name: value})


ARGUMENTS: dict[str, list[tuple[Sequence[str], str]]] = {
    "vllm": [
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2"),
        (["--kv-cache-dtype", "fp8_e5m2"], "as fp8_ds_mla (656 bytes a token)"),
        (
            ["--kv-cache-dtype", "bfloat16", "--dtype", "float32"],
            "--kv-cache-dtype bfloat16 with a",
        ),
        (["-tp", "3"], "tensor parallel size 3 does not divide num_attention_heads=4"),
        (["--max-model-len", str(1 << 20)], "max_model_len"),
        (
            ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
            "--kv-transfer-config with NixlConnector: ",
        ),
        (["--enable-dbo"], "--enable-dbo: the micro-batches of a step share one buffer"),
        (["--ubatch-size", "2"], "--ubatch-size 2: the micro-batches of a step share one buffer"),
        (["--kv-offloading-size", "1"], "--kv-offloading-size 1.0: "),
    ],
    "sglang": [
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2 with a"),
        (["--kv-cache-dtype", "bf16", "--dtype", "float32"], "in 656 bytes a token (fp8_e4m3)"),
        (["--tp", "3"], "tensor parallel size 3 does not divide num_attention_heads=4"),
        (
            ["--tp", "6", "--dp", "2", "--enable-dp-attention"],
            "tensor parallel size 3 does not divide num_attention_heads=4",
        ),
        (["--tp", "6", "--attn-dp-size", "2"], "tensor parallel size 3 does not divide"),
        (["--page-size", "32"], "--page-size 32: pages hold 64 tokens"),
        (
            ["--enable-return-indexer-topk", "--tp", "2"],
            "--enable-return-indexer-topk with 2 ranks to an attention: ",
        ),
        (
            ["--enable-return-indexer-topk", "--pp-size", "2"],
            "--enable-return-indexer-topk with --pp-size 2: ",
        ),
        (
            ["--enable-return-indexer-topk", "--speculative-algorithm", "NEXTN"],
            "--enable-return-indexer-topk with --speculative-algorithm: ",
        ),
        (["--enable-hisparse"], "--enable-hisparse: "),
        (["--json-model-override-args", '{"index_topk": 0}'], "index_topk is 0; allowed: an"),
        (["--enable-deterministic-inference"], "--enable-deterministic-inference: how attention"),
        (["--rl-on-policy-target", "fsdp"], "--rl-on-policy-target fsdp: it wants"),
        (["--enable-two-batch-overlap"], "--enable-two-batch-overlap: "),
        (["--enable-torch-compile"], "--enable-torch-compile: the plugin's attention is not"),
        (["--enable-lora", "--max-lora-rank", "8"], "--enable-lora: adapters of kv_b_proj"),
        (["--lora-paths", "a=b"], "--lora-paths: adapters of kv_b_proj"),
        (["--enable-hierarchical-cache"], "--enable-hierarchical-cache: SGLang copies"),
        (["--disaggregation-mode", "prefill"], "--disaggregation-mode prefill: SGLang copies"),
        (["--dsa-prefill-backend", "fa3"], "--dsa-prefill-backend fa3: it chooses among SGLang's"),
        (["--speculative-algorithm", "NGRAM"], "--speculative-algorithm NGRAM: "),
        (
            ["--speculative-algorithm", "NEXTN", "--speculative-eagle-topk", "2"],
            "--speculative-eagle-topk 2: ",
        ),
    ],
}


@pytest.mark.parametrize(
    ("host", "args", "expected"),
    [(host, args, expected) for host, cases in ARGUMENTS.items() for args, expected in cases],
    indirect=["host"],
)
def test_arguments(checkpoint: Path, refusal: Refuse, args: Sequence[str], expected: str) -> None:
    assert expected in refusal(checkpoint, *args)


@pytest.mark.parametrize("host", ["sglang"], indirect=True)
def test_every_reason_at_once(checkpoint: Path, refusal: Refuse) -> None:
    message = refusal(checkpoint, "--page-size", "32", "--tp", "3", "--enable-pdmux")
    assert all(flag in message for flag in ("--page-size 32", "parallel size 3", "--enable-pdmux"))


@pytest.mark.parametrize("host", ["sglang"], indirect=True)
def test_contradiction(checkpoint: Path, refusal: Refuse) -> None:
    flags = ("--attention-backend", "torch_native")
    message = refusal(checkpoint, *flags, env={"DSA_PLUGIN": "on"})
    assert "DSA_PLUGIN=on and --attention-backend torch_native contradict each other" in message


@pytest.mark.parametrize("host", ["sglang"], indirect=True)
def test_another_package_of_models(checkpoint: Path, refusal: Refuse) -> None:
    message = refusal(checkpoint, env={"SGLANG_EXTERNAL_MODEL_PACKAGE": "theirs"})
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE=theirs: " in message


@pytest.mark.parametrize("host", ["vllm"], indirect=True)
def test_block_size_of_the_fp8_index_cache(checkpoint: Path, refusal: Refuse) -> None:
    message = refusal(checkpoint, "--block-size", "32", env={"DSA_INDEX_CACHE_DTYPE": "fp8"})
    assert "--block-size 32: pages of the fp8 index cache hold 64 tokens" in message


@pytest.mark.parametrize("host", ["vllm"], indirect=True)
def test_batch_invariance(checkpoint: Path, refusal: Refuse) -> None:
    message = refusal(checkpoint, env={"VLLM_BATCH_INVARIANT": "1"})
    assert "VLLM_BATCH_INVARIANT=1: the kernels divide" in message


@pytest.mark.parametrize("host", ["vllm"], indirect=True)
def test_context_past_yarns_range(tmp_path: Path, checkpoint: Path, refusal: Refuse) -> None:
    def shorten(config: dict[str, Any]) -> None:
        config["rope_scaling"] |= {"original_max_position_embeddings": 128, "factor": 4}
        config["max_position_embeddings"] = 512

    model = edited(checkpoint, tmp_path / "model", config=shorten)
    long = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    message = refusal(model, "--max-model-len", "2048", env=long)
    assert "--max-model-len 2048: the model's RoPE, 128 positions times YaRN factor 4" in message
    assert "use --max-model-len 512" in message


@pytest.mark.parametrize("host", ["vllm"], indirect=True)
def test_pipeline_stage_without_a_selection(refusal: Refuse) -> None:
    """glm52's layers are full, full, shared ...: a stage may not start at a shared one."""
    message = refusal(make_checkpoint("glm52"), "--pipeline-parallel-size", "2")
    assert "--pipeline-parallel-size 2: stage 1 would start at layer 3" in message
    assert "set VLLM_PP_LAYER_PARTITION=2,4" in message  # test_vllm_engine.py serves this one
    message = refusal(make_checkpoint("glm52"), "--pipeline-parallel-size", "6")
    assert "choose another size" in message


def test_drafts_on_pipeline_stages(checkpoint: Path, host: str, refusal: Refuse) -> None:
    if host == "vllm":
        mtp = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}']
        message = refusal(checkpoint, "--pipeline-parallel-size", "2", *mtp)
        assert "--speculative-config with --pipeline-parallel-size 2: vLLM's first" in message
        return
    args, _ = HOSTS[host].settings("mtp", "two_stages")
    message = refusal(checkpoint, *args, env={"SGLANG_ENABLE_PP_SPEC": "1"})
    assert "--speculative-algorithm NEXTN with --pp-size 2: drafts were not run" in message


def test_a_server_ends_with_the_reason(checkpoint: Path, host: str) -> None:
    """The same through the server's command, with the one variable that is read at registration."""
    with (
        pytest.raises(ServerError) as caught,
        HOSTS[host].server(checkpoint, env={"DSA_PLUGIN": "yes"}),
    ):
        pass
    assert "DSA_PLUGIN='yes'; allowed: auto, on, off" in str(caught.value)
