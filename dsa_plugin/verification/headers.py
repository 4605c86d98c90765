"""What is wrong with a checkpoint's tensors, by the headers of its files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dsa_plugin.config import DSAConfig
from dsa_plugin.fp8_weights import SCALES, scale_shape
from dsa_plugin.indexer_tensors import indexer_shapes
from dsa_plugin.safetensors_header import read_header
from dsa_plugin.verification.findings import Finding, of_layers

Header: TypeAlias = dict[str, Any]
"""dtype and shape of a tensor, as safetensors has them."""
_FLOATS = {"F32", "F16", "BF16"}
_ATTENTION = "model.layers.{layer}.self_attn."
_AGAIN = "download the checkpoint again"
# What a layer's attention reads in full precision on one host or both, whatever is quantised.
_UNPACKED_INDEXER = ("indexer.wk", "indexer.weights_proj", "indexer.k_norm")


@dataclass(frozen=True)
class Headers:
    """Of all files of a checkpoint: each tensor's header and file, and what is wrong with files."""

    tensors: Mapping[str, Header]
    files: Mapping[str, str]
    faults: tuple[Finding, ...] = ()


def read_folder(folder: Path) -> Headers:
    """The headers of a folder's *.safetensors.

    Raises:
        ValueError: there is none.
    """
    tensors: dict[str, Header] = {}
    files: dict[str, str] = {}
    faults = []
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} has no *.safetensors, the only format that is read; convert it, or download "
            "the rest of the checkpoint"
        )
    for path in paths:
        try:
            header = read_header(path)
        except ValueError as error:
            faults.append(Finding("wrong", path.name, str(error)))
            continue
        tensors.update(header)
        files.update(dict.fromkeys(header, path.name))
    return Headers(tensors, files, tuple(faults))


def missing_shards(headers: Headers, weight_map: Mapping[str, str]) -> list[Finding]:
    """Files of model.safetensors.index.json that are not there, or hold not what it says."""
    there = set(headers.files.values())
    absent = sorted(set(weight_map.values()) - there - {f.where for f in headers.faults})
    found = [
        Finding("wrong", name, "is named in model.safetensors.index.json and is not there", _AGAIN)
        for name in absent
    ]
    unkept = [t for t, file in weight_map.items() if file in there and t not in headers.tensors]
    if unkept:
        what = f"promises {len(unkept)} tensors that no file has, such as {min(unkept)}"
        found.append(Finding("wrong", "model.safetensors.index.json", what, _AGAIN))
    return found


def attention_shapes(config: DSAConfig, layer: int) -> dict[str, list[int]]:
    """Shape of each tensor of a layer's attention, by its name behind `self_attn.`."""
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    shapes = {
        "q_a_proj.weight": [config.q_lora_rank, config.hidden_size],
        "q_a_layernorm.weight": [config.q_lora_rank],
        "q_b_proj.weight": [heads * (nope + rope), config.q_lora_rank],
        "kv_a_proj_with_mqa.weight": [config.kv_lora_rank + rope, config.hidden_size],
        "kv_a_layernorm.weight": [config.kv_lora_rank],
        "kv_b_proj.weight": [heads * (nope + value), config.kv_lora_rank],
        "o_proj.weight": [config.hidden_size, heads * value],
    }
    if config.has_indexer(layer):
        shapes |= {f"indexer.{name}": shape for name, shape in indexer_shapes(config).items()}
    return shapes


def readable(headers: Headers, name: str) -> bool:
    """Whether a tensor is stored as a plain one, or in fp8 with its scale."""
    tensor = headers.tensors.get(name)
    if tensor is None or tensor["dtype"] != "F8_E4M3":
        return tensor is not None and tensor["dtype"] in _FLOATS
    stem = name.removesuffix("weight")
    return any(stem + scale in headers.tensors for scale in SCALES)


def can_run(headers: Headers, config: DSAConfig, layer: int) -> bool:
    """Whether all of a layer's attention can be read, and fits config.json."""
    prefix = _ATTENTION.format(layer=layer)
    shapes = attention_shapes(config, layer)
    return readable(headers, f"model.layers.{layer}.input_layernorm.weight") and all(
        readable(headers, prefix + name) and headers.tensors[prefix + name]["shape"] == shape
        for name, shape in shapes.items()
    )


def stored_indexers(headers: Headers, config: DSAConfig) -> list[int]:
    """Backbone layers of which the checkpoint holds some tensor of an indexer."""
    found = {
        int(match[1])
        for name in headers.tensors
        if (match := re.match(r"model\.layers\.(\d+)\.self_attn\.indexer\.", name))
    }
    return sorted(layer for layer in found if layer < config.num_hidden_layers)


def check_tensors(headers: Headers, config: DSAConfig, *, quantised: bool) -> list[Finding]:
    """Every fault of the layers' attention.

    Args:
        headers: of the whole checkpoint.
        config: its config.json's.
        quantised: whether config.json says that weights are quantised.
    """
    layers = config.num_hidden_layers
    drafts = range(layers, layers + config.num_nextn_predict_layers)
    kept = {name.split(".")[2] for name in headers.tensors if name.startswith("model.layers.")}
    present = [layer for layer in drafts if str(layer) in kept]
    found = []
    for layer in (*range(layers), *present):
        found += [(layer, f) for f in _layer_faults(headers.tensors, config, layer)]
        found += [(layer, f) for f in _scale_faults(headers.tensors, config, layer, quantised)]
    findings = [*headers.faults, *of_layers(found), *_sharing(headers, config)]
    if len(present) < len(drafts):
        what = f"config.json promises {len(drafts)} MTP layers and {len(present)} are stored"
        findings.append(Finding("note", "num_nextn_predict_layers", what, "serve without drafts"))
    return findings


