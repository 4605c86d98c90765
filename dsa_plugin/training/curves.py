"""The curves of a run: losses, KL and recall, exact answers, over steps."""

from itertools import pairwise
from pathlib import Path

from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.history import read_history

SMOOTHED_STEPS = 20
PANELS = (
    ("cross-entropy (nats)", ("answers", "prose")),
    ("indexer: KL (nats) and recall of attention in top-k", ("kl", "recall")),
    ("held-out answers said exactly, dense and over the top-k", ("exact", "exact_sparse")),
    ("held-out answers said exactly, dense, by kind", tuple(f"exact_{kind}" for kind in KINDS)),
)


def draw_curves(folder: Path, png: Path) -> None:
    """Draws a run's history.csv into a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = read_history(folder)
    if not rows:
        raise ValueError(f"{folder} has no history yet; train a step first")
    figure = Figure(figsize=(9, 13), layout="constrained")
    all_axes = figure.subplots(len(PANELS), sharex=True)
    for axes, (title, names) in zip(all_axes, PANELS, strict=True):
        for name in names:
            points = [(i, float(row[name])) for i, row in enumerate(rows) if row[name]]
            if points:
                steps, values = zip(*points, strict=True)
                each_step = len(points) > len(rows) / 10
                axes.plot(steps, smoothed(values) if each_step else values, label=name)
        for i, (before, row) in enumerate(pairwise(rows), start=1):
            if row["stage"] != before["stage"]:
                axes.axvline(i, color="black", linewidth=0.8)
                axes.annotate(row["stage"], (i, 0.9), xycoords=("data", "axes fraction"))
            elif row["length"] != before["length"]:
                axes.axvline(i, color="lightgray", linewidth=0.6, zorder=0)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    all_axes[-1].set_xlabel("step, all stages; gray lines: the length of texts changes")
    figure.savefig(png, dpi=110)


def smoothed(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and up to SMOOTHED_STEPS - 1 before it."""
    return [
        sum(window) / len(window)
        for i in range(len(values))
        if (window := values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1])
    ]
