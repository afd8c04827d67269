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

from experiments import recipe
from l4jax import roofline
from l4jax.data import conversations, corpus, tokenizing
from l4jax.data import tokenizer as tokenizers
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.demo.stages import model_config
from l4jax.training import hooks, loop, objectives, schedules
from l4jax.training.trainer import Training

VOCABULARY = 512
"""Of the tokenizer that is trained where none is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(recipe.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/pretrain"
    batch: int = 4
    files: recipe.Files = recipe.Files(too_long="split")
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
    tokenizer, train, held_out = data(settings)
    if settings.checkpoint:
        model = recipe.load_model(settings.checkpoint, settings)
    else:
        chosen = settings.model and recipe.preset(settings.model)
        model = recipe.new_model(chosen or model_config(tokenizer.vocab_size), settings)
    recipe.check_vocabulary(tokenizer, model.config)
    recipe.check_length(settings, model.config)
    batches = recipe.training_batches(train, settings, packing="split", sizes=sizes(settings))
    schedule, optimizer = settings.optimization.make(settings.run.steps)
    training = Training(
        model,
        objectives.next_token(balance=settings.balance, z_loss=settings.z_loss),
        optimizer,
        accumulate=settings.optimization.accumulate,
    )
    size = roofline.parameters(model.config)
    recipe.say(f"{size.total:,} parameters, {size.active:,} of them active for each token")
    every: list[hooks.Hook] = []
    if held_out is not None:
        kept = recipe.held_out_batches(held_out, settings, packing="split")
        measure = hooks.evaluate(objectives.next_token(), kept)
        every.append(hooks.every(settings.run.evaluate_every, measure))
    if settings.prompts:
        sample = hooks.sample(tokenizer, settings.prompts, seed=settings.seed)
        every.append(hooks.every(settings.run.evaluate_every, sample))
    result = loop.fit(
        training,
        batches,
        settings.folder,
        settings=settings.run,
        schedule=schedule,
        hooks=every,
        resume=settings.resume,
        console=recipe.CONSOLE,
    )
    recipe.finish(settings, training, tokenizer)
    return result


def data(settings: Pretrain) -> tuple[Tokenizer, Mixture, Mixture | None]:
    """The tokenizer, what to train on, and what is only measured on."""
    path = settings.tokenizer or settings.checkpoint
    if settings.files.data:
        assert path is not None
        tokenizer = tokenizers.load(path)
        encode = conversations.Documents(tokenizer)
        train = recipe.stores(settings.files.data, encode, settings, "train")
        rest = recipe.stores(settings.files.eval_data, encode, settings, "held-out")
        return tokenizer, Mixture(train, settings.files.weights), Mixture(rest) if rest else None
    with recipe.told("Collecting and tokenizing the standard library"):
        texts = corpus.standard_library()
        tokenizer = (
            tokenizers.load(path) if path else tokenizers.train(texts.train, vocab_size=VOCABULARY)
        )
        encode = conversations.Documents(tokenizer)
        sides = [
            tokenizing.encoded([{"text": text} for text in side], encode)
            for side in (texts.train, texts.held_out)
        ]
    return tokenizer, Mixture(sides[:1]), Mixture(sides[1:])


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
    place=recipe.Place(dtype="bfloat16", remat="full"),
    optimization=recipe.Optimization(learning_rate=3e-4, warmup=2000),
    files=recipe.Files(too_long="split", workers=4),
    prompts=(),
)
PRESETS = {
    "scout-v5p-64": recipe.on_pod(POD, "scout-v5p-64", model="llama4-scout"),
    "maverick-v5p-128": recipe.on_pod(POD, "maverick-v5p-128", model="llama4-maverick"),
}

if __name__ == "__main__":
    sys.exit(recipe.main(Pretrain(), run, PRESETS, __doc__))
