"""Figures: who has what, accuracy by round, divergence by layer, anything against a skew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

Runs = Sequence[Mapping[int, float]]
"""A measurement by the number of rounds, for each seed."""
Points = Mapping[Any, Sequence[float]]
"""Measurements of several draws by the number that they are drawn against."""
_COLORS = ("tab:blue", "tab:orange", "tab:red", "tab:green", "tab:purple", "tab:brown")


def heat_map(counts: Any, names: Sequence[Any], *, title: str = "") -> matplotlib.figure.Figure:
    """Examples of each class with each client.

    Args:
        counts: [clients classes], as `metrics.histograms` gives.
        names: of the classes.
        title: over it.
    """
    counts = np.asarray(counts)
    clients, classes = counts.shape
    size = (max(4.0, 0.5 * classes + 2), min(12.0, max(3.0, 0.28 * clients + 1.5)))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    if clients <= 30:
        for (client, label), count in np.ndenumerate(counts):
            color = "black" if count > 0.7 * counts.max() else "white"
            axes.text(label, client, str(count), ha="center", va="center", color=color, fontsize=7)
    axes.set(xlabel="class", ylabel="client", title=title)
    axes.set_xticks(range(classes), [str(name) for name in names])
    figure.colorbar(image, label="examples")
    return figure


def curves(
    runs: Mapping[str, Runs], *, title: str, dashed: str = "", ylabel: str = "accuracy"
) -> matplotlib.figure.Figure:
    """A measurement by round: means over seeds, bands from the lowest to the highest seed.

    Args:
        runs: by name.
        title: over it.
        dashed: the run that the others are compared with.
        ylabel: what is measured.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, seeds), color in zip(runs.items(), _COLORS, strict=False):
        x = list(seeds[0])
        values = np.array([list(run.values()) for run in seeds])
        style: dict[str, Any] = {"color": color}
        if name == dashed:
            style = {"color": "black", "linestyle": "--"}
        axes.plot(x, values.mean(0), label=name, **style)
        axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.12)
    axes.set(xlabel="round", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], *, title: str) -> matplotlib.figure.Figure:
    """Divergence of each layer, a bar for each partition."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    for number, ((name, values), color) in enumerate(zip(groups.items(), _COLORS, strict=False)):
        at = np.arange(len(layers)) + width * (number - (len(groups) - 1) / 2)
        axes.bar(at, [values[layer] for layer in layers], width, label=name, color=color)
    axes.set_xticks(range(len(layers)), layers)
    axes.set(ylabel="‖w − reference‖ / ‖reference‖", title=title)
    axes.legend()
    return figure


def against(
    panels: Mapping[str, Mapping[str, Points]],
    *,
    xlabel: str,
    title: str,
    levels: Mapping[str, float] | None = None,
    second: tuple[str, Mapping[float, float]] | None = None,
    xscale: str = "linear",
) -> matplotlib.figure.Figure:
    """Means and standard deviations over draws against a number, a panel for each quantity.

    Args:
        panels: by quantity: by name of a line: points.
        xlabel: what they are drawn against.
        title: over all.
        levels: horizontal lines in the last panel, by name.
        second: name and values, by x, of a second axis at the last panel's right.
        xscale: "log" where the number spans decades.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = matplotlib.figure.Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    row = [figure.add_subplot(rows, columns, number + 1) for number in range(len(panels))]
    for axes, (ylabel, lines) in zip(row, panels.items(), strict=True):
        for (name, points), color in zip(lines.items(), _COLORS, strict=False):
            x = sorted(points)
            mean = [float(np.mean(points[value])) for value in x]
            deviation = [float(np.std(points[value])) for value in x]
            axes.errorbar(x, mean, deviation, fmt="o-", capsize=3, label=name, color=color, ms=4)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale)
        axes.grid(alpha=0.3)
    for (name, level), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        row[-1].axhline(level, color="black", linestyle=style, linewidth=1, label=name)
    if second is not None:
        name, values = second
        other = row[-1].twinx()
        other.plot(sorted(values), [values[x] for x in sorted(values)], ":", color="tab:gray")
        other.set_ylabel(name, color="tab:gray")
    for axes in row:
        axes.legend(fontsize="small")
    figure.suptitle(title)
    return figure
