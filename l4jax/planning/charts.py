"""A plan as a picture: memory, time and traffic as bars."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.axes
import matplotlib.figure

_TIMES = ("compute", "hbm", "ici", "dcn")
_MEMORY = {
    "parameters": "tab:blue",
    "optimizer": "tab:cyan",
    "cache": "tab:green",
    "other arguments": "tab:gray",
    "temporaries": "tab:orange",
}


_VISIBLE = 0.005
"""Of the longest bar, or of a GiB: what is less is not drawn."""


def save(report: Mapping[str, Any], file: pathlib.Path) -> None:
    """Draws a plan's memory against what a device has, its least times, and what it sends."""
    bars = 3 if report.get("wire_gb") else 1
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + 1.6 * bars), layout="constrained")
    axes = figure.subplots(bars, 1, squeeze=False)[:, 0]
    figure.suptitle(title(report), fontsize=10)
    _memory(axes[0], report["hbm_gib"])
    if bars > 1:
        _times(axes[1], report["roofline_seconds"])
        wire = report["wire_gb"]
        groups = {"tab:blue": wire["by_kind"], "tab:orange": wire["by_axis"]}
        _bars(axes[2], groups, "GB sent per device and step: by kind, and again by mesh axis")
    figure.savefig(file, dpi=120)


def title(report: Mapping[str, Any]) -> str:
    """One line that says what was planned."""
    slices = f" × {report['slices']} slices" if report["slices"] > 1 else ""
    mesh = ", ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1) or "one device"
    return (
        f"{report['preset']} · {report['task']} · {report['topology']}{slices} · {mesh} · "
        f"{report['batch']} × {report['length']:,} tokens"
    )


def _memory(axes: matplotlib.axes.Axes, hbm: Mapping[str, float]) -> None:
    left = 0.0
    parts = {name: color for name, color in _MEMORY.items() if hbm.get(name, 0) >= _VISIBLE}
    for name, color in parts.items():
        axes.barh(0, hbm[name], left=left, color=color, label=f"{name} {hbm[name]:.1f}")
        left += hbm[name]
    if not parts:
        axes.barh(0, hbm["total"], color="tab:red", label=f"needed {hbm['total']:.1f}")
    axes.axvline(hbm["capacity"], color="black", linestyle="--")
    axes.set(yticks=[], xlabel=f"GiB of HBM per device; dashed: the {hbm['capacity']} there are")
    axes.set_xlim(0, 1.05 * max(hbm["total"], hbm["capacity"]))
    axes.legend(fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _times(axes: matplotlib.axes.Axes, seconds: Mapping[str, float]) -> None:
    named = {name: seconds[name] for name in _TIMES if seconds.get(name)}
    _bars(axes, {"tab:blue": named}, "least seconds per step")


def _bars(
    axes: matplotlib.axes.Axes, groups: Mapping[str, Mapping[str, float]], label: str
) -> None:
    """Bars from top to bottom, in groups by color."""
    for color, values in groups.items():
        shown = {name: n for name, n in values.items() if n >= _VISIBLE * max(values.values())}
        drawn = axes.barh(list(shown), list(shown.values()), color=color)
        axes.bar_label(drawn, fmt=" {:.3g}", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", labelsize=8)
