"""Deployments of registered models that tests of plans start from."""

from typing import Any

from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import ModelShape, registered_models

V32, GLM_5, GLM_5_2 = (
    registered_models()[name]
    for name in ("deepseek-ai/DeepSeek-V3.2-Exp", "zai-org/GLM-5", "zai-org/GLM-5.2")
)


def deployment(model: ModelShape = V32, **keys: Any) -> Deployment:
    """A model on 8 H200, attention data-parallel, unless told otherwise."""
    defaults: dict[str, Any] = {
        "model": model,
        "gpu": find_gpu("h200"),
        "count": 8,
        "tp": 1,
        "dp": 8,
        "ep": 8,
        "context": 131_072,
        "kv_dtype": "fp8",
        "index_dtype": "fp8",
        "weights_dtype": model.weights_dtype,
        "mtp": False,
        "memory_utilization": 0.92,
        "prefill_chunk": 8192,
    }
    return Deployment(**(defaults | keys))
