"""Direct preference optimization, as Llama 3 and 4 do it, and its variants.

By default the model of `python -m experiments.sft` learns to prefer real docstrings to corrupted
ones, in about a minute:

    python -m experiments.dpo
    python -m experiments.dpo --checkpoint DIR --data pairs.jsonl --beta 0.1 --nll 0.2
    python -m experiments.dpo --checkpoint DIR --data pairs.jsonl --kind ipo --rank 16

Records have chosen and rejected answers, to a shared prompt or each with its own conversation. A
pair lies in one row, so pairs are packed like anything else. What the reference model, which is the
model itself before training, says of every pair is computed once before the first step; with
adapters the model without them says it in every step.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import numpy as np

from experiments import examples, leaves, recipe
from experiments.console import told
from l4jax import checkpoints, lora
from l4jax.data import conversations, corpus, pipeline
from l4jax.data import tokenizer as tokenizers
from l4jax.data.mixture import Mixture
from l4jax.models.llama4 import Llama
from l4jax.training import filtering, loop, objectives, teacher
from l4jax.training.trainer import spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/dpo"
    checkpoint: str = "runs/sft/model"
    """The model to start from, in any format, with its tokenizer."""
    tokenizer: str | None = None
    """File or folder, if it is not beside the checkpoint."""
    beta: float = 0.1
    """How closely the model stays to its reference: the larger, the closer."""
    kind: objectives.Preference = "sigmoid"
    """Loss of a pair."""
    label_smoothing: float = 0.0
    """Share of the pairs whose labels are taken to be wrong."""
    nll: float = 0.2
    """Weight of the chosen answer's cross-entropy."""
    length_normalized: bool = False
    """Whether rewards are means over an answer's tokens instead of sums."""
    reference_free: bool = False
    """Whether there is no reference."""
    formatting: bool = False
    """Whether headers and tokens that end a turn count, which Llama 3 leaves out."""
    edited: Literal["leave", "replace"] = "leave"
    """Whether an edited answer, which is better than the chosen one, takes its place."""
    pairs: int = 8
    """Most pairs in a row."""
    balance: float = 0.0
    """Weight of the load balance between experts."""
    export: bool = False
    """Also write Hugging Face's files."""
    adapters: leaves.Adapters = leaves.Adapters()
    run: loop.Settings = loop.Settings(steps=100, checkpoint_every=50, evaluate_every=25)
    optimization: leaves.Optimization = leaves.Optimization(
        learning_rate=3e-4, weight_decay=0.0, schedule="linear"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe.check_whole(self)
        if self.pairs < 1:
            raise ValueError(f"pairs {self.pairs} must be at least 1")
        objective(self)


def run(settings: Dpo) -> loop.Result:
    recipe.begin(settings)
    tokenizer = tokenizers.load(settings.tokenizer or settings.checkpoint)
    config = checkpoints.read_config(settings.checkpoint)
    recipe.check_vocabulary(tokenizer, config)
    recipe.check_model(settings, config)
    images = examples.sight(settings, settings.checkpoint, tokenizer)
    train, held_out = examples.mixtures(
        settings,
        conversations.Preferences(
            tokenizer,
            formatting=settings.formatting,
            edited=settings.edited,
            **examples.reading(settings, images),
        ),
        corpus.preferences,
        "Mining the standard library for better and worse answers",
    )
    model = recipe.load_model(settings.checkpoint, settings)
    batches = examples.training_batches(
        train, settings, packing="best_fit", segments=2 * settings.pairs, images=images
    )
    kept: Any = []
    if held_out is not None:
        kept = examples.held_out_batches(
            held_out, settings, packing="best_fit", segments=2 * settings.pairs, images=images
        )
    if needs_table(settings):
        add = reference(model, train, settings, images)
        batches = batches.map(add)
        refer = teacher.reference(model, 2 * settings.pairs)
        if held_out is not None:
            said = [{"reference": refer(spread(batch))["reference"]} for batch in kept]
            kept = dataclasses.replace(kept, more=said)
    model, trainable = settings.adapters.apply(model, settings.seed)
    training, result = recipe.train(
        settings, model, objective(settings), batches, trainable=trainable, kept=kept
    )
    recipe.finish(settings, training, tokenizer, export=settings.export)
    return result


def objective(settings: Dpo) -> objectives.Objective:
    """The loss that the leaves describe."""
    adapted = settings.adapters.rank > 0 and not settings.reference_free

    def base(model: Llama, batch: Any) -> Any:
        return objectives.segment_log_probs(lora.base(model), batch, segments=2 * settings.pairs)

    return objectives.dpo(
        settings.beta,
        kind=settings.kind,
        label_smoothing=settings.label_smoothing,
        nll=settings.nll,
        length_normalized=settings.length_normalized,
        reference=base if adapted else None,
        reference_free=settings.reference_free,
        balance=settings.balance,
    )


def needs_table(settings: Dpo) -> bool:
    """Whether the reference is a model of its own."""
    return not settings.reference_free and settings.adapters.rank == 0


def reference(model: Llama, mixture: Mixture, settings: Dpo, images: pipeline.Images | None) -> Any:
    """A function that adds to batches what the model, as it is now, says of their pairs."""
    compute = teacher.reference(model, 2 * settings.pairs)
    table = np.zeros((int(mixture.first[-1]), 2), np.float32)
    with told(f"Asking the reference about {len(table):,} pairs"):
        for store, first in zip(mixture.stores, mixture.first, strict=False):
            segments = 2 * settings.pairs
            for batch in examples.one_epoch(store, settings, segments=segments, images=images):
                asked = compute(spread(batch))
                found, numbers, ranks = (
                    filtering.gathered(asked[x]) for x in ("reference", "example", "ranks")
                )
                there = numbers >= 0
                table[first + numbers[there], 1 - ranks[there]] = found[there]

    def add(batch: Any) -> Any:
        # The last column of a row that has less pairs is looked up too, and masked.
        found = table[batch["example"], 1 - batch["ranks"]]
        return {**batch, "reference": np.where(batch["example"] >= 0, found, 0)}

    return add


POD = Dpo(
    out="",
    checkpoint="",
    length=8192,
    run=loop.Settings(
        steps=1000, checkpoint_every=250, checkpoint_minutes=20.0, evaluate_every=250
    ),
    place=leaves.Place(dtype="bfloat16", remat="full"),
    optimization=leaves.Optimization(
        learning_rate=1e-6, warmup=50, weight_decay=0.0, schedule="linear"
    ),
    files=leaves.Files(workers=4),
)
PRESETS = {name: leaves.on_pod(POD, name) for name in ("scout-v5p-64", "maverick-v5p-128")}

if __name__ == "__main__":
    sys.exit(recipe.main(Dpo(), run, PRESETS, __doc__))
