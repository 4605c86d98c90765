"""Results of `dsa eval` as a heat map: recall by the text's length and the depth of the fact."""

from __future__ import annotations

import math
from pathlib import Path

from dsa_plugin.evaluation.results import Results
from dsa_plugin.evaluation.summary import recall
from dsa_plugin.evaluation.variants import VARIANTS

_COLUMNS = 4
_DARK = 60  # of 100: black is not read on it


def draw(results: Results, path: Path) -> None:
    """Write the figure, a panel for each variant; the suffix of `path` chooses the format.

    Raises:
        ValueError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install it, or leave --plot out") from None

    found = recall(results.cells, lambda cell, answer: (cell.variant, answer.depth, cell.length))
    variants = [name for name in VARIANTS if any(key[0] == name for key in found)]
    depths = sorted({depth for _, depth, _ in found})
    lengths = sorted({length for _, _, length in found})
    columns = min(_COLUMNS, len(variants))
    rows = math.ceil(len(variants) / columns)
    figure = Figure(figsize=(1.5 + 3 * columns, 0.8 + 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    image = None
    for axes, variant in zip(panels, variants, strict=False):
        values = [
            [found[key].points if (key := (variant, d, n)) in found else math.nan for n in lengths]
            for d in depths
        ]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    color = "white" if value > _DARK else "black"
                    style = {"ha": "center", "va": "center", "fontsize": "small"}
                    axes.text(x, y, f"{value:.0f}", color=color, **style)
        axes.set_title(variant, fontsize="medium")
        axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    for axes in panels[len(variants) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="recall of 100")
    figure.supxlabel("length of the text, tokens")
    figure.supylabel("depth of the fact, of the text")
    figure.savefig(path, dpi=150)
