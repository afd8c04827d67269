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

from experiments import examples, leaves, recipe
from experiments.console import say, told
from l4jax import checkpoints, roofline
from l4jax.config import TextConfig
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
        if self.files.images and not self.checkpoint:
            raise ValueError("images: go on from a model with an image encoder, by --checkpoint")
        if self.files.images and self.files.too_long == "split":
            raise ValueError("images: documents stay whole then; use --too-long drop or raise")
        if self.files.data and not (self.tokenizer or self.checkpoint):
            raise ValueError("data of your own needs a tokenizer: give --tokenizer or --checkpoint")

    @property
    def batches(self) -> tuple[int, ...]:
        """See `Recipe`."""
        return tuple(rows for _, rows in ramp(self)) or (self.batch,)


def run(settings: Pretrain) -> loop.Result:
    recipe.begin(settings)
    tokenizer = tokenizer_of(settings)
    config = config_of(settings, tokenizer)
    recipe.check_vocabulary(tokenizer, config)
    recipe.check_model(settings, config)
    images = None
    if settings.checkpoint:
        images = examples.sight(settings, settings.checkpoint, tokenizer)
    # Documents are cut where rows end, but images stay whole.
    packing = "split" if images is None else "best_fit"
    train, held_out = examples.mixtures(
        settings,
        conversations.Documents(tokenizer, **examples.reading(settings, images)),
        examples.standard_library,
        "Tokenizing the standard library",
    )
    if settings.checkpoint:
        model = recipe.load_model(settings.checkpoint, settings)
    else:
        model = recipe.new_model(config, settings)
    batches = examples.training_batches(
        train, settings, packing=packing, sizes=sizes(settings), images=images
    )
    size = roofline.parameters(config)
    say(f"{size.total:,} parameters of the decoder, {size.active:,} of them active for each token")
    kept: Any = []
    if held_out is not None:
        kept = examples.held_out_batches(held_out, settings, packing=packing, images=images)
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
    with told("Training a tokenizer on the standard library"):
        return tokenizers.train(corpus.standard_library().train, vocab_size=VOCABULARY)


def config_of(settings: Pretrain, tokenizer: Tokenizer) -> TextConfig:
    """The architecture: the checkpoint's, the preset's, or a small one."""
    if settings.checkpoint:
        return checkpoints.read_config(settings.checkpoint)
    if settings.model:
        return recipe.preset(settings.model)
    return model_config(tokenizer.vocab_size)


def sizes(settings: Pretrain) -> Any:
    """Rows of each batch."""
    return schedules.batch_ramp(ramp(settings)) if settings.ramp else settings.batch


def ramp(settings: Pretrain) -> list[tuple[int, int]]:
    """Steps, and how many rows batches have from there on."""
    stages = [stage.split(":") for stage in settings.ramp]
    if not all(len(stage) == 2 and all(x.isdecimal() for x in stage) for stage in stages):
        raise ValueError(f"ramp {' '.join(settings.ramp)}: write STEP:ROWS, such as 0:16 500:32")
    return [(int(step), int(rows)) for step, rows in stages]


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
