"""Break one thing in the served model, to show that the exactness tests notice.

A server started with ``DSA_TEST_MUTATION=<name>`` loads ``apply`` as a plugin in each of its
processes (server.py sees to it). It replaces an op, or what "module:Class.method" names, and writes
``dsa test mutation applied: <name>`` to stderr.
"""

import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

VARIABLE = "DSA_TEST_MUTATION"
OPS = "dsa_plugin.attention.ops"
ENTRY_POINT = "dsa_testbed.mutations:apply"
# The families' index_topk: the host's metadata does not carry it.
_INDEX_TOPK = 64

Function = Callable[..., Any]
Wrapper = Callable[[Function], Function]


def apply() -> None:
    """Apply the mutation that the environment names; ValueError if there is no such one."""
    name = os.environ.get(VARIABLE, "")
    if name not in MUTATIONS:
        raise ValueError(f"{VARIABLE}={name!r}; known: {', '.join(MUTATIONS)}")
    for target, wrap in MUTATIONS[name].items():
        module, colon, path = target.rpartition(":")
        *owners, attribute = path.split(".")
        owner: Any = importlib.import_module(module if colon else OPS)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, wrap(getattr(owner, attribute)))
    print(f"dsa test mutation applied: {name}", file=sys.stderr, flush=True)


def _other_hadamard(function: Function) -> Function:
    def flipped(*args: Any, hadamard: bool, **kwargs: Any) -> Any:
        return function(*args, hadamard=not hadamard, **kwargs)

    return flipped


def _argument(index: int, change: Callable[[Any], Any]) -> Wrapper:
    """The function, with one positional argument changed."""

    def wrap(function: Function) -> Function:
        def changed(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:index], change(args[index]), *args[index + 1 :], **kwargs)

        return changed

    return wrap


def _topk_minus_one(function: Function) -> Function:
    def topk_select(logits: Tensor, k: int, *args: Any, out: Tensor | None = None) -> Tensor:
        fewer: Tensor = function(logits, k - 1, *args)
        padded = fewer.new_full((fewer.shape[0], k), -1)
        padded[:, : k - 1] = fewer
        return padded if out is None else out.copy_(padded)

    return topk_select


def _topk_minus_one_in_decode(function: Function) -> Function:
    def topk_select_slots(logits: Tensor, k: int, *args: Any, out: Tensor, slots: Tensor) -> None:
        for written, fewer in zip((out, slots), function(logits, k - 1, *args), strict=True):
            written[:, : k - 1] = fewer
            written[:, k - 1 :] = -1

    return topk_select_slots


def _other_style(rope: Any) -> Any:
    return dataclasses.replace(rope, interleaved=not rope.interleaved)


def _without_bias(norm: Any) -> Any:
    return dataclasses.replace(norm, bias=norm.bias * 0)


def _one_less(row_end: Tensor) -> Tensor:
    return (row_end - 1).clamp(min=1)


def _dense(function: Function) -> Function:
    def attend(layer: Any, projections: Any, metadata: Any, topk_indices: Any, *rest: Any) -> None:
        import torch

        positions = projections.positions
        everything = torch.arange(
            int(positions.max()) + 1, dtype=topk_indices.dtype, device=topk_indices.device
        )
        visible = everything <= positions[:, None]
        everything = torch.where(visible, everything, -1)
        function(layer, projections, metadata, everything, None, *rest[1:])

    return attend


def _short_prompts_unwritten(function: Function) -> Function:
    """As a server that skips the whole indexer where it need not score."""

    def write_index_keys(indexer: Any, projections: Any, metadata: Any) -> None:
        slots = metadata.slot_mapping.clone()
        for chunk in metadata.prefill_chunks:
            if chunk.num_keys <= _INDEX_TOPK:
                slots[chunk.start : chunk.end] = -1
        function(indexer, projections, dataclasses.replace(metadata, slot_mapping=slots))

    return write_index_keys


def _last_slot_stale(function: Function) -> Function:
    """The last entry of a page keeps what the page's previous owner left."""

    def write_index_keys(indexer: Any, projections: Any, metadata: Any) -> None:
        slots, size = metadata.slot_mapping, metadata.block_size
        stale = slots.masked_fill(slots % size == size - 1, -1)
        function(indexer, projections, dataclasses.replace(metadata, slot_mapping=stale))

    return write_index_keys


