"""What a checkpoint or a weight update holds of the indexers, brought into their parameters.

The host warns of a tensor that it has no parameter for and goes on; of an indexer's, that would be
a model that selects at random once a context is longer than index_topk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsa_plugin.hosts.sglang.attention import DSAIndexer

FP8_BLOCK = (128, 128)
"""Of the released checkpoints."""
_PROJECTIONS = ("wk", "weights_proj")
_SCALES = ("weight_scale_inv", "weight_scale")
_UNQUANTISED = (torch.float32, torch.float16, torch.bfloat16)


def load_projections(
    weights: Iterable[tuple[str, Tensor]],
    indexers: Mapping[str, DSAIndexer],
    block: Sequence[int],
) -> Iterator[tuple[str, Tensor]]:
    """Load `wk` and `weights_proj` of the indexers; yield what the host then loads.

    Either is taken unquantised, or in fp8 with its scale in the same call.

    Args:
        weights: by their names in a checkpoint.
        indexers: by their names there.
        block: rows and columns of a weight that share a scale, where scales are of blocks.

    Raises:
        ValueError: a tensor that no parameter of its indexer takes, or half of an fp8 weight.
    """
    fp8: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        prefix, _, own = name.partition(".indexer.")
        indexer = indexers.get(f"{prefix}.indexer")
        projection, _, kind = own.partition(".")
        if indexer is None or projection not in _PROJECTIONS:
            if indexer is not None:
                _check_known(indexer, name, own, tensor)
            yield name, tensor
        elif kind == "weight" and tensor.dtype in _UNQUANTISED:
            _load(indexer, name, projection, tensor)
        elif kind in _SCALES or (kind == "weight" and tensor.dtype == torch.float8_e4m3fn):
            stem = name.removesuffix(kind)
            halves = fp8.setdefault(stem, {})
            # The loader may reuse its buffer before the other half comes.
            halves["weight" if kind == "weight" else "scale"] = tensor.clone()
            if len(halves) == 2:
                del fp8[stem]
                weight = _dequantised(name, **halves, block=block)
                _load(indexer, f"{stem}weight", projection, weight)
        else:
            _check_known(indexer, name, own, tensor)
    if fp8:
        alone = ", ".join(f"{stem}{next(iter(halves))}" for stem, halves in fp8.items())
        raise ValueError(
            f"These came without the other half of an fp8 weight: {alone}. Take a checkpoint that "
            "has both, or send weight and scale in one update."
        )


def _load(indexer: DSAIndexer, name: str, projection: str, weight: Tensor) -> None:
    target = indexer.weight_of(projection)
    if weight.shape != target.shape:
        raise _fault(name, weight, f"this indexer's is {list(target.shape)}")
    target.copy_(weight)


def _check_known(indexer: DSAIndexer, name: str, own: str, tensor: Tensor) -> None:
    """Refuse what the host would pass over, but for what has no effect."""
    parameters = {parameter for parameter, _ in indexer.named_parameters()}
    if not {own, own.replace("weight_scale", "weight_scale_inv")}.isdisjoint(parameters):
        return
    if "rotary_emb.inv_freq" in own or (own.endswith(".bias") and not tensor.any()):
        return
    raise _fault(
        name, tensor, f"no parameter takes it; this indexer has {', '.join(sorted(parameters))}"
    )


def _dequantised(name: str, weight: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """[N, K] in fp32; one scale for all, for each row or for each block."""
    rows, columns = weight.shape
    blocks = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if scale.is_floating_point() and tuple(scale.shape) == blocks:
        factors = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return weight.float() * factors[:rows, :columns].float()
    if scale.is_floating_point() and scale.numel() in (1, rows):
        return weight.float() * scale.float().view(-1, 1)
    raise _fault(name, scale, f"a weight of shape {[rows, columns]} has no such scales")


def _fault(name: str, tensor: Tensor, why: str) -> ValueError:
    return ValueError(
        f"{name} ({tensor.dtype} {list(tensor.shape)}): {why}. The indexer reads wk and "
        "weights_proj unquantised, or in fp8 with a scale; the host would pass over the tensor and "
        "select the wrong tokens. Quantise the model again with these left out (llm-compressor: "
        'ignore=["re:.*indexer.*(wk|weights_proj)$"]), or take another checkpoint.'
    )
