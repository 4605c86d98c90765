"""vLLM splits a compiled model at our attention, which piecewise CUDA graphs then leave out."""

import pytest

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("asked", [None, ["vllm::other"]])
def test_our_op_splits_a_compiled_model(asked: list[str] | None) -> None:
    import torch
    from vllm.config import CompilationConfig
    from vllm.config.compilation import CompilationMode

    import dsa_plugin.hosts.vllm.attention  # noqa: F401  registers the op
    from dsa_plugin.hosts.vllm.compat import split_at_attention

    op = torch.ops.vllm.dsa_plugin_attention.default.name()
    hosts_own = list(CompilationConfig._attention_ops)
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, splitting_ops=asked)
    split_at_attention(config)
    config.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    assert config.splitting_ops
    assert {op, *(asked or hosts_own)} <= set(config.splitting_ops)
    assert hosts_own == CompilationConfig._attention_ops


def test_a_model_that_is_not_compiled_is_not_split() -> None:
    from vllm.config import CompilationConfig
    from vllm.config.compilation import CompilationMode

    from dsa_plugin.hosts.vllm.compat import split_at_attention

    config = CompilationConfig(mode=CompilationMode.NONE)
    split_at_attention(config)
    config.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    assert config.splitting_ops == []