def _selection_lost(function: Function) -> Function:
    """What a shared layer reuses is overwritten by the oldest tokens after each layer."""

    def attend(layer: Any, projections: Any, metadata: Any, topk_indices: Any, *rest: Any) -> None:
        import torch

        function(layer, projections, metadata, topk_indices, *rest)
        positions = projections.positions
        oldest = torch.arange(topk_indices.shape[1], dtype=torch.int32, device=positions.device)
        rows = topk_indices[: positions.shape[0]]
        rows.copy_(torch.where(oldest <= positions[:, None], oldest, -1))

    return attend


def _absolute_weights(function: Function) -> Function:
    def index_query(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, weights = function(*args, **kwargs)
        return q, weights.abs()

    return index_query


def _index_keys_lost(function: Function) -> Function:
    """As a connector that knows of the latents alone."""

    def save_kv_layer(self: Any, layer_name: str, kv_layer: Tensor, *args: Any) -> None:
        lost = layer_name.endswith(".indexer.k_cache")
        function(self, layer_name, kv_layer * 0 if lost else kv_layer, *args)

    return save_kv_layer


def _recorded(function: Function) -> Function:
    """Write each layer's selection to the folder DSA_TEST_RECORD, one file a call, in order."""
    calls = itertools.count()

    def attend(layer: Any, projections: Any, metadata: Any, topk_indices: Any, *rest: Any) -> None:
        import numpy as np

        path = Path(os.environ["DSA_TEST_RECORD"]) / f"{next(calls):06d}.npy"
        np.save(path, topk_indices[: metadata.num_tokens].numpy(), allow_pickle=False)
        function(layer, projections, metadata, topk_indices, *rest)

    return attend


def _named(function: Function) -> Function:
    """Leave a file named like each kernel that ran in the folder DSA_TEST_RECORD."""

    def run(launch: Any) -> None:
        (Path(os.environ["DSA_TEST_RECORD"]) / launch.kernel.__name__).touch()
        function(launch)

    return run


def _from_80_rows(_function: Function) -> Function:
    """Choose the masked form for long chunks, however little it gains on so small a model."""

    def masked_is_faster(_device: Any, rows: int, *_args: Any, **_kwargs: Any) -> bool:
        return rows >= 80

    return masked_is_faster


def _from_80_columns(function: Function) -> Function:
    """Find the top k of rows in parts, however short: a real row's part takes minutes here."""
    part = {"TILE": 16, "SAMPLE": 64, "ROOM": 128}
    blocks = {"select": {"BLOCK": 80}, "sift": part, "finish": part}

    def launch_config(op: str, arch: Any, shape_key: Any) -> Any:
        return dataclasses.replace(function(op, arch, shape_key), blocks=blocks[shape_key])

    return launch_config


def _as_captured(function: Function) -> Function:
    """SGLang's passes of equal rows read a CUDA graph's buffers, which may not move."""

    def init_forward_metadata(self: Any, forward_batch: Any) -> None:
        from dsa_plugin.hosts.sglang.metadata import is_uniform

        if not is_uniform(forward_batch):
            function(self, forward_batch)
            return
        if not hasattr(self, "_block_table"):
            self.init_cuda_graph_state(64, 1024)
            self.captured = {}
        self.init_forward_metadata_out_graph(forward_batch)
        ours = self.prepared
        addresses = (ours.block_table.data_ptr(), ours.request_ids.data_ptr())
        shape = (ours.num_decodes, ours.num_tokens)
        if self.captured.setdefault(shape, addresses) != addresses:
            raise AssertionError(f"a graph captured for {shape} would read freed memory")

    return init_forward_metadata


def _first_twice(function: Function) -> Function:
    """Of the rows that see more than they select."""

    def select(*args: Any, out: Tensor, **kwargs: Any) -> Any:
        selected = function(*args, out=out, **kwargs)
        out[:, 1] = out[:, 0]
        return selected

    return select


def _next_page(function: Function) -> Function:
    """Decodes read each token's latent 64 slots on."""

    def topk_select_slots(*args: Any, slots: Tensor, **kwargs: Any) -> None:
        function(*args, slots=slots, **kwargs)
        slots += 64

    return topk_select_slots


def _with_nan(latents: Tensor) -> Tensor:
    latents = latents.clone()
    latents[-1, 0] = float("nan")
    return latents


def _pages_swapped(function: Function) -> Function:
    """Decodes that see more than two pages have the first two in each other's place."""

    def forward(layer: Any, projections: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
        table = metadata.block_table.clone()
        decodes = slice(metadata.num_decode_tokens)
        rows = zip(metadata.request_ids[decodes], metadata.context_lens[decodes], strict=True)
        for request, length in rows:
            if length > 2 * metadata.block_size:
                table[request, :2] = metadata.block_table[request, :2].flip(0)
        swapped = dataclasses.replace(metadata, block_table=table)
        function(layer, projections, swapped, *args, **kwargs)

    return forward


_FORWARD = "dsa_plugin.attention.forward"
# Name -> op, or "module:function" -> what replaces it.
MUTATIONS: dict[str, dict[str, Wrapper]] = {
    # Query and key of the indexer rotate pairs where the model rotates halves, or the reverse.
    "indexer_rope_style": {
        "index_query": _argument(2, _other_style),
        "index_cache_write": _argument(2, _other_style),
    },
    "index_query_rope_style": {"index_query": _argument(2, _other_style)},
    "query_rope_style": {"apply_rope": _argument(1, _other_style)},
    # The key is rotated by the Hadamard matrix and the query is not, or the reverse.
    "hadamard_one_side": {"index_cache_write": _other_hadamard},
    "topk_minus_one": {
        "topk_select": _topk_minus_one,
        "topk_select_slots": _topk_minus_one_in_decode,
    },
    "own_token_invisible": {
        "topk_select": _argument(3, _one_less),
        "topk_select_slots": _argument(2, _one_less),
    },
    "dense_attention": {f"{_FORWARD}:attend": _dense},
    "index_key_not_written_short_prompt": {
        f"{_FORWARD}:write_index_keys": _short_prompts_unwritten
    },
    "stale_index_page": {f"{_FORWARD}:write_index_keys": _last_slot_stale},
    "index_key_bias": {"index_cache_write": _argument(1, _without_bias)},
    "index_weights_unsigned": {"index_query": _absolute_weights},
    # Without YaRN's mscale^2 (factor 40); in GLM, just wrong.
    "softmax_scale": {"sparse_mla": _argument(3, lambda scale: scale / 1.8738542)},
    "shared_selection_lost": {f"{_FORWARD}:attend": _selection_lost},
    # What DSA_CHECK has to find.
    "selected_twice": {"topk_select": _first_twice, "topk_select_slots": _first_twice},
    "slots_elsewhere": {"topk_select_slots": _next_page},
    "nan_latent": {"latent_cache_write": _argument(0, _with_nan)},
    "pages_swapped": {"dsa_plugin.attention:forward": _pages_swapped},
    # vLLM's example connector.
    "connector_loses_index_keys": {
        "vllm.distributed.kv_transfer.kv_connector.v1.example_connector:"
        "ExampleConnector.save_kv_layer": _index_keys_lost
    },
    # Breaks nothing.
    "record_selection": {f"{_FORWARD}:attend": _recorded},
    "record_kernels": {
        "dsa_kernels.launch:Launch.run": _named,
        "dsa_kernels.topk_select.kernel:launch_config": _from_80_columns,
        "dsa_plugin.attention.sparse:masked_is_faster": _from_80_rows,
    },
    "decode_as_captured": {
        "dsa_plugin.hosts.sglang.backend:DSABackend.init_forward_metadata": _as_captured
    },
}
# Family and mutation: all that break something, each in a family that it does break.
FAULTS = [
    ("v32", "indexer_rope_style"),
    ("v32", "index_query_rope_style"),
    ("v32", "query_rope_style"),
    ("v32", "hadamard_one_side"),
    ("v32", "topk_minus_one"),
    ("v32", "own_token_invisible"),
    ("v32", "dense_attention"),
    ("v32", "index_key_not_written_short_prompt"),
    ("v32", "stale_index_page"),
    ("v32", "index_key_bias"),
    ("v32", "index_weights_unsigned"),
    ("v32", "softmax_scale"),
    ("glm5", "indexer_rope_style"),
    ("glm52", "shared_selection_lost"),
]
