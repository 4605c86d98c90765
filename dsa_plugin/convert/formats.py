"""What a checkpoint's tensors become in each precision, and what config.json then says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsa_plugin.convert.source import TORCH_DTYPES, Source, Stored
from dsa_plugin.fp8_weights import SCALE_SUFFIX
from dsa_plugin.packed_weights import BITS, GROUP, IGNORE, quantization_config
from dsa_registry import lookup

Precision = Literal["bf16", "w8a16", "w4a16"]

_QUANTISED = re.compile(
    r".*\.(self_attn\.(q_b|o)_proj|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)"
)


@dataclass(frozen=True)
class Output:
    """A tensor of the converted checkpoint, and the source's that it is made of.

    part: `copy`, its bytes; `cut`, those of its rows and columns `where`; `bf16`, an FP8 weight's
        values; `packed`, `scale` and `shape`, the three of a quantised weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored
    part: Literal["copy", "cut", "bf16", "packed", "scale", "shape"]
    where: tuple[slice, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def check_possible(source: Source, precision: Precision) -> None:
    """Refuse a conversion that would change nothing, or whose layers are unknown.

    Raises:
        ValueError: which of these, and what would work.
    """
    if precision == "bf16":
        if not any(tensor.dtype == "F8_E4M3" for tensor in source.tensors.values()):
            raise ValueError(
                f"{source.folder} holds no FP8 weight, so there is nothing to convert to bf16"
            )
        return
    try:
        lookup(str(source.config.get("model_type")))
    except ValueError as error:
        raise ValueError(
            f"which layers {precision} may quantise is known of DSA models alone: {error}"
        ) from None


def outputs(shard: Mapping[str, Stored], precision: Precision) -> list[Output]:
    """What a file's tensors become, in the order in which they are written.

    Raises:
        ValueError: a weight that the precision cannot hold, or of which it is not known whether
            it may be quantised.
    """
    made = []
    for name, tensor in shard.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if precision in BITS and _is_quantised(tensor):
            made += _quantised(tensor, BITS[precision])
        elif tensor.dtype == "F8_E4M3":
            made.append(Output(name, "BF16", tensor.shape, tensor, "bf16"))
        else:
            made.append(Output(name, tensor.dtype, tensor.shape, tensor, "copy"))
    return in_order(made)


def in_order(made: Iterable[Output]) -> list[Output]:
    """A file's tensors, larger dtypes first: each is aligned to its own, as safetensors does."""
    return sorted(made, key=lambda output: (-TORCH_DTYPES[output.dtype].itemsize, output.name))


def is_ignored(module: str) -> bool:
    """Whether IGNORE names a module, by the rules of compressed-tensors."""
    return any(
        re.match(pattern[3:], module) if pattern.startswith("re:") else pattern == module
        for pattern in IGNORE
    )


def converted_config(config: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """config.json of the converted checkpoint."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if precision == "bf16":
        return kept
    kept["quantization_config"] = quantization_config(BITS[precision])
    return kept


def _is_quantised(tensor: Stored) -> bool:
    module, _, kind = tensor.name.rpartition(".")
    if kind != "weight" or len(tensor.shape) != 2 or is_ignored(module):
        return False
    if _QUANTISED.fullmatch(module):
        return True
    raise ValueError(
        f"{tensor.name} {list(tensor.shape)}: it is not known whether this layer may be quantised; "
        "bf16 is possible"
    )


def _quantised(weight: Stored, bits: int) -> list[Output]:
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(
            f"{weight.name} has {columns} inputs, which is no multiple of {GROUP}, the group of a "
            "scale; bf16 is possible"
        )
    stem = weight.name
    return [
        Output(f"{stem}_packed", "I32", (rows, columns * bits // 32), weight, "packed"),
        Output(f"{stem}_scale", "BF16", (rows, columns // GROUP), weight, "scale"),
        Output(f"{stem}_shape", "I64", (2,), weight, "shape"),
    ]
