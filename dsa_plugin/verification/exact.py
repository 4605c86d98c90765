"""A request in fp64, by what config.json declares or by any other `Maths`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.verification import reference
from dsa_plugin.verification.inputs import Request, converted, norms_of, scored, split_kv_b
from dsa_plugin.verification.reference import Maths
from dsa_plugin.verification.weights import LayerWeights

_DENSE_ROWS = 16


class Exact:
    """One layer's request.

    Args:
        weights: of the layer.
        request: as it is served, in the model's dtype.
        dsa: its model's.
        table: of cosines and sines.
    """

    def __init__(
        self, weights: LayerWeights, request: Request, dsa: DSAConfig, table: Tensor
    ) -> None:
        self.request = converted(request, torch.float64)
        self.norms, self.table = norms_of(weights), table
        self._w_uk, self._w_uv = split_kv_b(weights.kv_b_proj, dsa)
        self._all = torch.arange(len(request.kv), device=request.kv.device)

    def latents(self, maths: Maths) -> Tensor:
        """[L, 576], as they are cached."""
        return reference.latents(self.request.kv, self.norms, self._all, self.table, maths)

    def keys(self, maths: Maths, *, fp8: bool, earlier_by: int = 0) -> Tensor:
        """[L, 128], as they are cached: Hadamard's matrix on them where it is used.

        Args:
            maths: how they are computed.
            fp8: whether the cache is, for which keys and queries are rotated.
            earlier_by: of the request that had the pages before, and was so many tokens ahead.
        """
        assert self.request.keys is not None
        raw = self.request.keys.roll(earlier_by, 0)
        keys = reference.index_keys(raw, self.norms, self._all, self.table, maths)
        return keys @ reference.hadamard(keys) if fp8 and maths.hadamard == "both" else keys

    def scores(self, maths: Maths) -> Tensor:
        """[R, L], -inf of what a row does not see."""
        return scored(self.request, self.norms, self.table, maths)

    def scores_of(self, keys: Tensor, maths: Maths, *, fp8: bool) -> Tensor:
        """[R, L] of keys [L, 128] as they lie in a cache."""
        assert self.request.index_q is not None
        assert self.request.index_weights is not None
        query, weights = reference.index_queries(
            self.request.index_q, self.request.index_weights, self.request.rows, self.table, maths
        )
        if fp8:
            query = query @ reference.hadamard(query)
        return reference.scores(query, weights, keys.double(), self.request.rows, maths)

    def out(self, maths: Maths, mask: Tensor, latents: Tensor | None = None) -> Tensor:
        """[R, heads, v_head_dim] over the keys of mask [R, L], of other latents if given."""
        latents = self.latents(maths) if latents is None else latents.double()
        query = self._query(self.request.q, self.request.rows, maths)
        return reference.attend(query, latents, mask, self._w_uv, maths)

    def attention(self, maths: Maths) -> Tensor:
        """Dense attention of the last few rows to all that they see, [rows, L], mean over heads."""
        latents = self.latents(maths)
        rows = self.request.rows[-_DENSE_ROWS:]
        query = self._query(self.request.q[-_DENSE_ROWS:], rows, maths)
        found = [
            reference.probabilities(q, latents, self._all <= row, maths.softmax_scale).mean(0)
            for q, row in zip(query, rows, strict=True)
        ]
        return torch.stack(found)

    def _query(self, q: Tensor, rows: Tensor, maths: Maths) -> Tensor:
        return reference.absorbed(q, self._w_uk, rows, self.table, maths)
