"""Both hosts read of a converted config.json which layers are packed: those that are."""

import os
import sys

import pytest

from dsa_plugin.convert.formats import converted_config
from dsa_testbed.child import ask_child
from dsa_testbed.sglang_server import sglang_python
from dsa_testbed.small_models import small_model

# By the names of either host, which joins some of the checkpoint's layers.
PACKED = {
    "self_attn.q_b_proj": True,
    "self_attn.o_proj": True,
    "mlp.gate_up_proj": True,
    "mlp.down_proj": True,
    "mlp.experts.0.gate_proj": True,
    "mlp.experts.0.up_proj": True,
    "mlp.experts.0.down_proj": True,
    "mlp.shared_experts.gate_up_proj": True,
    "mlp.shared_experts.down_proj": True,
    "mlp.gate": False,
    "self_attn.kv_b_proj": False,
    "self_attn.indexer.wq_b": False,
    "self_attn.indexer.wk": False,
    "self_attn.indexer.wk_weights_proj": False,
    "eh_proj": False,
    "shared_head.head": False,
}
SCHEMES = {
    "vllm": """
import json, sys, torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
""",
    "sglang": """
import json, sys, torch
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
""",
}
ASK = """
asked = json.load(sys.stdin)
config = CompressedTensorsConfig.from_config(asked["config"])
found = []
for joined in asked["joined"]:
    config.packed_modules_mapping = joined
    schemes = [config.get_scheme_dict(torch.nn.Linear(1, 1), name) for name in asked["names"]]
    found.append([s and [s["weights"].num_bits, s["weights"].group_size] for s in schemes])
print(json.dumps(found))
"""
JOINED_BY = {"vllm": "fused_qkv_a_proj", "sglang": "fused_qkv_a_proj_with_mqa"}


@pytest.mark.parametrize("host", SCHEMES)
def test_layers_that_a_host_takes_for_packed(host: str) -> None:
    """Whether or not its model says what its joined projection is made of, as a draft's may not."""
    joined = JOINED_BY[host]
    names = {f"model.layers.3.{name}": packed for name, packed in PACKED.items()}
    names |= {f"model.layers.3.self_attn.{joined}": False, "lm_head": False}
    names |= {f"model.decoder.{name}": packed for name, packed in PACKED.items()}
    config = converted_config(small_model("v32-fp8").config, "w4a16")
    request = {
        "config": config["quantization_config"],
        "joined": [{}, {joined: ["q_a_proj", "kv_a_proj_with_mqa"]}],
        "names": list(names),
    }
    python = sys.executable if host == "vllm" else str(sglang_python())
    for found in ask_child([python, "-c", SCHEMES[host] + ASK], request, os.environ):
        expected = {name: [4, 128] if packed else None for name, packed in names.items()}
        assert dict(zip(names, found, strict=True)) == expected
