"""Which known mistake a wrong result equals: each is recomputed in fp64 and compared.

They are mistakes that engines shipped; docs/verify.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_PAGE, LATENT_DIM
from dsa_plugin.config import DSAConfig
from dsa_plugin.verification.compare import Cell, Selection, relative
from dsa_plugin.verification.exact import Exact
from dsa_plugin.verification.reference import Maths, Style, softmax_scale
from dsa_plugin.verification.serving import EARLIER_BY, Served

_YARN_MSCALE = 1.3688879454113936  # of factor 40, as DeepSeek's releases have it
_PAGES_TRIED = 64
# Rounding moves some amax across a power of two, and with it the scale that a mistake drops.
_STRAYING = 0.1


@dataclass(frozen=True)
class Case:
    """A cell that is wrong, and what it was made from.

    Attributes:
        cell: what was measured.
        exact: the request in fp64.
        served: what came out.
        selection: of the rows.
        maths: what config.json declares.
        mscale: YaRN's, 1 without.
        fp8: whether caches are.
    """

    cell: Cell
    exact: Exact
    served: Served
    selection: Selection
    maths: Maths
    mscale: float
    fp8: bool


def other_style(style: Style) -> Style:
    """The other of the two in use."""
    return "half-split" if style == "interleaved" else "interleaved"


def mistakes(case: Case, dsa: DSAConfig) -> tuple[str, ...]:
    """What is wrong, by name; empty where it is no known mistake."""
    found: list[str] = []
    wrong = case.cell.wrong
    if "index keys" in wrong:
        found += _of_keys(case)
    if "selection" in wrong:
        found += _of_selection(case, explained=bool(found))
    if "latents" in wrong:
        found += _of_latents(case)
    if "attention" in wrong:
        found += _of_attention(case, dsa, explained="latents" in wrong and bool(found))
    return tuple(dict.fromkeys(found))


def indexer_variants(maths: Maths, *, fp8: bool) -> Iterator[tuple[str, Maths]]:
    """Mistakes of an indexer."""
    style, other = maths.index_rope, other_style(maths.index_rope)
    yield f"wrong indexer RoPE style: {other} for {style}", replace(maths, index_rope=other)
    yield "the indexer's RoPE is left out", replace(maths, index_rope="none")
    yield (
        "the indexer's RoPE is on the last 64 of 128 values in place of the first",
        replace(maths, index_rope_last=True),
    )
    yield (
        "Hadamard's matrix is on index keys and not on queries",
        replace(maths, hadamard="keys"),
    )
    yield (
        "Hadamard's matrix is on index queries and not on keys",
        replace(maths, hadamard="queries"),
    )
    yield "the indexer's ReLU is left out", replace(maths, relu=False)
    yield "k_norm's bias is left out", replace(maths, key_bias=False)
    yield "top-k off by one: the newest key is not seen", replace(maths, unseen=1)
    if fp8:
        yield "dropped FP8 scale of the index keys", replace(maths, key_scale=False)
        yield "dropped FP8 scale of the index queries", replace(maths, query_scale=False)


def attention_variants(
    maths: Maths, mscale: float, dsa: DSAConfig, *, fp8: bool
) -> Iterator[tuple[str, Maths]]:
    """Mistakes of MLA."""
    head_dim = dsa.qk_nope_head_dim + dsa.qk_rope_head_dim
    scales = {
        "without YaRN's mscale": softmax_scale(head_dim, 1.0),
        "with YaRN's mscale once, not squared": softmax_scale(head_dim, mscale**0.5),
        "with YaRN's mscale squared twice": softmax_scale(head_dim, mscale**2),
        "of qk_nope_head_dim alone": softmax_scale(dsa.qk_nope_head_dim, mscale),
        "of the latent's 576 values": softmax_scale(LATENT_DIM, mscale),
        "with the mscale of a YaRN factor of 40": softmax_scale(head_dim, _YARN_MSCALE),
    }
    for text, scale in scales.items():
        if scale != maths.softmax_scale:
            named = f"wrong softmax scale: {scale:.4g}, {text}, for {maths.softmax_scale:.4g}"
            yield named, replace(maths, softmax_scale=scale)
    yield from _latent_variants(maths, fp8=fp8)


def _latent_variants(maths: Maths, *, fp8: bool) -> Iterator[tuple[str, Maths]]:
    yield "wrong MLA RoPE style: half-split for interleaved", replace(maths, mla_rope="half-split")
    yield "MLA's RoPE is left out", replace(maths, mla_rope="none")
    if fp8:
        yield "dropped FP8 scale of the latents", replace(maths, latent_scale=False)


def _of_keys(case: Case) -> list[str]:
    served, allowed = case.served.keys, case.cell.keys
    assert served is not None
    assert allowed is not None
    bad = _bad_pages(served, case.exact.keys(case.maths, fp8=case.fp8), allowed.allowed)
    pages = bad.unique_consecutive().tolist()
    if 0 < len(pages) < -(-len(served) // INDEX_PAGE):
        earlier = case.exact.keys(case.maths, fp8=case.fp8, earlier_by=EARLIER_BY)
        tokens = _tokens(pages, len(served), served.device)
        stale = relative(served[tokens], earlier[tokens]).min() <= allowed.allowed
        what = "the request that had it before" if stale else "something else"
        return [f"stale index page: {_pages(pages)} holds keys of {what}"]
    variants = indexer_variants(case.maths, fp8=case.fp8)
    keys = ((name, case.exact.keys(maths, fp8=case.fp8)) for name, maths in variants)
    return _nearest(served, keys, allowed.allowed)


def _of_selection(case: Case, *, explained: bool) -> list[str]:
    selection, topk, exact = case.selection, case.maths.index_topk, case.exact
    if exact.request.keys is None:
        return ["missing sharing: the layer overwrites the selection that it shares"]
    if selection.lacking > 0 and not selection.invalid:
        return [f"top-k off by one: {selection.lacking} keys fewer than index_topk {topk}"]
    strayed = {
        name: int(selection.misplaced(exact.scores(maths), topk).sum())
        for name, maths in indexer_variants(case.maths, fp8=case.fp8)
    }
    nearest = min(strayed, key=lambda name: strayed[name])
    if strayed[nearest] <= _STRAYING * case.cell.misplaced:
        return [nearest]
    assert case.served.keys is not None
    of_cached = exact.scores_of(case.served.keys, case.maths, fp8=case.fp8)
    if explained and not selection.misplaced(of_cached, topk).any():
        return []
    scores = exact.scores(case.maths)
    page = torch.arange(scores.shape[1], device=scores.device) // INDEX_PAGE
    suspects = page[selection.misplaced(scores, topk).any(0)].unique(return_counts=True)
    order = suspects[1].argsort(descending=True)[:_PAGES_TRIED]
    for suspect in suspects[0][order].tolist():
        if not selection.misplaced(scores, topk, page != suspect).any():
            return [f"stale index page: page {suspect} is scored by keys that are not its own"]
    return []


def _of_latents(case: Case) -> list[str]:
    served, allowed = case.served.latents, case.cell.latents.allowed
    bad = _bad_pages(served, case.exact.latents(case.maths), allowed)
    pages = bad.unique_consecutive().tolist()
    if 0 < len(pages) < -(-len(served) // INDEX_PAGE):
        return [f"stale latent page: {_pages(pages)} holds latents of something else"]
    variants = _latent_variants(case.maths, fp8=case.fp8)
    latents = ((name, case.exact.latents(maths)) for name, maths in variants)
    return _nearest(served, latents, allowed)


def _of_attention(case: Case, dsa: DSAConfig, *, explained: bool) -> list[str]:
    exact, allowed, mask = case.exact, case.cell.out.allowed, case.selection.mask

    served = case.served.out
    variants = attention_variants(case.maths, case.mscale, dsa, fp8=case.fp8)
    outs = ((name, exact.out(maths, mask)) for name, maths in variants)
    if found := _nearest(served, outs, allowed):
        return found
    of_cached = exact.out(case.maths, mask, case.served.latents)
    if explained and _nearest(served, [("", of_cached)], allowed):
        return []
    shares = case.cell.source != case.cell.layer
    what = "missing sharing: the layer" if shares else "the layer"
    others = _other_selections(exact.request.rows, mask.shape[1], case.maths.index_topk)
    named = (
        (f"{what} attends to {name} in place of what was selected", exact.out(case.maths, other))
        for name, other in others
    )
    if found := _nearest(served, named, allowed):
        return found
    if shares:
        of = f"what layer {case.cell.source} selected"
        return [f"missing sharing, likely: no mistake of MLA over {of} gives these numbers"]
    return []


def _other_selections(rows: Tensor, length: int, topk: int) -> Iterator[tuple[str, Tensor]]:
    position = torch.arange(length, device=rows.device)
    seen = position <= rows[:, None]
    yield "every key", seen
    yield f"the last {topk} keys", seen & (position > rows[:, None] - topk)
    yield f"the first {topk} keys", seen & (position < topk)
    yield "no key", torch.zeros_like(seen)
    yield "the first key alone", seen & (position == 0)


def _nearest(served: Tensor, truths: Iterable[tuple[str, Tensor]], allowed: float) -> list[str]:
    """The mistake by which nearly all of T vectors are as near as rounding explains, if any."""
    errors = {}
    for name, truth in truths:
        error = relative(served, truth)
        if (error > allowed).double().mean() <= _STRAYING:
            errors[name] = float(error.median())
    return sorted(errors, key=lambda name: errors[name])[:1]


def _bad_pages(served: Tensor, truth: Tensor, allowed: float) -> Tensor:
    """Pages with a token whose entry is off, one for each."""
    return (relative(served, truth) > allowed).nonzero()[:, 0] // INDEX_PAGE


def _tokens(pages: list[int], length: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return torch.isin(position // INDEX_PAGE, torch.tensor(pages, device=device))


def _pages(pages: list[int]) -> str:
    shown = ", ".join(str(page) for page in pages[:4])
    return f"page{'s' * (len(pages) > 1)} {shown}{' ...' * (len(pages) > 4)}"
