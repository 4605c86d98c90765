"""Which RoPE style an indexer was trained with, from its weights alone.

An indexer is trained until its scores rank keys as the log of dense attention does (DeepSeek-V3.2-
Exp report, section 2.1.1). Under the style that it was trained with the two go together; under the
other much less, and with random weights not at all. The share of attention that the selected keys
hold says the same, but less plainly: the last few keys often hold most of it under any style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_plugin.verification.exact import Exact
from dsa_plugin.verification.findings import Finding, layers_text
from dsa_plugin.verification.naming import other_style
from dsa_plugin.verification.reference import Maths, top

_TRAINED = 0.2
_TELLING = 0.05
"""Of the correlation: random weights stay within 0.03 of 0 under either style."""


@dataclass(frozen=True)
class Fit:
    """How an indexer goes with dense attention under one style, the mean over some rows.

    Attributes:
        correlation: of scores and the log of attention, over keys older than the last index_topk.
        recall: the share of attention that the selected keys hold.
    """

    correlation: float
    recall: float


@dataclass(frozen=True)
class Recall:
    """A layer's fits under its own style and the other; `chance` is a random selection's recall."""

    layer: int
    length: int
    declared: Fit
    other: Fit
    chance: float


def recall_of(exact: Exact, layer: int, maths: Maths) -> Recall:
    """Of the request's last rows, which have to see more than index_topk keys."""
    attention = exact.attention(maths)
    length = len(exact.request.kv)
    other = replace(maths, index_rope=other_style(maths.index_rope))
    return Recall(
        layer,
        length,
        _fit(exact, attention, maths),
        _fit(exact, attention, other),
        maths.index_topk / length,
    )


def style_finding(recalls: Sequence[Recall], maths: Maths) -> Finding | None:
    """What the weights say of the declared style; None without a length that can tell."""
    if not recalls:
        return None
    declared = sum(r.declared.correlation for r in recalls) / len(recalls)
    other = sum(r.other.correlation for r in recalls) / len(recalls)
    style, than = maths.index_rope, other_style(maths.index_rope)
    shares = (
        f"index scores go with the log of dense attention by {declared:.2f} with {style} RoPE and "
        f"by {other:.2f} with {than} (1 is best, 0 chance)"
    )
    where = f"indexers of layers {layers_text(r.layer for r in recalls)}"
    # NaN, of weights that hold some or are zero, is neither.
    if not (max(declared, other) >= _TRAINED and abs(declared - other) >= _TELLING):
        what = "the weights do not tell which RoPE style they want, as random ones do not"
        return Finding("note", where, f"{what}: {shares}")
    if declared > other:
        return Finding("note", where, f"the weights were trained with this RoPE style: {shares}")
    flag = str(than == "interleaved").lower()
    return Finding(
        "wrong",
        where,
        f"wrong indexer RoPE style: config.json means {style}, the weights were trained {than}: "
        f"{shares}",
        f'say "indexer_rope_interleave": {flag} in config.json, or restore its model_type',
    )


def _fit(exact: Exact, attention: Tensor, maths: Maths) -> Fit:
    rows = len(attention)
    scores, positions = exact.scores(maths)[-rows:], exact.request.rows[-rows:]
    recall = attention.masked_fill(~top(scores, maths.index_topk), 0).sum(1).mean()
    correlations = []
    for score, weight, position in zip(scores, attention, positions.tolist(), strict=True):
        old = slice(0, position + 1 - maths.index_topk)
        log = weight[old].clamp(min=torch.finfo(weight.dtype).tiny).log()
        correlations.append(torch.corrcoef(torch.stack((score[old], log)))[0, 1])
    return Fit(float(torch.stack(correlations).mean()), float(recall))
