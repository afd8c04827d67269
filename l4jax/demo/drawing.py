"""The demo's figures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

NAMES = ("curves.png", "sft.png", "dpo.png", "experts.png")
"""Files that `draw` writes."""
Lines = Sequence[Mapping[str, Any]]


def draw(out: pathlib.Path, report: Mapping[str, Any], lines: Mapping[str, Lines]) -> None:
    """Writes all figures: losses by step and what was held out, rewards, who got the tokens.

    Args:
        out: folder.
        report: what the demo found.
        lines: metrics of every step, by stage.
    """
    stages = report["stages"]
    figure, axes = _figure("Pre-training", "loss (nats per token)")
    losses = report["held_out_loss"]
    _curve(axes, lines["pretrain"], "loss", "training", "tab:blue")
    _ends(axes, lines["pretrain"], losses["before"], losses["after"])
    for name, style in (("unigram", ":"), ("bigram", "--")):
        label = f"{name}, held out"
        axes.axhline(losses[name], color="black", linestyle=style, linewidth=1, label=label)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120)

    figure, axes = _figure("Supervised fine-tuning", "loss (nats per token of an answer)")
    _curve(axes, lines["sft"], "loss", "training", "tab:blue")
    _ends(axes, lines["sft"], stages["pretrain"]["answers"], stages["sft"]["answers"])
    axes.legend()
    figure.savefig(out / "sft.png", dpi=120)

    _draw_preferences(out, lines["dpo"], stages["dpo"]["rewards"])
    _draw_experts(out, np.asarray(stages["pretrain"]["expert_load"]))


def _draw_preferences(out: pathlib.Path, lines: Lines, held_out: Mapping[str, float]) -> None:
    """`dpo.png`: rewards of both answers, and how often the chosen one's is larger."""
    figure = matplotlib.figure.Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    last = len(lines) - 1
    for side, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
        _curve(above, lines, f"{side}_reward", f"{side}, training", color)
        above.plot(
            [last], [held_out[f"{side}_reward"]], "o", color=color, label=f"{side}, held out"
        )
    above.axhline(0, color="black", linewidth=1)
    above.set(ylabel="reward", title="Direct preference optimization")
    above.legend()
    _curve(below, lines, "accuracy", "training", "tab:blue")
    below.plot([last], [held_out["accuracy"]], "o", color="tab:red", label="held out, after")
    below.set(xlabel="step", ylabel="share of pairs ranked right", ylim=(-0.02, 1.02))
    below.legend()
    figure.savefig(out / "dpo.png", dpi=120)


def _draw_experts(out: pathlib.Path, load: np.ndarray) -> None:
    """`experts.png`: the share of tokens of each expert [layers experts]."""
    load = load / load.sum(1, keepdims=True)
    figure = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load, cmap="viridis", vmin=0, aspect="auto")
    for (layer, expert), share in np.ndenumerate(load):
        color = "black" if share > 0.8 * load.max() else "white"
        axes.text(expert, layer, f"{share:.0%}", ha="center", va="center", color=color)
    axes.set(xlabel="expert", ylabel="layer", title="Share of held-out tokens")
    axes.set_xticks(range(load.shape[1]))
    axes.set_yticks(range(load.shape[0]))
    figure.colorbar(image)
    figure.savefig(out / "experts.png", dpi=120)


def _figure(title: str, ylabel: str) -> tuple[matplotlib.figure.Figure, Any]:
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    return figure, axes


def _curve(axes: Any, lines: Lines, name: str, label: str, color: str) -> None:
    """A metric by step, faint, and its running mean."""
    values = [line[name] for line in lines]
    width = max(1, len(values) // 50)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(values, color=color, alpha=0.25, linewidth=1)
    axes.plot(np.arange(len(smooth)) + width - 1, smooth, color=color, label=label)


def _ends(axes: Any, lines: Lines, before: float, after: float) -> None:
    ends = [0, len(lines) - 1]
    axes.plot(ends, [before, after], "o", color="tab:red", label="held out, before and after")
