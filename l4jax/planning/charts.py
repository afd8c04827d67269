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
    "meetings": "tab:olive",
    "other arguments": "tab:gray",
    "temporaries": "tab:orange",
}


_UNITS = {
    "GiB": (("GiB", 1.0), ("MiB", 2.0**-10), ("KiB", 2.0**-20)),
    "GB": (("GB", 1.0), ("MB", 1e-3), ("kB", 1e-6)),
    "s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
}
"""Smaller units, and what they are in the largest one."""
_SMALL = 0.01
"""Part of the HBM below which memory is drawn by itself."""


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
        unit, size = _unit("GB", wire["total"])
        label = f"{unit} sent per device and step: by kind, and again by mesh axis"
        _bars(axes[2], groups, size, label)
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
    unit, size = _unit("GiB", hbm["total"])
    for name, color in _MEMORY.items():
        if part := hbm.get(name, 0.0) / size:
            axes.barh(0, part, left=left, color=color, label=f"{name} {part:.3g}")
            left += part
    label, longest = f"{unit} of HBM per device, of {hbm['capacity']} GiB", hbm["total"]
    if hbm["total"] >= _SMALL * hbm["capacity"]:
        axes.axvline(hbm["capacity"] / size, color="black", linestyle="--")
        label, longest = f"{label} (dashed)", max(hbm["total"], hbm["capacity"])
    axes.set(yticks=[], xlabel=label)
    axes.set_xlim(0, 1.05 * longest / size)
    axes.legend(fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _times(axes: matplotlib.axes.Axes, seconds: Mapping[str, float]) -> None:
    named = {name: seconds[name] for name in _TIMES if seconds.get(name)}
    unit, size = _unit("s", max(named.values(), default=0.0))
    _bars(axes, {"tab:blue": named}, size, f"least time per step, {unit}")


def _unit(largest: str, value: float) -> tuple[str, float]:
    """The unit in which a value is at least 1, if there is one, and what it is in the largest."""
    units = _UNITS[largest]
    return next(((name, size) for name, size in units if value >= size), units[-1])


def _bars(
    axes: matplotlib.axes.Axes,
    groups: Mapping[str, Mapping[str, float]],
    size: float,
    label: str,
) -> None:
    """Bars from top to bottom, in groups by color, in a unit of this size."""
    for color, values in groups.items():
        drawn = axes.barh(list(values), [n / size for n in values.values()], color=color)
        axes.bar_label(drawn, fmt=" {:.3g}", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", labelsize=8)
