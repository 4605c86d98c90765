"""`dsa verify` on trained and random weights: each known mistake of serving is caught and named.

A mistake is planted in the ops that serving calls; fp64 and the eager forms do not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_kernels.dims import INDEX_PAGE
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_plugin import attention
from dsa_plugin.attention import ops
from dsa_plugin.verification.report import Report
from dsa_plugin.verification.run import verify
from dsa_testbed.checkpoint import make_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
LENGTH = 200
LAYER = 1
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", params=["demo", "v32-bf16", "glm5-fp32"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A trained checkpoint, and random ones with YaRN and without."""
    return DEMO if request.param == "demo" else make_checkpoint(request.param)


def run(folder: Path, layer: int = LAYER, length: int = LENGTH) -> Report:
    return verify(folder, [layer], [length])


def mistakes(report: Report) -> set[str]:
    return {mistake for cell in report.cells for mistake in cell.mistakes}


def wrap(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """`change` gets the op, then its arguments."""
    op = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: change(op, *args, **kwargs))


def other_rope_style(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(op: Any, k: Any, norm: Any, rope: Any, *rest: Any, **kwargs: Any) -> None:
        op(k, norm, replace(rope, interleaved=not rope.interleaved), *rest, **kwargs)

    def query(op: Any, q: Any, weights: Any, rope: Any, *rest: Any, **kwargs: Any) -> Any:
        return op(q, weights, replace(rope, interleaved=not rope.interleaved), *rest, **kwargs)

    wrap(monkeypatch, "index_cache_write", keys)
    wrap(monkeypatch, "index_query", query)


def hadamard_on_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def query(op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs | {"hadamard": False})

    wrap(monkeypatch, "index_query", query)


def scale_without_mscale(monkeypatch: pytest.MonkeyPatch) -> None:
    change_scale(monkeypatch, 1.3688879454113936**-2)


def scale_with_mscale(monkeypatch: pytest.MonkeyPatch) -> None:
    change_scale(monkeypatch, 1.3688879454113936**2)


def change_scale(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def gathered(op: Any, q: Any, cache: Any, slots: Any, scale: float, **kwargs: Any) -> Any:
        return op(q, cache, slots, scale * factor, **kwargs)

    def masked(op: Any, q: Any, k: Any, v: Any, indices: Any, scale: float, **kwargs: Any) -> Any:
        return op(q, k, v, indices, scale * factor, **kwargs)

    wrap(monkeypatch, "sparse_mla", gathered)
    wrap(monkeypatch, "masked_mha", masked)


def one_key_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(op: Any, *args: Any, out: Any) -> Any:
        op(*args, out=out)
        out[:, -1] = -1

    def decodes(op: Any, *args: Any, out: Any, slots: Any) -> Any:
        op(*args, out=out, slots=slots)
        out[:, -1] = slots[:, -1] = -1

    wrap(monkeypatch, "topk_select", chunk)
    wrap(monkeypatch, "topk_select_slots", decodes)


def newest_key_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(op: Any, logits: Any, k: int, start: Any, end: Any, **kwargs: Any) -> Any:
        return op(logits, k, start, end - 1, **kwargs)

    def decodes(op: Any, logits: Any, k: int, end: Any, *args: Any, **kwargs: Any) -> Any:
        return op(logits, k, end - 1, *args, **kwargs)

    wrap(monkeypatch, "topk_select", chunk)
    wrap(monkeypatch, "topk_select_slots", decodes)


def page_not_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Physical page 1 keeps the keys of the request that had it before."""
    seen: set[int] = set()

    def write(op: Any, k: Any, *args: Any, **kwargs: Any) -> None:
        *rest, cache, slots = args
        if cache.data_ptr() in seen:
            slots = torch.where(slots // INDEX_PAGE == 1, -1, slots)
        seen.add(cache.data_ptr())
        op(k, *rest, cache, slots, **kwargs)

    wrap(monkeypatch, "index_cache_write", write)


def page_read_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's second page is scored by the keys of its first."""

    def gather(op: Any, cache: Any, table: Any, num_keys: int) -> Any:
        return op(cache, table.clone().index_fill_(0, torch.tensor(1), int(table[0])), num_keys)

    def paged(op: Any, q: Any, weights: Any, cache: Any, table: Any, *rest: Any) -> Any:
        return op(
            q, weights, cache, torch.cat((table[:, :1], table[:, :1], table[:, 2:]), 1), *rest
        )

    wrap(monkeypatch, "gather_index_keys", gather)
    wrap(monkeypatch, "indexer_logits_paged", paged)


def key_scale_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(op: Any, *args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        if args[4].dtype == torch.uint8:
            index_fp8_views(args[4])[1].fill_(1)

    wrap(monkeypatch, "index_cache_write", write)


def latent_scale_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(op: Any, *args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        if args[4].dtype == torch.uint8:
            latent_fp8_views(args[4])[1].fill_(1)

    wrap(monkeypatch, "latent_cache_write", write)


def latents_half_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs (i, i + 32) are rotated; they lie side by side, which dot products do not see."""
    order = torch.arange(64).view(2, 32).T.flatten()

    def write(op: Any, kv: Any, *rest: Any, **kwargs: Any) -> None:
        op(torch.cat((kv[:, :512], kv[:, 512:][:, order]), 1), *rest, **kwargs)

    def rotate(op: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
        return op(x[..., order], *rest, **kwargs)

    wrap(monkeypatch, "latent_cache_write", write)
    wrap(monkeypatch, "apply_rope", rotate)


def test_right_serving_passes(folder: Path) -> None:
    report = verify(folder, [LAYER], [63, 64, 65, LENGTH])
    assert not report.wrong, [str(finding) for finding in report.findings]
    assert len(report.cells) == 8
    assert min(cell.agreement or 1 for cell in report.cells) > 0.9


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (other_rope_style, "wrong indexer RoPE style"),
        (one_key_fewer, "top-k off by one: 1 keys fewer than index_topk 64"),
        (newest_key_unseen, "top-k off by one: the newest key is not seen"),
        (page_not_rewritten, "stale index page: page"),
        (page_read_for_another, "stale index page: page 1 is scored by keys that are not its own"),
        (latents_half_split, "wrong MLA RoPE style"),
        (key_scale_dropped, "dropped FP8 scale of the index keys"),
        (latent_scale_dropped, "dropped FP8 scale of the latents"),
        (hadamard_on_keys_alone, "Hadamard's matrix is on index keys and not on queries"),
    ],
)
def test_a_mistake_is_caught_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, named: str
) -> None:
    plant(monkeypatch)
    report = run(folder)
    assert report.wrong
    assert [name for name in mistakes(report) if name.startswith(named)], mistakes(report)
    # What is right is not called wrong: these two mistakes are of fp8 caches alone.
    of_fp8 = plant in (key_scale_dropped, latent_scale_dropped, hadamard_on_keys_alone)
    assert {bool(cell.wrong) for cell in report.cells if cell.caches != "fp8"} == {not of_fp8}


@pytest.mark.parametrize(
    ("model", "plant", "named"),
    [
        ("v32-bf16", scale_without_mscale, "without YaRN's mscale, for 0.1352"),
        ("demo", scale_with_mscale, "with the mscale of a YaRN factor of 40, for 0.08839"),
        ("glm5-fp32", scale_with_mscale, "with the mscale of a YaRN factor of 40, for 0.0625"),
    ],
)
def test_a_wrong_softmax_scale(
    monkeypatch: pytest.MonkeyPatch, model: str, plant: Plant, named: str
) -> None:
    plant(monkeypatch)
    report = run(DEMO if model == "demo" else make_checkpoint(model))
    assert all(named in name for name in mistakes(report))
    assert all(cell.wrong == ("attention",) for cell in report.cells)


SHARED = 3  # of GLM-5.2's small one, from layer 2


@pytest.mark.parametrize("mistake", ["every key", "the last 64 keys", "no key", "likely"])
def test_missing_sharing(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    forward = attention.forward

    def unshared(
        layer: Any, projections: Any, metadata: Any, indices: Any, out: Any, **kw: Any
    ) -> None:
        if kw["reuse_selection"]:
            end = metadata.context_lens[:, None]
            first = torch.arange(64, dtype=torch.int32)
            indices = (
                {
                    "every key": torch.arange(LENGTH).int().where(torch.arange(LENGTH) < end, -1),
                    "the last 64 keys": end - 64 + first,
                    "no key": torch.full_like(indices, -1),
                    "likely": first * 2 + 5,  # some that nothing has chosen
                }[mistake]
                .expand(len(end), -1)
                .contiguous()
            )
        forward(layer, projections, metadata, indices, out, **kw)

    folder = make_checkpoint("glm52-fp32")
    assert not run(folder, SHARED).wrong
    monkeypatch.setattr(attention, "forward", unshared)
    report = run(folder, SHARED)
    assert all(name.startswith("missing sharing") for name in mistakes(report))
    assert any(mistake in name for name in mistakes(report))


def test_a_selection_that_a_shared_layer_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attention.forward

    def spoiled(*args: Any, reuse_selection: bool) -> None:
        forward(*args, reuse_selection=reuse_selection)
        if reuse_selection:
            args[3].fill_(0)

    monkeypatch.setattr(attention, "forward", spoiled)
    report = run(make_checkpoint("glm52-fp32"), SHARED)
    assert all(cell.wrong == ("selection",) for cell in report.cells)


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(op: Any, *args: Any, **kwargs: Any) -> Any:
        out, lse = op(*args, **kwargs)
        out[0, 0, 0] = torch.nan
        return out, lse

    wrap(monkeypatch, "sparse_mla", spoiled)
    assert any("attention" in cell.wrong for cell in run(DEMO).cells)
