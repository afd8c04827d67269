"""The demo's report for people."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_NAMES = {"pretrain": "pre-training", "sft": "fine-tuning", "dpo": "preferences"}


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report for people."""
    losses = report["held_out_loss"]
    table = Table("model", "held-out loss (nats per token)", title="Did it learn?")
    for name, value in (
        ("untrained", losses["before"]),
        ("unigram", losses["unigram"]),
        ("bigram", losses["bigram"]),
        (f"after {report['settings']['steps']['pretrain']} steps", losses["after"]),
    ):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    if not report["beats_bigram"]:
        console.print("It does not beat the bigram model; give it more --steps.", style="bold red")
    _show_stages(report["stages"], console)
    console.print(
        f"Always giving the answer that is most common for that kind of question: "
        f"{report['guessed_exact_match']:.1%} exact.",
        highlight=False,
    )
    _show_experts(np.asarray(report["stages"]["pretrain"]["expert_load"]), console)
    for item in report["samples"]:
        console.print(f"[bold]{item['prompt']!r}[/bold]", highlight=False)
        console.print(item["prompt"] + item["text"], markup=False, highlight=False)
        console.print()
    _show_answers(report["answers"], console)
    differences = report["largest_logit_difference"]
    console.print(
        f"{report['parameters']:,} parameters, {report['active_parameters']:,} active per token. "
        f"Training {report['training_tokens_per_second']:,.0f} tokens/s, "
        f"generation {report['generation_tokens_per_second']:,.0f} tokens/s (4 rows). "
        f"Logits read back differ by at most {differences['checkpoint']:.1e} (Orbax) and "
        f"{differences['export']:.1e} (Hugging Face). Took {report['seconds']:.0f} s.",
        highlight=False,
    )
    console.print(
        f"Figures, samples and checkpoints: {pathlib.Path(report['files']['curves.png']).parent}",
        markup=False,
    )


def _show_stages(stages: dict[str, Any], console: Console) -> None:
    """The exam after every stage."""
    table = Table(
        "after", "steps", "loss, texts", "loss, answers", "exact answers", "prefers chosen",
        title="Held out, stage by stage",
    )  # fmt: skip
    for name, exam in stages.items():
        table.add_row(
            _NAMES[name],
            str(exam["steps"]),
            f"{exam['documents']:.3f}",
            f"{exam['answers']:.3f}",
            f"{exam['exact_match']:.1%}",
            f"{exam['prefers_chosen']:.1%}",
        )
    console.print(table)
    rewards = stages["dpo"]["rewards"]
    console.print(
        f"Preferences held out: the chosen answer has the larger reward in "
        f"{rewards['accuracy']:.1%} of pairs, by {rewards['margin']:.3f} on average "
        f"(chosen {rewards['chosen_reward']:+.3f}, rejected {rewards['rejected_reward']:+.3f}).",
        highlight=False,
    )


def _show_experts(load: np.ndarray, console: Console) -> None:
    table = Table("layer", *(f"expert {e}" for e in range(load.shape[1])), title="Expert load")
    for layer, row in enumerate(load / load.sum(1, keepdims=True)):
        table.add_row(str(layer), *(f"{share:.0%}" for share in row))
    console.print(table)


def _show_answers(answers: list[dict[str, str]], console: Console) -> None:
    """A question of each kind, and what each stage's model says."""
    for item in answers:
        console.print(item["question"], style="bold", markup=False, highlight=False)
        told = {"true": item["answer"], **{_NAMES[name]: item[name] for name in _NAMES}}
        for name, text in told.items():
            console.print(f"  {name + ':':14}{text!r}", markup=False, highlight=False)
        console.print()