def _layer_faults(
    tensors: Mapping[str, Header], config: DSAConfig, layer: int
) -> Iterator[Finding]:
    prefix = _ATTENTION.format(layer=layer)
    where = _ATTENTION.format(layer="*")
    fused = tensors.get(f"{prefix}indexer.wk_weights_proj.weight")
    for name, shape in attention_shapes(config, layer).items():
        projection = name.rpartition(".")[0]
        tensor, stem = tensors.get(prefix + name), prefix + projection + "."
        if fused is not None and projection in ("indexer.wk", "indexer.weights_proj"):
            if projection == "indexer.wk":
                yield _fused(where, fused, config)
        elif tensor is None:
            beside = {stem + suffix for suffix in (*SCALES, "weight", "bias")}
            packed = sorted(t for t in tensors if t.startswith(stem) and t not in beside)
            if packed and not name.endswith(".bias"):
                yield _packed(where + projection, packed[0].removeprefix(stem), tensors[packed[0]])
            else:
                yield Finding(
                    "wrong", where + name, f"is missing; expected shape {shape}", _missing(name)
                )
        elif tensor["dtype"] not in {*_FLOATS, "F8_E4M3"}:
            yield _packed(where + projection, name.rpartition(".")[2], tensor)
        elif tensor["shape"] != shape:
            what = f"has shape {tensor['shape']}; config.json asks for {shape}"
            yield Finding("wrong", where + name, what, f"{_AGAIN}, its config.json too")


def _fused(where: str, fused: Header, config: DSAConfig) -> Finding:
    rows = config.index_head_dim
    return Finding(
        "wrong",
        f"{where}indexer.wk_weights_proj.weight",
        f"holds wk and weights_proj in one tensor {fused['shape']}, as engines keep them and no "
        "checkpoint does",
        f"store rows 0 to {rows - 1} as indexer.wk.weight and the rest as "
        "indexer.weights_proj.weight",
    )


def _packed(where: str, suffix: str, tensor: Header) -> Finding:
    stored = f"is packed ({suffix}, {tensor['dtype']} {tensor['shape']})"
    if not where.endswith(_UNPACKED_INDEXER):
        return Finding("note", where, f"{stored}: its layer can be served, but is not run here")
    return Finding(
        "wrong",
        where,
        f"{stored}; the indexer reads it unquantised, and hosts pass over it or stop",
        "quantise the model again without it, as the releases do (llm-compressor: "
        'ignore=["re:.*indexer.*(wk|weights_proj)$"])',
    )


def _missing(name: str) -> str:
    if name.startswith("indexer."):
        return (
            f"{_AGAIN}, or convert it with its indexers kept; if the layer shares another one's "
            "selection, config.json must say so (indexer_types)"
        )
    return _AGAIN


def _scale_faults(
    tensors: Mapping[str, Header], config: DSAConfig, layer: int, quantised: bool
) -> Iterator[Finding]:
    """Of the layer's weights in fp8."""
    prefix, where = _ATTENTION.format(layer=layer), _ATTENTION.format(layer="*")
    for name in attention_shapes(config, layer):
        tensor = tensors.get(prefix + name)
        if tensor is None or not name.endswith(".weight"):
            continue
        stem = name.removesuffix("weight")
        scales = [stem + scale for scale in SCALES if prefix + stem + scale in tensors]
        fp8 = tensor["dtype"] == "F8_E4M3"
        if fp8 and not scales:
            what = f"is fp8 {tensor['shape']} without a scale ({' or '.join(SCALES)})"
            remedy = f"its values are off by a factor of thousands; {_AGAIN}, or convert it anew"
            yield Finding("wrong", where + name, what, remedy)
        elif fp8 and not quantised:
            what = "is fp8, and config.json has no quantization_config"
            remedy = "take config.json from the original, or scales are left out by engines"
            yield Finding("wrong", where + name, what, remedy)
        elif fp8 and name == "indexer.weights_proj.weight":
            what = "is fp8; vLLM reads it unquantised"
            yield Finding("wrong", where + name, what, "quantise the model again without it")
        if fp8 and scales:
            yield from _misshapen_scale(where + scales[0], tensor, tensors[prefix + scales[0]])
        elif scales:
            what = f"belongs to a weight that is {tensor['dtype']}, which needs none"
            yield Finding("note", where + scales[0], what, "remove it, or engines may apply it")


def _misshapen_scale(where: str, weight: Header, scale: Header) -> Iterator[Finding]:
    rows, columns = weight["shape"]
    blocks = list(scale_shape((rows, columns)))
    allowed = [blocks, [rows], [rows, 1], [1], []]
    if scale["shape"] not in allowed:
        what = f"has shape {scale['shape']}; a weight {weight['shape']} has scales {blocks}"
        yield Finding("wrong", where, what, _AGAIN)


def _sharing(headers: Headers, config: DSAConfig) -> Iterator[Finding]:
    """What config.json says of shared selections beside the indexers that are stored."""
    stored = set(stored_indexers(headers, config))
    declared = {n for n in range(config.num_hidden_layers) if config.has_indexer(n)}
    if stored and declared - stored and 0 in stored:
        types = "".join("F" if n in stored else "S" for n in range(config.num_hidden_layers))
        yield Finding(
            "wrong",
            "config.json",
            f"sharing is missing: it asks for indexers in {len(declared)} layers, and "
            f"{len(stored)} are stored ({types}, with F for full and S for shared)",
            f'if the model shares selections, say "index_topk_pattern": "{types}"',
        )
    if idle := sorted(stored - declared):
        yield Finding(
            "note",
            "config.json",
            f"{len(idle)} layers share a selection and have an indexer of their own stored, such "
            f"as layer {idle[0]}",
            "right where a sharing pattern was chosen for a model that had none",
        )
