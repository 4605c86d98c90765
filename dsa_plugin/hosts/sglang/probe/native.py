"""What SGLang's own DSA would run on this process's device, or refuses: its own code is asked.

Its resolution chooses kernels for every device and refuses none, so most answers are "unchecked".
Two checks that it has elsewhere say more: whether DeepGEMM, which its indexer imports, is for the
device, and whether FlashAttention 3 does MLA there.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sglang.srt.layers.attention.attention_registry import create_flashattention_v3_backend
from sglang.srt.layers.attention.dsa.paged_mqa_logits_backend import DSAPagedMQALogitsBackend
from sglang.srt.layers.deep_gemm_wrapper import configurer
from sglang.srt.utils import is_cuda, is_hip

from dsa_plugin.hosts.replaced_names import replaced_names
from dsa_plugin.probe.host_kernel import HostKernel, ask_host_code

_CHECK = "deep_gemm_wrapper.configurer.ENABLE_JIT_DEEPGEMM"


def native_kernels(view: Any) -> list[HostKernel]:
    """One a op, in their order.

    Args:
        view: the resolved arguments.
    """
    return [
        HostKernel("cache_write", "unchecked", "inside its indexer and cache pool"),
        _indexer_logits(view.dsa_paged_mqa_logits_backend),
        HostKernel("topk_select", "unchecked", view.dsa_topk_backend),
        _sparse_mla(view.dsa_prefill_backend, view.dsa_decode_backend),
    ]


def _indexer_logits(wanted: str) -> HostKernel:
    if is_hip():
        backend = DSAPagedMQALogitsBackend.resolve(wanted).value
        return HostKernel("indexer_logits", "unchecked", backend)
    check = _deep_gemm if is_cuda() else _without_gpu
    return ask_host_code("indexer_logits", lambda: check(wanted), RuntimeError, NotImplementedError)


def _deep_gemm(wanted: str) -> str:
    """Raises RuntimeError where SGLang does not run DeepGEMM on this device."""
    backend: str = DSAPagedMQALogitsBackend.resolve(wanted).value
    # Read from the device this process had when the module was imported.
    with replaced_names(configurer, _is_cuda=True):
        if not configurer._compute_enable_deep_gemm():
            raise RuntimeError(f"{backend}, but {_CHECK} is False")
    return backend


def _without_gpu(wanted: str) -> str:
    """Raises NotImplementedError."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    indexer: Any = Indexer
    return str(indexer.forward_native(None))


def _sparse_mla(prefill: str, decode: str) -> HostKernel:
    chosen = f"{prefill} in prefill, {decode} in decode"
    if "fa3" in (prefill, decode):
        kernel = ask_host_code("sparse_mla", _flash_attention_3, AssertionError, instead=chosen)
        if kernel.verdict == "no":
            return HostKernel(
                "sparse_mla", "no", f"{chosen}; its check of fa3 for MLA: {kernel.text}"
            )
    return HostKernel("sparse_mla", "unchecked", chosen)


class _PassedError(Exception):
    """The check let it through."""


class _Runner:
    """As much of a model runner as the check reads."""

    use_mla_backend = True

    def __getattr__(self, name: str) -> Any:
        raise _PassedError


def _flash_attention_3() -> str:
    """Raises AssertionError where SGLang refuses FlashAttention 3 for MLA on this device."""
    with suppress(_PassedError, ImportError):  # the second in a build without its kernels
        create_flashattention_v3_backend(_Runner())
    return "fa3"
