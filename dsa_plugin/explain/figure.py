"""Layers x positions: what the rows that chose the generated tokens read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from textwrap import fill

import torch

from dsa_plugin.explain.page import layer_name
from dsa_plugin.explain.selections import Selections

_BINS = 400
_MARK = "tab:orange"
_TOP = -0.5  # of the first layer, in an image's coordinates


def draw(selections: Selections, path: Path, title: str, marked: Collection[int] = ()) -> None:
    """Write the figure; the suffix of `path` chooses the format.

    Args:
        selections: what to draw.
        path: where to.
        title: the figure's.
        marked: positions of the prompt to mark; a layer's label says how much of them was read.

    Raises:
        ValueError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "--figure needs matplotlib: pip install it, or leave --figure out"
        ) from None

    layers, rows = selections.layers, selections.choosing_rows
    width = -(-rows.stop // _BINS)
    times = torch.stack([selections.times_read(layer) for layer in layers])
    padded = torch.nn.functional.pad(times, (0, -rows.stop % width))
    bins = padded.unflatten(1, (-1, width)).amax(2) / len(rows)

    figure = Figure(figsize=(11, 2.2 + 0.34 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        bins.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
        extent=(0, bins.shape[1] * width, len(layers) + _TOP, _TOP),
    )  # fmt: skip
    figure.colorbar(image, label="share of the rows that read it", pad=0.01)
    positions = sorted(marked)
    shares = selections.shares_read(positions) if positions else {}
    names = [
        layer_name(each) + (f": {shares[each.layer]:.0%}" if shares else "") for each in layers
    ]
    axes.set_yticks(range(len(layers)), names)
    axes.set(xlabel="position", ylabel="layer", xlim=(0, rows.stop))
    axes.set_ylim(len(layers) + _TOP, _TOP)
    above = [_TOP - 0.15] * len(positions)
    axes.plot(positions, above, "v", color=_MARK, clip_on=False, markersize=7)
    figure.suptitle(fill(title, 110), fontsize="medium")
    figure.supxlabel(fill(_note(selections, width, len(positions)), 130), fontsize="small")
    figure.savefig(path, dpi=150)


def _note(selections: Selections, width: int, marked: int) -> str:
    rows = selections.choosing_rows
    note = (
        f"Rows {rows.start:,} to {rows.stop - 1:,}, which chose the generated tokens, "
        f"read at most {selections.index_topk:,} tokens each."
    )
    if width > 1:
        note += f" A column is {width} tokens and shows the one that was read most."
    if marked:
        note += f" Triangles: {marked} marked tokens; per cent: how much of them was read."
    return note
