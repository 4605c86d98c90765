"""Parameters, weights and caches of a plan, against published totals and real checkpoints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_kernels import layout
from dsa_plugin.convert.formats import converted_config
from dsa_plugin.convert.plan import plan as conversion
from dsa_plugin.convert.run import convert
from dsa_plugin.planning.deployment import PAGE, tokens_that_fit
from dsa_plugin.planning.gpus import GPUS, find_gpu
from dsa_plugin.planning.model import ModelShape, WeightsDtype, find_registered
from dsa_plugin.planning.sizes import (
    INDEX_BYTES,
    LATENT_BYTES,
    CacheDtype,
    active_parameters,
    cache_bytes_per_token,
    model_weights,
    parameters,
    weight_bytes,
)
from dsa_plugin.planning.weight_kernels import weights_note
from dsa_plugin.safetensors_header import read_header
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.deployments import GLM_5, GLM_5_2, V32, deployment


@pytest.mark.parametrize(
    ("model", "mtp", "published"),
    [
        # DeepSeek-V3 report: 671B, and 14B more with MTP; V3.2 adds indexers of 0.9B.
        (V32, False, 671e9),
        # "Model size" of the Hub's pages of these repositories.
        (V32, True, 685e9),
        (GLM_5, True, 754e9),
        (GLM_5_2, True, 753e9),
        # GLM-5 report (arXiv 2602.15763), table of architectures.
        (GLM_5, False, 744e9),
    ],
)
def test_parameters_are_the_published_ones(model: ModelShape, mtp: bool, published: float) -> None:
    assert parameters(model, mtp=mtp) == pytest.approx(published, rel=0.005)


def test_every_parameter_of_v32_is_counted() -> None:
    # What the Hub counts in V3.2-Exp's safetensors, the fp8 scales among them.
    scales = sum(weight.scales("fp8") for weight in model_weights(V32, mtp=True))
    assert parameters(V32, mtp=True) + scales == 685_396_921_376


def test_active_parameters() -> None:
    assert active_parameters(V32) == pytest.approx(37e9, rel=0.02)  # DeepSeek-V3 report
    assert active_parameters(GLM_5) == pytest.approx(40e9, rel=0.025)  # GLM-5 report


def test_weight_bytes_are_the_published_ones() -> None:
    # Size of the released files, as those name it who converted them:
    # eousphoros/DeepSeek-V3.2-NVFP4 "642 GB (FP8)", GiB, and Mapika/GLM-5.2-NVFP4 "1507 GB".
    assert weight_bytes(V32, "fp8", mtp=True) == pytest.approx(642 * 2**30, rel=0.01)
    assert weight_bytes(GLM_5_2, "bf16", mtp=True) == pytest.approx(1507e9, rel=0.01)
    # V3.1, which is V3.2 without indexers: bytes of its files, headers included.
    indexers = [w for w in model_weights(V32, mtp=True) if w.part == "indexer"]
    without = weight_bytes(V32, "fp8", mtp=True) - sum(w.nbytes("fp8") for w in indexers)
    assert without == pytest.approx(688_586_727_753, rel=1e-4)


@pytest.mark.parametrize("name", ["v32-fp8", "glm52-bf16"])
def test_weight_bytes_of_a_checkpoint(name: str) -> None:
    """Byte for byte what a checkpoint of that config holds."""
    checkpoint = make_checkpoint(name)
    model = ModelShape.from_config(name, load_config(checkpoint))
    assert model.weights_dtype == name.partition("-")[2]
    tensors = read_header(checkpoint / "model.safetensors")
    # Of the tests' GLM, the MTP layer repeats embedding and head; of the released one it does not.
    if model.model_type == "glm_moe_dsa":
        del tensors[f"model.layers.{model.num_hidden_layers}.embed_tokens.weight"]
        del tensors[f"model.layers.{model.num_hidden_layers}.shared_head.head.weight"]
    held = sum(end - start for start, end in (t["data_offsets"] for t in tensors.values()))
    assert weight_bytes(model, model.weights_dtype or "bf16", mtp=True) == held


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_weight_bytes_of_a_converted_checkpoint(precision: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert(conversion(make_checkpoint("v32-fp8"), target, precision), 1, lambda _: None)
    model = ModelShape.from_config("converted", load_config(target))
    assert model.weights_dtype == precision
    tensors = read_header(target / "model.safetensors")
    # A host drops a weight's shape, two numbers.
    stored = [t["data_offsets"] for name, t in tensors.items() if not name.endswith("weight_shape")]
    assert weight_bytes(model, precision, mtp=True) == sum(end - start for start, end in stored)


@pytest.mark.parametrize(("dtype", "bits"), [("w8a16", 8), ("w4a16", 4)])
def test_weight_only_is_few_bits_of_the_experts(dtype: WeightsDtype, bits: int) -> None:
    experts = sum(w.parameters for w in model_weights(GLM_5_2, mtp=False) if w.part == "experts")
    rest = parameters(GLM_5_2, mtp=False) - experts
    packed = weight_bytes(GLM_5_2, dtype, mtp=False)
    # 16 bits of scale for 128 values; and the router's bias is fp32.
    assert packed == pytest.approx(experts * (bits + 16 / 128) / 8 + 2 * rest, rel=1e-6)


def test_fp8_weights_without_fp8_units_have_scales_of_their_rows() -> None:
    keys: dict[str, Any] = {"count": 16, "tp": 8, "dp": 2, "ep": 16}
    held = deployment(gpu=find_gpu("a100-80g"), **keys).weight_bytes
    stored = deployment(gpu=find_gpu("h200"), **keys).weight_bytes
    # 2 bytes for 128 values instead of 4 for 128 x 128; nearly all is fp8.
    assert held / stored == pytest.approx((1 + 2 / 128) / (1 + 4 / 128**2), rel=1e-3)
    # Before sm90 linear layers have such scales, and experts, most of the weights, have not.
    partly = deployment(gpu=find_gpu("l40s"), **keys)
    assert stored < partly.weight_bytes < stored + (held - stored) / 10
    bf16 = [deployment(gpu=find_gpu(g), weights_dtype="bf16", **keys) for g in ("a100-80g", "h200")]
    assert bf16[0].weight_bytes == bf16[1].weight_bytes


@pytest.mark.parametrize(
    ("gpu", "dtype", "note"),
    [
        ("a100-80g", "fp8", "a100-80g has no fp8 units: vLLM holds the weights in fp8"),
        ("rtx-3090", "fp8", "SGLang has no kernel for fp8 experts here"),
        ("l40s", "fp8", "on l40s vLLM multiplies fp8 weights of linear layers in bf16 (Marlin)"),
        ("l40s", "bf16", None),
        ("a100-80g", "w4a16", "4-bit experts are multiplied in bf16"),
        ("h200", "w4a16", "4-bit experts are multiplied in bf16"),
        ("a100-80g", "w8a16", "8-bit experts are multiplied in bf16"),
        ("a100-80g", "bf16", None),
        ("h200", "fp8", None),
    ],
)
def test_weights_that_hosts_do_not_multiply_as_they_are(
    gpu: str, dtype: WeightsDtype, note: str | None
) -> None:
    told = weights_note(find_gpu(gpu), dtype)
    assert told is None if note is None else told is not None and note in told


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.uint8)]
)
def test_cache_bytes_are_the_layouts(name: CacheDtype, dtype: torch.dtype) -> None:
    latents = torch.empty(1, PAGE, LATENT_BYTES[name], dtype=torch.uint8).view(dtype)
    keys = torch.empty(1, PAGE, INDEX_BYTES[name], dtype=torch.uint8).view(dtype)
    layout.check_latent_cache(latents)
    layout.check_index_cache(keys)


def test_index_keys_only_where_an_indexer_runs() -> None:
    assert cache_bytes_per_token(V32, "fp8", "fp8", mtp=False) == (61 * 656, 61 * 132)
    assert cache_bytes_per_token(V32, "fp8", "fp8", mtp=True) == (62 * 656, 62 * 132)
    assert cache_bytes_per_token(GLM_5, "bf16", "fp8", mtp=False) == (78 * 1152, 78 * 132)
    assert cache_bytes_per_token(GLM_5_2, "fp8", "fp8", mtp=False) == (78 * 656, 21 * 132)


def test_tokens_fill_whole_pages() -> None:
    assert tokens_that_fit(PAGE * 788 * 3 + 787, 788) == 3 * PAGE
    assert tokens_that_fit(-1, 788) == 0


def test_requests_take_whole_pages() -> None:
    plan = deployment()
    pages = plan.tokens_per_rank() // PAGE
    assert plan.requests_per_rank(PAGE) == plan.requests_per_rank(1) == pages
    assert plan.requests_per_rank(PAGE + 1) == pages // 2
    assert plan.tokens_per_rank("dense") > plan.tokens_per_rank()


@pytest.mark.parametrize(
    ("gpu", "keys", "grown"),
    [
        ("h200", {"tp": 8, "dp": 1, "ep": 1}, (8, 8, 1, 1)),  # it fits
        ("h200", {"count": 1, "tp": 1, "dp": 1, "ep": 1}, (8, 8, 1, 8)),
        ("h200", {"count": 2, "tp": 1, "dp": 2, "ep": 2}, (8, 1, 8, 8)),  # ranks stay as they are
        ("a100-40g", {"count": 4, "tp": 4, "dp": 1, "ep": 1}, (32, 8, 4, 32)),
        ("rtx-4090", {"count": 1, "tp": 1, "dp": 1, "ep": 1}, (64, 8, 8, 64)),
        ("rtx-4090", {"count": 8, "tp": 1, "dp": 8, "ep": 8}, None),  # each has all of attention
        ("a100-40g", {"count": 12, "tp": 4, "dp": 3, "ep": 12}, (24, 4, 6, 24)),
    ],
)
def test_gpus_are_doubled_until_a_request_fits(
    gpu: str, keys: dict[str, Any], grown: tuple[int, ...] | None
) -> None:
    d = deployment(gpu=find_gpu(gpu), context=4096, **keys).grown_to_fit()
    assert (d and (d.count, d.tp, d.dp, d.ep)) == grown
    assert d is None or d.requests_per_rank(4096) > 0


def test_gpus_are_doubled_only_as_heads_and_experts_allow() -> None:
    few = replace(V32, num_attention_heads=2, n_routed_experts=4)
    keys: dict[str, Any] = {"count": 1, "tp": 1, "dp": 1, "ep": 1, "context": 4096}
    grown = [
        deployment(few, gpu=replace(find_gpu("h200"), memory_gib=n), **keys).grown_to_fit()
        for n in (12, 1)
    ]
    assert grown[0] is not None
    assert (grown[0].count, grown[0].tp, grown[0].dp, grown[0].ep) == (4, 2, 2, 4)
    assert grown[1] is None


def test_ranks_together_hold_the_model() -> None:
    whole = weight_bytes(V32, "fp8", mtp=False)
    for tp, dp, ep in ((8, 1, 1), (8, 1, 8), (2, 4, 8)):
        plan = deployment(tp=tp, dp=dp, ep=ep)
        assert 8 * plan.weight_bytes > whole
        copies = sum(
            weight.nbytes("fp8") * {"whole": 7, "tensor": plan.dp - 1, "expert": 0}[weight.split]
            for weight in model_weights(V32, mtp=False)
        )
        assert 8 * plan.weight_bytes == pytest.approx(whole + copies)


def test_experts_that_do_not_divide_are_rounded_up() -> None:
    plan = deployment(count=144, tp=1, dp=144, ep=144, gpu=find_gpu("h800"))
    experts = next(w for w in model_weights(V32, mtp=False) if w.part == "experts")
    assert plan.local_parameters(experts) == pytest.approx(2 / 256 * experts.parameters)


def test_mtp_layers_share_the_vocabulary() -> None:
    more = deployment(mtp=True).weight_bytes - deployment().weight_bytes
    layer = weight_bytes(V32, "fp8", mtp=True) - weight_bytes(V32, "fp8", mtp=False)
    assert 0 < more < layer - 2 * 2 * V32.vocab_size * V32.hidden_size


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tp": 3, "dp": 1}, r"--tp 3 x --dp 1 is 3 GPUs, but --count is 8"),
        ({"count": 12, "tp": 12, "dp": 1, "ep": 1}, r"128 attention heads.*--tp 1, 2, 4 and"),
        ({"ep": 3}, r"--ep 3 must divide --count 8.*use --ep 1, 2, 4, 8"),
        ({"count": 64, "tp": 64, "dp": 1, "ep": 1}, r"whole fp8 blocks of 128.*--ep 64"),
        ({"context": 163_841}, r"at most 163840"),
        ({"context": 0}, r"--context is 0"),
        ({"memory_utilization": 92}, r"--memory-utilization is 92; allowed: above 0, at most 1"),
    ],
)
def test_impossible_deployments(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deployment(**keys)


def test_a_gpu_misspelt() -> None:
    assert find_gpu("RTX_PRO 6000").name == "rtx-pro-6000"
    with pytest.raises(ValueError, match=r"'h2000'.*did you mean h200\? Known: a100-40g"):
        find_gpu("h2000")
    with pytest.raises(ValueError, match=r"'rtx-4'.*did you mean rtx-4090\?"):
        find_gpu("rtx-4")


def test_gpus_have_sources_and_names_of_their_own() -> None:
    assert all(gpu.source.startswith("https://") for gpu in GPUS.values())
    assert len({gpu.device for gpu in GPUS.values()}) == len(GPUS)
    # fp8 units multiply twice as fast as bf16 ones, in all of them.
    assert all(
        gpu.fp8_tflops is None or gpu.fp8_tflops == pytest.approx(2 * gpu.bf16_tflops, rel=0.02)
        for gpu in GPUS.values()
    )


def test_config_of_a_release_gives_the_registered_shape() -> None:
    keys = {key: value for key, value in vars(GLM_5_2).items() if isinstance(value, int)}
    config = keys | {
        "model_type": "glm_moe_dsa",
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
    }
    assert ModelShape.from_config(GLM_5_2.name, config) == GLM_5_2


def test_registered_names() -> None:
    assert find_registered("glm-5.2-fp8") is not None
    assert find_registered("DeepSeek-V3.2") == replace(V32, name="deepseek-ai/DeepSeek-V3.2")
    glm_5_3 = find_registered("GLM-5.3")
    assert glm_5_3 == replace(GLM_5_2, name="zai-org/GLM-5.3", weights_dtype="fp8")
    assert find_registered("GLM-5.4") is None


def _compressed(**group: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "w4a16"),
        (_compressed(weights={"num_bits": 4}), "w4a16"),
        ({"quant_method": "gptq", "bits": 8}, "w8a16"),
        ({"quant_method": "gptq", "bits": 3}, None),
        (converted_config({}, "w8a16")["quantization_config"], "w8a16"),
        (_compressed(weights={"num_bits": 8, "type": "float"}), None),
        (_compressed(weights={"num_bits": 8}, input_activations={"num_bits": 8}), None),
        ({"quant_method": "modelopt"}, None),
    ],
)
def test_quantization(quantization: object, expected: str | None) -> None:
    config = load_config(make_checkpoint("v32-fp8")) | {"quantization_config": quantization}
    assert ModelShape.from_config("model", config).weights_dtype == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3"}, r"'deepseek_v3' is not a DSA model.*known: deepseek_v32"),
        ({"model_type": None}, r"model: config.json's model_type is None; it must name"),
        ({"vocab_size": "2048"}, r"vocab_size is '2048'; allowed: an integer >= 1"),
        ({"kv_lora_rank": 256}, r"kv_lora_rank is 256; allowed: 512"),
        ({"n_shared_experts": -1}, r"model: n_shared_experts is -1; allowed: an integer >= 0"),
    ],
)
def test_bad_config(change: dict[str, object], message: str) -> None:
    config = load_config(make_checkpoint("v32-fp8")) | change
    with pytest.raises(ValueError, match=message):
        ModelShape.from_config("model", config)


def test_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    config = json.loads((make_checkpoint("v32-fp8") / "config.json").read_text())
    del config["vocab_size"], config["index_topk"]
    with pytest.raises(ValueError, match="lacks index_topk, vocab_size; add what"):
        ModelShape.from_config(str(tmp_path), config)
