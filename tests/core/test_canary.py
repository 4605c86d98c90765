"""What says that a release of vLLM no longer takes the path that the plugin replaces."""

import pytest


def test_a_layer_built_in_another_way_is_refused() -> None:
    pytest.importorskip("vllm")
    from torch import nn
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer

    from dsa_plugin.hosts.vllm.attention import DSAAttention
    from dsa_plugin.hosts.vllm.model import check_that_it_took

    def bare(cls: type[nn.Module], **children: nn.Module) -> nn.Module:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, child in children.items():
            module.add_module(name, child)
        return module

    ours = bare(DeepseekV2DecoderLayer, attention=bare(DSAAttention))
    theirs = bare(DeepseekV2DecoderLayer, attention=nn.Linear(1, 1))
    check_that_it_took(nn.ModuleList([ours, ours]))
    with pytest.raises(RuntimeError, match=r"1 of 2 layers: vLLM .* no longer builds them"):
        check_that_it_took(nn.ModuleList([ours, theirs]))
    with pytest.raises(RuntimeError, match="0 of 0 layers"):
        check_that_it_took(nn.ModuleList([]))
