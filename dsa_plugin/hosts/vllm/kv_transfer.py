"""The host's KV connector told of both caches of a layer, as it is of other models' one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import (
    get_kv_transfer_group,
    has_kv_transfer_group,
    is_v1_kv_transfer_group,
)

from dsa_plugin.hosts.vllm.refused import UNTRIED_TRANSFER

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from dsa_plugin.hosts.vllm.cache_layer import CacheLayer

_TESTED = ("ExampleConnector",)


def connector_faults(vllm_config: VllmConfig) -> list[str]:
    """Why the configured connector is not trusted with our caches; empty where it is."""
    transfer = vllm_config.kv_transfer_config
    connector = None if transfer is None else transfer.kv_connector
    if connector in (None, *_TESTED):
        return []
    fault = (
        f"--kv-transfer-config with {connector}: {UNTRIED_TRANSFER}; drop the flag, and use "
        f"vLLM's own prefix cache ({', '.join(_TESTED)} is served)"
    )
    return [fault]


@contextmanager
def transferred(layers: Sequence[CacheLayer], metadata: Mapping[str, Any]) -> Iterator[None]:
    """Wait for what a connector loads into the layers' caches; store what the pass has written.

    attention/kv_transfer_utils.py, maybe_transfer_kv_layer, does so for one cache.
    """
    if not (has_kv_transfer_group() and is_v1_kv_transfer_group()):
        yield
        return
    connector: Any = get_kv_transfer_group()
    if not connector.has_connector_metadata():
        yield
        return
    for layer in layers:
        connector.wait_for_layer_load(layer.prefix)
    yield
    for layer in layers:
        connector.save_kv_layer(layer.prefix, layer.kv_cache, metadata[layer.prefix])
