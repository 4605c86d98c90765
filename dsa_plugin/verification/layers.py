"""One layer on this machine: a request of it served, in fp64 and in the ops' eager forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.training.rope import angles, inverse_frequencies
from dsa_plugin.training.sizes import read_rope, yarn_mscale
from dsa_plugin.verification import compare, eager, naming
from dsa_plugin.verification.compare import Cell, Selection
from dsa_plugin.verification.exact import Exact
from dsa_plugin.verification.inputs import Request, converted, project
from dsa_plugin.verification.reference import Maths, softmax_scale
from dsa_plugin.verification.serving import Served, bind, rows_of, serve
from dsa_plugin.verification.weights import LayerWeights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What all layers of a model have in common.

    Attributes:
        dsa: the model's numbers.
        maths: what config.json declares.
        mscale: YaRN's, 1 without.
        table: [positions, 64] fp32 cosines and sines, on the device that runs.
        dtype: of weights, activations and unquantised caches.
    """

    dsa: DSAConfig
    maths: Maths
    mscale: float
    table: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Mapping[str, Any], positions: int, device: torch.device) -> Setting:
        """From config.json, for requests of at most so many tokens.

        Raises:
            ValueError: config.json lacks rms_norm_eps or rope_theta, or has a dtype of its own.
        """
        dsa, (theta, scaling) = DSAConfig.from_hf(config), read_rope(config)
        missing = [key for key in ("rms_norm_eps",) if config.get(key) is None]
        missing += ["rope_theta"] if theta is None else []
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        if theta is None or missing or name not in _DTYPES:
            what = f"lacks {', '.join(missing)}" if missing else f"has dtype {name!r}"
            raise ValueError(
                f"config.json {what}, and no layer can be run; take it from the original "
                f"checkpoint (dtype: {', '.join(_DTYPES)})"
            )
        mscale = yarn_mscale(scaling)
        frequencies = inverse_frequencies(dsa.qk_rope_head_dim, theta, scaling)
        table = torch.cat(angles(torch.arange(positions), frequencies), -1)
        maths = Maths(
            index_topk=dsa.index_topk,
            softmax_scale=softmax_scale(dsa.qk_nope_head_dim + dsa.qk_rope_head_dim, mscale),
            index_rope="interleaved" if dsa.indexer_rope_interleave else "half-split",
            rms_norm_eps=float(config["rms_norm_eps"]),
        )
        return cls(dsa, maths, mscale, table.to(device), _DTYPES[name])

    @property
    def dtype_name(self) -> str:
        """Of the model's, as config.json has it."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Place:
    """Which layer, whose indexer selects for it, at which length, and whether its input is true."""

    layer: int
    source: int
    length: int
    true_input: bool


def source_of(dsa: DSAConfig, layer: int) -> int:
    """The layer whose indexer selects for a layer."""
    while not dsa.has_indexer(layer):
        layer -= 1
    return layer


class BoundLayer:
    """A layer's weights and what it reads.

    Args:
        weights: of the layer.
        hidden: [tokens, hidden_size] fp32, normed; longer requests repeat it.
        setting: of the model.
    """

    def __init__(self, weights: LayerWeights, hidden: Tensor, setting: Setting) -> None:
        self.weights, self._hidden, self._setting = weights, hidden, setting
        self._mla, self._indexer = bind(
            weights, setting.dsa, setting.maths, setting.table, setting.dtype
        )

    def request(self, length: int) -> Request:
        """One of so many tokens, in the dtype that is served."""
        setting, rows = self._setting, rows_of(length, self._hidden.device)
        eps = setting.maths.rms_norm_eps
        request = project(self.weights, self._hidden, length, rows, setting.dsa, eps)
        return converted(request, setting.dtype)

    def serve(self, request: Request, shared: Tensor | None, *, fp8: bool) -> Served:
        """As a host does; `shared` [R, index_topk] is what another layer selected."""
        topk = self._setting.maths.index_topk
        return serve(self._mla, self._indexer, request, topk, fp8, shared)

    def cell(
        self, place: Place, exact: Exact, request: Request, shared: Tensor | None, *, fp8: bool
    ) -> tuple[Cell, Tensor]:
        """What was measured, and what was selected, [R, index_topk] int32."""
        setting, maths = self._setting, self._setting.maths
        served = self.serve(request, shared, fp8=fp8)
        rounded, latent_cache = eager.run(self._mla, self._indexer, request, fp8)
        indices = served.topk_indices if shared is None else shared
        margin = scores = agreed = None
        if rounded.scores is not None:
            scores = exact.scores(maths)
            margin = compare.margin_of(rounded, scores, setting.dtype)
        selection = Selection.of(indices, request.rows, place.length, margin)
        misplaced = selection.invalid + max(selection.lacking, 0)
        if shared is not None:
            misplaced += int((served.topk_indices != shared).sum())
        elif scores is not None:
            misplaced += int(selection.misplaced(scores, maths.index_topk).sum())
            agreed = compare.agreement(selection, scores, maths.index_topk)
        by_eager = eager.attend(self._mla, request, latent_cache, selection.indices())
        keys, latents = compare.caches(exact, served, rounded, maths, fp8=fp8, dtype=setting.dtype)
        cell = Cell(
            layer=place.layer,
            length=place.length,
            caches="fp8" if fp8 else setting.dtype_name,
            source=place.source,
            true_input=place.true_input,
            agreement=agreed,
            misplaced=misplaced,
            keys=keys,
            latents=latents,
            out=compare.measured(
                served.out, by_eager, exact.out(maths, selection.mask), setting.dtype
            ),
        )
        if cell.wrong:
            case = naming.Case(cell, exact, served, selection, maths, setting.mscale, fp8)
            cell = replace(cell, mistakes=naming.mistakes(case, setting.dsa))
        return cell, indices
