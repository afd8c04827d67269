"""Pre-training: next tokens, from scratch or from a checkpoint.

By default a tiny twin of Scout learns the Python standard library, in about a minute:

    python -m experiments.pretrain
    python -m experiments.pretrain --data 'corpus/*.jsonl' prose/ --weights 3 1 --tokenizer DIR
    python -m experiments.pretrain --preset scout-v5p-64 --data gs://… --tokenizer … --out gs://…

Leaves `config.json`, `metrics.jsonl`, `curves.png`, `samples.jsonl`, `checkpoints/`, and the model
with its tokenizer in `model/`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from experiments import leaves, recipe
from l4jax import roofline
from l4jax.data import conversations, corpus
from l4jax.data import tokenizer as tokenizers
from l4jax.data.tokenizer import Tokenizer
from l4jax.demo.stages import model_config
from l4jax.training import hooks, loop, objectives, schedules

VOCABULARY = 512
"""Of the tokenizer that is trained where none is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/pretrain"
    batch: int = 4
    files: leaves.Files = leaves.Files(too_long="split")
    model: str | None = None
    """A preset to start anew; a small twin of Scout by default."""
    checkpoint: str | None = None
    """A checkpoint to go on from instead, with its tokenizer."""
    tokenizer: str | None = None
    """File or folder; trained on the standard library by default, for a small model."""
    ramp: tuple[str, ...] = ()
    """Batch sizes that grow, such as 0:16 500:32 2000:64 (from which step on, rows), instead of
    --batch."""
    balance: float = 0.01
    """Weight of the load balance between experts."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits; 1e-4 keeps them small."""
    prompts: tuple[str, ...] = ("import ", "def __init__(self", '"""Return ')
    """Continued whenever the run is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model and self.checkpoint:
            raise ValueError(f"model {self.model} and checkpoint {self.checkpoint}: leave one out")
        sizes(self)
        if self.files.data and not (self.tokenizer or self.checkpoint):
            raise ValueError("data of your own needs a tokenizer: give --tokenizer or --checkpoint")


def run(settings: Pretrain) -> loop.Result:
    recipe.begin(settings)
    tokenizer = tokenizer_of(settings)
    train, held_out = recipe.mixtures(
        settings,
        conversations.Documents(tokenizer),
        recipe.library,
        "Tokenizing the standard library",
    )
    if settings.checkpoint:
        model = recipe.load_model(settings.checkpoint, settings)
    else:
        chosen = settings.model and recipe.preset(settings.model)
        model = recipe.new_model(chosen or model_config(tokenizer.vocab_size), settings)
    recipe.check_vocabulary(tokenizer, model.config)
    recipe.check_length(settings, model.config)
    batches = recipe.training_batches(train, settings, packing="split", sizes=sizes(settings))
    size = roofline.parameters(model.config)
    recipe.say(f"{size.total:,} parameters, {size.active:,} of them active for each token")
    kept = [] if held_out is None else recipe.held_out_batches(held_out, settings, packing="split")
    sample = hooks.sample(tokenizer, settings.prompts, seed=settings.seed)
    training, result = recipe.train(
        settings,
        model,
        objectives.next_token(balance=settings.balance, z_loss=settings.z_loss),
        batches,
        every=[sample] if settings.prompts else [],
        kept=kept,
        measure=objectives.next_token(),
    )
    recipe.finish(settings, training, tokenizer)
    return result


def tokenizer_of(settings: Pretrain) -> Tokenizer:
    """The tokenizer that is given, or one of the standard library."""
    path = settings.tokenizer or settings.checkpoint
    if path:
        return tokenizers.load(path)
    with recipe.told("Training a tokenizer on the standard library"):
        return tokenizers.train(corpus.standard_library().train, vocab_size=VOCABULARY)


def sizes(settings: Pretrain) -> Any:
    """Rows of each batch."""
    if not settings.ramp:
        return settings.batch
    stages = [stage.split(":") for stage in settings.ramp]
    if not all(len(stage) == 2 and all(x.isdecimal() for x in stage) for stage in stages):
        raise ValueError(f"ramp {' '.join(settings.ramp)}: write STEP:ROWS, such as 0:16 500:32")
    return schedules.batch_ramp([(int(step), int(rows)) for step, rows in stages])


POD = Pretrain(
    out="",
    length=8192,
    run=loop.Settings(
        steps=100_000, checkpoint_every=1000, checkpoint_minutes=20.0, evaluate_every=1000
    ),
    place=leaves.Place(dtype="bfloat16", remat="full"),
    optimization=leaves.Optimization(learning_rate=3e-4, warmup=2000),
    files=leaves.Files(too_long="split", workers=4),
    prompts=(),
)
PRESETS = {
    "scout-v5p-64": leaves.on_pod(POD, "scout-v5p-64", model="llama4-scout"),
    "maverick-v5p-128": leaves.on_pod(POD, "maverick-v5p-128", model="llama4-maverick"),
}

if __name__ == "__main__":
    sys.exit(recipe.main(Pretrain(), run, PRESETS, __doc__))
