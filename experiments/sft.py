"""Supervised fine-tuning on conversations: the whole model, or adapters (LoRA, QLoRA).

By default the model of `python -m experiments.pretrain` learns to answer questions about Python
functions, mined from the standard library's docstrings and signatures, in about a minute:

    python -m experiments.sft
    python -m experiments.sft --checkpoint DIR --data mine.jsonl --export
    python -m experiments.sft --checkpoint DIR --data mine.jsonl --rank 16 --quantize int4

Records may be of the forms that `l4jax.data.records` lists and, with `--images`, have images as
`l4jax.data.illustrations` says. Loss is on what the assistant says. `--keep-hardest 0.5` leaves out
the half of the examples that a model finds easiest, as was done for Llama 4. Leaves what
pre-training leaves; with adapters also `adapter/`, with `--export` Hugging Face's files in
`export/`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from experiments import examples, leaves, recipe
from experiments.console import say, told
from l4jax import checkpoints
from l4jax.config import TextConfig
from l4jax.data import conversations, corpus, pipeline
from l4jax.data import tokenizer as tokenizers
from l4jax.data.mixture import Mixture
from l4jax.data.store import Subset
from l4jax.models.llama4 import Llama
from l4jax.training import filtering, loop, objectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/sft"
    checkpoint: str = "runs/pretrain/model"
    """The model to start from, in any format, with its tokenizer."""
    tokenizer: str | None = None
    """File or folder, if it is not beside the checkpoint."""
    learn: conversations.Learn = "assistant"
    """Loss on all of the assistant's turns, its last one, or all turns of everybody."""
    keep_hardest: float = 1.0
    """Part of the examples to keep: those with the largest loss."""
    scorer: str | None = None
    """The checkpoint that says which examples are easy; the model itself by default."""
    balance: float = 0.0
    """Weight of the load balance between experts."""
    export: bool = False
    """Also write Hugging Face's files."""
    adapters: leaves.Adapters = leaves.Adapters()
    run: loop.Settings = loop.Settings(steps=200, checkpoint_every=100, evaluate_every=50)
    optimization: leaves.Optimization = leaves.Optimization(learning_rate=2e-3, weight_decay=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe.check_whole(self)
        if not 0 < self.keep_hardest <= 1:
            raise ValueError(f"keep_hardest {self.keep_hardest} must be above 0 and at most 1")
        if self.scorer and self.keep_hardest == 1:
            raise ValueError(f"scorer {self.scorer} has nothing to say with --keep-hardest 1")


def run(settings: Sft) -> loop.Result:
    recipe.begin(settings)
    tokenizer = tokenizers.load(settings.tokenizer or settings.checkpoint)
    config = checkpoints.read_config(settings.checkpoint)
    recipe.check_vocabulary(tokenizer, config)
    recipe.check_model(settings, config)
    if settings.scorer:
        check_scorer(settings, settings.scorer, config)
    images = examples.sight(settings, settings.checkpoint, tokenizer)
    train, held_out = examples.mixtures(
        settings,
        conversations.Conversations(
            tokenizer, learn=settings.learn, **examples.reading(settings, images)
        ),
        corpus.instructions,
        "Mining the standard library for questions and answers",
    )
    model = recipe.load_model(settings.checkpoint, settings)
    if settings.keep_hardest < 1:
        train = filter_easy(train, model, settings, images)
    model, trainable = settings.adapters.apply(model, settings.seed)
    batches = examples.training_batches(train, settings, packing="best_fit", images=images)
    say(f"{batches.efficiency(rows=1000).padding:.1%} of the rows is padding")
    kept: Any = []
    if held_out is not None:
        kept = examples.held_out_batches(held_out, settings, packing="best_fit", images=images)
    training, result = recipe.train(
        settings,
        model,
        objectives.next_token(balance=settings.balance),
        batches,
        trainable=trainable,
        kept=kept,
        measure=objectives.next_token(),
    )
    recipe.finish(settings, training, tokenizer, export=settings.export)
    return result


def check_scorer(settings: Sft, scorer: str, config: TextConfig) -> None:
    """Whether a scorer is there and reads what a model of this architecture does."""
    recipe.check_there(scorer, "--scorer")
    found = checkpoints.read_model(scorer)
    if settings.files.images and found.vision is None:
        raise ValueError(f"scorer {scorer}: has no image encoder; leave --images or --scorer out")
    size = found.text.vocab_size
    if size != config.vocab_size:
        raise ValueError(
            f"scorer {scorer}: has {size} words, the model {config.vocab_size}; it must read the "
            "same tokens"
        )


def filter_easy(
    mixture: Mixture, model: Llama, settings: Sft, images: pipeline.Images | None
) -> Mixture:
    """The mixture without the examples that a model finds easiest, store by store."""
    if settings.scorer:
        model = recipe.load_model(settings.scorer, settings, dtype=None)
    stores = []
    for store in mixture.stores:
        with told(f"Measuring how hard {len(store):,} examples are"):
            batches = examples.one_epoch(store, settings, images=images)
            losses = filtering.example_losses(model, batches, len(store))
        kept = filtering.hardest(losses, settings.keep_hardest)
        say(f"kept {len(kept):,} of {len(store):,} examples: losses from {losses[kept].min():.3f}")
        stores.append(Subset(store, kept))
    return Mixture(stores, mixture.weights)


POD = Sft(
    out="",
    checkpoint="",
    length=8192,
    run=loop.Settings(
        steps=5000, checkpoint_every=500, checkpoint_minutes=20.0, evaluate_every=500
    ),
    place=leaves.Place(dtype="bfloat16", remat="full"),
    optimization=leaves.Optimization(learning_rate=1e-5, warmup=100, weight_decay=0.0),
    files=leaves.Files(workers=4),
)
PRESETS = {name: leaves.on_pod(POD, name) for name in ("scout-v5p-64", "maverick-v5p-128")}

if __name__ == "__main__":
    sys.exit(recipe.main(Sft(), run, PRESETS, __doc__))
