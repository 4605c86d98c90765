"""Places where SGLang 0.5.23 takes a platform without CUDA for one with it: one function each.

Applied in each worker before it builds a model, the first in the launcher. Each says what, why, the
upstream place and when to remove it.
"""

from __future__ import annotations

from typing import Any, cast

import torch


def apply() -> None:
    """Apply all of them; SGLang's modules are imported here, by the worker that needs them."""
    rope_of_any_kind()
    unpinned_tensors()
    nothing_to_synchronise()
    draft_trees_in_triton()
    dp_copies_without_triton()
    collectives_without_custom_ops()
    absorbed_mla_in_torch_native()
    recorder_of_selections()


def capability_of_no_gpu() -> None:
    """Let the capability of a CUDA device be asked for where there is none.

    Why: for DSA models SGLang asks for it on every platform but two, and torch raises. Upstream:
    handle_model_specific_adjustments in srt/arg_groups/model_hook.py and the two passes it runs.
    Remove when: it asks the platform's get_device_capability().
    """
    torch.cuda.get_device_capability = lambda *_: (0, 0)


def rope_of_any_kind() -> None:
    """Build rotary embeddings on "cpu" as on every other device.

    Why: get_rope_wrapper sends device "cpu" to get_rope_cpu, which knows YaRN alone, and GLM has
    plain RoPE. Upstream: srt/layers/rotary_embedding/factory.py. Remove when: get_rope_cpu falls
    back to get_rope.
    """
    from sglang.srt.layers.rotary_embedding import factory

    def get_rope_cpu(*args: Any) -> Any:
        return factory.get_rope(*args[:8])

    factory.get_rope_cpu = get_rope_cpu


def unpinned_tensors() -> None:
    """torch.tensor(pin_memory=True) without pinning.

    Why: DP attention pins a list of token counts unless the platform is SGLang's own CPU engine,
    and torch cannot pin without an accelerator. Upstream: ForwardBatch in
    srt/model_executor/forward_batch_info.py. Remove when: it asks is_pin_memory_available().
    """
    tensor = torch.tensor

    def unpinned(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return tensor(*args, **kwargs)

    torch.tensor = unpinned


def nothing_to_synchronise() -> None:
    """torch.cuda.synchronize() of a machine without CUDA.

    Why: an MTP draft calls it when it takes the target's embeddings. Upstream:
    DeepseekV2ForCausalLM.set_embed_and_head in srt/models/deepseek_v2.py. Remove when: it calls
    the platform's synchronize().
    """
    torch.cuda.synchronize = lambda *_: None


def draft_trees_in_triton() -> None:
    """Build and verify MTP's drafts with the kernels that SGLang has in Triton.

    Why: an out-of-tree platform is refused there, although XPU's kernels are Triton's; with
    TRITON_INTERPRET=1 they run on a CPU. Upstream: kernels/ops/speculative/spec_tree.py. Remove
    when: it asks the platform's supports_triton.
    """
    from sglang.kernels.ops.speculative import spec_tree

    spec_tree._is_xpu = True


def dp_copies_without_triton() -> None:
    """Copy DP attention's rows with torch.

    Why: memcpy_func is Triton's unless the platform is SGLang's own CPU engine. Upstream:
    srt/layers/dp_attention.py. Remove when: it asks the platform's capabilities.
    """
    from sglang.srt.layers import dp_attention

    dp_attention.memcpy_func = dp_attention.memcpy_cpu


def collectives_without_custom_ops() -> None:
    """Call the collectives of a group directly.

    Why: custom ops of an out-of-tree platform are registered for torch's PrivateUse1 device alone,
    so a CPU tensor finds none. Upstream: direct_register_custom_op in srt/utils/common.py. Remove
    when: it registers for the platform's own device type.
    """
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    group = cast(Any, GroupCoordinator)
    group.all_gather_into_tensor = group._all_gather_into_tensor
    group.reduce_scatter_tensor = group._reduce_scatter_tensor


def absorbed_mla_in_torch_native() -> None:
    """Run dense MLA models on torch_native in the absorbed form.

    Why: a backend without a handler gets Triton's, which expands a prefill without prefix to MHA;
    torch_native then reads keys of that shape from a pool of latents and fails. Upstream:
    srt/models/deepseek_common/attention_backend_handler.py. Remove when: torch_native is in it.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    handlers.AttentionBackendRegistry.register(
        "torch_native", lambda *_: handlers.AttnForwardMethod.MLA
    )


def recorder_of_selections() -> None:
    """Make the recorder of --enable-return-indexer-topk, in memory that is not pinned.

    Why: its own indexers feed it on CUDA and NPU alone, so it is made on no other device; and
    pinning takes CUDA. Upstream: create_indexer_capturer in srt/state_capturer/indexer_topk.py.
    Remove when: it asks who feeds it.
    """
    from sglang.srt.model_executor import model_runner
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.state_capturer import base, indexer_topk

    def create(*, model_config: Any, **sizes: Any) -> Any:
        config = model_config.hf_text_config
        return indexer_topk._create_indexer_capturer_raw(
            enable=get_exec().features.enable_return_indexer_topk,
            num_indexer_layers=indexer_topk.get_num_indexer_layers(config),
            index_topk=getattr(config, "index_topk", 0),
            **sizes,
        )

    def allocate(dims: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype)

    cast(Any, model_runner).create_indexer_capturer = create
    cast(Any, base).ALLOC_MEMORY_FUNCS["cpu"] = allocate
