"""A Plan's costs by context, beside the points that DeepSeek published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, get_args

from dsa_plugin.planning.cost import BASIS, published_estimate
from dsa_plugin.planning.plan import Plan
from dsa_plugin.planning.sizes import Attention
from dsa_plugin.planning.work import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a plan, and of DeepSeek's machines: where both lines are one, both are seen.
_COLOURS: dict[Attention, tuple[str, str]] = {
    "dsa": ("tab:blue", "midnightblue"),
    "dense": ("tab:red", "maroon"),
}
_NAMES: dict[Attention, str] = {"dsa": "DSA", "dense": "dense MLA"}
_K = 1024


def draw(plan: Plan, path: Path) -> None:
    """Write the figure; the suffix of `path` chooses the format.

    Raises:
        ValueError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install it, or leave --plot out") from None

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), get_args(Stage), strict=True):
        _stage(axes, plan, stage)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    small = {"fontsize": "small", "title_fontsize": "small"}
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, title=fill(BASIS, 110), **small
    )
    where = f"{plan.count} x {plan.gpu} (tp {plan.tp}, dp {plan.dp}, ep {plan.ep})"
    price = f"{plan.gpu_hour_price:g} dollars a GPU-hour"
    figure.suptitle(f"{plan.model.name} on {where}, {price}")
    figure.savefig(path, dpi=150)


def _stage(axes: Axes, plan: Plan, stage: Stage) -> None:
    for attention, (ours, theirs) in _COLOURS.items():
        name = _NAMES[attention]
        field = stage if attention == "dsa" else f"{stage}_dense"
        costs = {row.context: getattr(row, field) for row in plan.cost}
        _line(axes, costs, "-", ours, f"{name}: this plan")
        positions = (1, 2 * _K, *range(8 * _K, 128 * _K + 1, 8 * _K))
        estimates = {n: published_estimate(stage, attention, n) for n in positions}
        _line(axes, estimates, ":", theirs, f"{name}: DeepSeek's H800s at 2, the same roofline")
        points = {
            point.position: point.dollars
            for point in plan.published
            if (point.stage, point.attention) == (stage, attention)
        }
        _line(axes, points, "*", theirs, f"{name}: DeepSeek's H800s at 2, as published")
    axes.set(yscale="log", xlabel="context, K tokens", title=stage)
    axes.set_ylabel("dollars a million tokens")
    longest = max(plan.context, 128 * _K) / _K
    axes.set_xticks([longest * n / 4 for n in range(5)])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def _line(
    axes: Axes, values: Mapping[int, float | None], style: str, colour: str, label: str
) -> None:
    known = {context: value for context, value in values.items() if value is not None}
    axes.plot(
        [context / _K for context in known],
        list(known.values()),
        style,
        color=colour,
        label=label,
        markersize=10,
    )
