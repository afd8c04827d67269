r"""Mid-training: a model that knows short texts learns long ones, in stages of growing length.

By default the model of `python -m experiments.pretrain` goes on to rows of 128, 256 and 512 tokens,
two, four and eight of its attention chunks, in about three minutes:

    python -m experiments.midtrain_long_context
    python -m experiments.midtrain_long_context --lengths 256 1024 --mesh context=2
    python -m experiments.midtrain_long_context --preset scout-v5p-64 --checkpoint … --data gs://… \
        --eval-data gs://… --out /mnt/bucket/run

A stage ends, as Llama 3's six did (Dubey et al. 2024, §3.4.2), when short texts are modelled as
well as before and a needle is found in texts of all lengths up to the stage's (see
`evaluation.needle`), or after --steps. Both are measured every --evaluate-every steps; short texts
need --eval-data where there is --data, and without them only needles count. What stays the same and
what does not:

- Data: documents packed whole, or cut to a row's length, with attention inside each of them only.
  A share --needles of the tokens are texts with a needle to find, which a small model learns from
  little else; --weights are shares of the other tokens.
- Chunked layers never see further than their chunk, whatever the length: their RoPE stays as it is.
  Causal ones (Llama 3) turn by angles never seen before, so a stage may stretch them as Llama 3.1
  did: --rope-factors 1 2 4.
- Global layers have no positions. Their attention temperature stays as the checkpoint has it; from
  its floor on (`config.Temperature`) longer rows see more of it.
- Each stage has its own optimizer, warm-up included, and as many tokens in a batch as the first; on
  a pod its own mesh, with more of the devices on `context`.

Leaves `stage-LENGTH/` of each stage, with all that pre-training leaves; `report.json`; `needle.png`
of before and after each stage; and `model/`. A killed run goes on by `--resume` where it was: a
stage begins with the saved model of the one before it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from experiments import examples, leaves, recipe
from experiments.console import say, told
from l4jax import checkpoints, paths
from l4jax.config import RopeScaling, TextConfig
from l4jax.data import conversations, corpus, pipeline, tokenizing
from l4jax.data import tokenizer as tokenizers
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.evaluation import needle
from l4jax.models.llama4 import Llama
from l4jax.planning import meshes
from l4jax.training import checkpointing, hooks, loop, objectives
from l4jax.training.trainer import evaluator

MAX_BYTES = 3_000_000
"""Of the standard library, where no data are given."""
ENOUGH = 8
"""Batches that a loss is measured on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Midtrain(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/midtrain"
    checkpoint: str = "runs/pretrain/model"
    """The model to start from, in any format, with its tokenizer."""
    batch: int = 8
    """Rows of an update in the first stage; longer rows are fewer."""
    length: tyro.conf.Suppress[int] = 128  # that of the stage
    lengths: tuple[int, ...] = (128, 256, 512)
    """Tokens of a row in each stage."""
    rope_factors: tuple[float, ...] = ()
    """How far each stage stretches RoPE's long wavelengths; by default as the checkpoint does."""
    meshes: tuple[str, ...] = ()
    """Sizes of mesh axes in each stage, instead of --mesh."""
    needles: float = 0.7
    """Share of the tokens that are texts with a needle."""
    needle: str = "\n# {key}: {value}\n"
    """The needle, a sentence or line with {key} and {value} in it."""
    samples: int = 4
    """Texts that a needle is looked for in, for each depth and length."""
    found: float = 0.9
    """How often it must be found at every length for a stage to end early."""
    recovered: float = 0.02
    """How much higher than before all stages the loss on short texts may then be, in nats."""
    balance: float = 0.01
    """Weight of the load balance between experts."""
    run: loop.Settings = loop.Settings(steps=500, checkpoint_every=100, evaluate_every=50)
    optimization: leaves.Optimization = leaves.Optimization(learning_rate=3e-3, schedule="constant")
    files: leaves.Files = leaves.Files(too_long="split")

    def __post_init__(self) -> None:
        super().__post_init__()
        examples.check_text(self)
        if "://" in self.out:
            raise ValueError(
                f"out {self.out}: stages hand their model on in a folder, so give a disk that all "
                "hosts see, such as a mounted bucket"
            )
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths {self.lengths} must be at least one, and grow")
        for name in ("rope_factors", "meshes"):
            given = getattr(self, name)
            if given and len(given) != len(self.lengths):
                raise ValueError(f"{name} {given}: give one for each of the lengths {self.lengths}")
        if self.rope_factors and min(self.rope_factors) < 1:
            raise ValueError(f"rope_factors {self.rope_factors} must be at least 1")
        if self.meshes and self.place.mesh:
            raise ValueError(f"mesh {self.place.mesh} and meshes {self.meshes}: leave one out")
        for mesh in self.meshes:
            meshes.parse(mesh)
        if not 0 <= self.needles < 1 or not 0 < self.found <= 1:
            raise ValueError(
                f"needles {self.needles} must be from 0 to below 1, found {self.found} above 0 and "
                "at most 1"
            )
        if self.samples < 1 or self.run.evaluate_every is None:
            raise ValueError("samples must be at least 1, and evaluate_every a number")


def run(settings: Midtrain) -> loop.Result:
    recipe.check_there(settings.checkpoint)
    begin(settings)
    tokenizer = tokenizers.load(settings.checkpoint)
    config = checkpoints.read_config(settings.checkpoint)
    recipe.check_vocabulary(tokenizer, config)
    for stage in stages(settings):
        with stage.place.use():
            recipe.check_model(stage, longer_config(config, stage))
    texts = Texts(settings, tokenizer)
    result = loop.Result(0, "finished", {})
    reports: list[dict[str, Any]] = []
    for stage in stages(settings):
        if not done(settings, stage):
            with stage.place.use():
                result = train(stage, texts, reports)
        reports.append(json.loads((stage.folder / "stage.json").read_text()))
    finish(settings, tokenizer, reports)
    return result


# --- Stages --------------------------------------------------------------------------------------
def begin(settings: Midtrain) -> None:
    """Makes the folder, or finds there the same run."""
    file = settings.folder / "config.json"
    if file.exists():
        if not settings.resume:
            raise ValueError(f"{settings.out}: holds a run; add --resume, or choose another --out")
        then, now = (
            json.loads(file.read_text()),
            json.loads(json.dumps(dataclasses.asdict(settings))),
        )
        free = loop.FREE | {"meshes"}
        changed = list(paths.differences(then, now, free=free))
        if changed:
            raise ValueError(
                f"{settings.out}: the run has another configuration: {'; '.join(changed)}"
            )
    recipe.begin(settings)


def stages(settings: Midtrain) -> Iterator[Midtrain]:
    """The recipe of each stage, in a folder of its own, from the model of the one before."""
    checkpoint, factors = settings.checkpoint, settings.rope_factors
    for number, length in enumerate(settings.lengths):
        mesh = settings.meshes[number] if settings.meshes else settings.place.mesh
        stage = dataclasses.replace(
            settings,
            out=str(settings.folder / f"stage-{length}"),
            checkpoint=checkpoint,
            batch=max(1, settings.batch * settings.lengths[0] // length),
            length=length,
            lengths=settings.lengths[: number + 1],
            rope_factors=factors[: number + 1],
            meshes=(),
            place=dataclasses.replace(settings.place, mesh=mesh),
        )
        checkpoint = str(stage.folder / "model")
        yield stage


def done(settings: Midtrain, stage: Midtrain) -> bool:
    """Whether a stage's model is there; the last one's moves to `out/model`."""
    last = stage.length == settings.lengths[-1]
    return any(
        folder.exists()
        for folder in (stage.folder / "model", *([settings.folder / "model"] if last else []))
    )


def train(stage: Midtrain, texts: Texts, before: Sequence[Mapping[str, Any]]) -> loop.Result:
    """One stage: trains, saves the model, and says in `stage.json` what came of it.

    Args:
        stage: what to do.
        texts: to learn from and to measure on.
        before: reports of the stages before.
    """
    recipe.begin(stage)
    model = lengthened(recipe.load_model(stage.checkpoint, stage), stage)
    mixture, kept = texts.mixture(stage), texts.measured(stage)
    batches = Until(examples.training_batches(mixture, stage, packing="best_fit"))
    measure = Measure(stage, texts)
    first = measure(model)
    known = before[0]["before"] if before else first
    say(
        f"stage of {stage.length:,} tokens, {stage.batch} rows: found {first['found']}, "
        f"{_short(first)}"
    )

    def look(moment: hooks.Moment) -> dict[str, float]:
        now = measure(moment.training.model)
        batches.ended = reached(now, known, stage)
        short = {} if now["short_loss"] is None else {"eval_short_loss": now["short_loss"]}
        return {"eval_needle": min(now["found"])} | short

    objective = objectives.next_token(balance=stage.balance)
    training, result = recipe.train(
        stage,
        model,
        objective,
        batches,
        every=[look],
        kept=kept,
        measure=objectives.next_token(),
    )
    last = measure(training.model)
    report = {
        "length": stage.length,
        "steps": result.step,
        "reached": reached(last, known, stage),
        "before": first,
        "after": last,
    }
    if jax.process_index() == 0:
        checkpointing.write(stage.folder / "stage.json", json.dumps(report, indent=1) + "\n")
    recipe.finish(stage, training, texts.tokenizer)
    how = "reached its aim" if report["reached"] else "did not reach its aim; going on all the same"
    say(
        f"stage of {stage.length:,} tokens {how} after {result.step} steps: found {last['found']}, "
        f"{_short(last)}; at first {_short(known)}"
    )
    return result._replace(ended="finished")


def _short(found: Mapping[str, Any]) -> str:
    """What a measurement says of short texts."""
    loss = found["short_loss"]
    return "short texts not measured" if loss is None else f"loss on short texts {loss:.4f}"


def finish(settings: Midtrain, tokenizer: Tokenizer, reports: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report and moves the last stage's model to `out/model`."""
    if jax.process_index():
        return
    report = {"depths": needle.DEPTHS, "stages": reports}
    checkpointing.write(settings.folder / "report.json", json.dumps(report, indent=1) + "\n")
    panels = {
        f"{when} {x['length']:,}": (settings.lengths[: number + 1], x[when]["needle"])
        for number, x in enumerate(reports)
        for when in ("before", "after")
    }
    needle.draw(settings.folder / "needle.png", panels)
    model, final = (x / "model" for x in (list(stages(settings))[-1].folder, settings.folder))
    if model.exists():
        if final.exists():
            final.rmtree()
        model.rename(final)
    tokenizer.save(final)
    say(f"Model, report and needle.png: {settings.out}")


class Until:
    """Batches that end once `ended` is set; where they stand includes whether it is."""

    def __init__(self, batches: pipeline.Batches) -> None:
        self._batches, self.ended = iter(batches), False

    def __iter__(self) -> Until:
        return self

    def __next__(self) -> pipeline.Batch:
        if self.ended:
            raise StopIteration
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """As the pipeline's."""
        return {"ended": self.ended, "batches": self._batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As the pipeline's."""
        self.ended = state["ended"]
        self._batches.set_state(state["batches"])


# --- Models --------------------------------------------------------------------------------------
def lengthened(model: Llama, stage: Midtrain) -> Llama:
    """The same parameters in a model that is meant for the stage's rows."""
    config = longer_config(model.config, stage)
    how = model.execution
    abstract = nnx.eval_shape(lambda: Llama(config, execution=how, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model))


def longer_config(config: TextConfig, stage: Midtrain) -> TextConfig:
    """The architecture with a context as long as the stage's rows, and RoPE stretched as it says.

    A model whose RoPE is not stretched yet is as if its context so far were what it was trained on,
    with Llama 3.1's factors for low and high frequencies.
    """
    attention = config.attention
    if stage.rope_factors:
        factor, scaling = stage.rope_factors[-1], attention.rope.scaling
        if scaling is not None:
            scaling = dataclasses.replace(scaling, factor=factor)
        elif factor > 1:
            scaling = RopeScaling(
                factor=factor,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_context=config.max_context,
            )
        rope = dataclasses.replace(attention.rope, scaling=scaling)
        attention = dataclasses.replace(attention, rope=rope)
    longest = max(config.max_context, stage.length)
    return dataclasses.replace(config, max_context=longest, attention=attention)


# --- Texts ---------------------------------------------------------------------------------------
class Texts:
    """Documents to train on, and those only measured on.

    Attributes:
        train: stores of the first.
        held_out: of the others; none where data are given and no others.
        first: the recipe, with the shape of the first stage's batches.
    """

    def __init__(self, settings: Midtrain, tokenizer: Tokenizer) -> None:
        encode, files = conversations.Documents(tokenizer), settings.files
        self.first = dataclasses.replace(settings, length=settings.lengths[0])
        self.tokenizer = tokenizer
        if files.data:
            longest = dataclasses.replace(settings, length=settings.lengths[-1])
            self.train: list[Any] = [*examples.stores(files.data, encode, longest, "train")]
            self.held_out: list[Any] = [*examples.stores(files.eval_data, encode, longest, "rest")]
            return
        with told("Collecting and tokenizing the standard library"):
            texts = corpus.standard_library(max_bytes=MAX_BYTES)
            self.train, self.held_out = (
                [tokenizing.encoded([{"text": text} for text in side], encode)]
                for side in (texts.train, texts.held_out)
            )

    def mixture(self, stage: Midtrain) -> Mixture:
        """What to train on in a stage, with texts to learn finding from."""
        train = [Pieces(store, stage.length) for store in self.train]
        weights = list(stage.files.weights or [int(store.lengths.sum()) for store in train])
        if not stage.needles:
            return Mixture(train, weights, unit="tokens")
        documents = needle.Documents(
            self.needles(self.train, stage),
            count=math.ceil(stage.needles * stage.run.steps * stage.batch) + 1,
            length=stage.length,
            seed=stage.seed,
        )
        total = sum(weights) / (1 - stage.needles)
        shares = [*(weight / total for weight in weights), stage.needles]
        return Mixture([*train, documents], shares, unit="tokens")

    def needles(self, stores: list[Any], stage: Midtrain) -> needle.Needles:
        """Needles in the text of some stores."""
        return needle.Needles(self.tokenizer, needle.Haystack(stores, self.tokenizer), stage.needle)

    def measured(self, stage: Midtrain) -> list[pipeline.Batch]:
        """Batches of held-out texts of a stage, or of the first one; none if there are none."""
        if not self.held_out:
            return []
        held_out = Mixture([Pieces(store, stage.length) for store in self.held_out])
        return examples.held_out_batches(held_out, stage, packing="best_fit", most=ENOUGH)


class Pieces:
    """A store of documents that are cut into pieces, so that each fits a row."""

    most_segments = 1

    def __init__(self, store: Any, length: int) -> None:
        counts = -(-store.lengths // length)
        self._store, self._length, self.has_mask = store, length, store.has_mask
        self._documents = np.repeat(np.arange(len(store)), counts)
        number = np.arange(len(self._documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = number * length
        self.lengths = np.minimum(store.lengths[self._documents] - self._starts, length)
        self.segments = np.ones_like(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"{self._store!r} in pieces of {self._length}"

    @property
    def meta(self) -> dict[str, Any]:
        """As a `data.store.Store` has it."""
        return {"content": f"{self._store.meta['content']}/{self._length}"}

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """See `data.store.Store.tokens`."""
        first = int(self._starts[number])
        return self._store.tokens(int(self._documents[number]), first + start, first + stop)

    def loss_mask(self, number: int, start: int, stop: int) -> np.ndarray | None:
        """See `data.store.Store.loss_mask`."""
        first = int(self._starts[number])
        return self._store.loss_mask(int(self._documents[number]), first + start, first + stop)

    def ends(self, number: int) -> np.ndarray:
        """See `data.store.Store.ends`."""
        return self.lengths[number : number + 1]


# --- When to go on -------------------------------------------------------------------------------
class Measure:
    """What decides when a stage ends, of a model."""

    def __init__(self, stage: Midtrain, texts: Texts) -> None:
        self._probe = needle.Probe(
            texts.needles(texts.held_out or texts.train, stage),
            lengths=stage.lengths,
            samples=stage.samples,
            rows=stage.batch,
            seed=stage.seed,
        )
        self._loss = evaluator(objectives.next_token())
        self._short = texts.measured(texts.first)

    def __call__(self, model: Llama) -> dict[str, Any]:
        """How often needles are found by depth and length, and by length; loss on short texts,
        None if there are none."""
        shares = self._probe(model)
        loss = self._loss(model, self._short)["loss"] if self._short else None
        return {
            "short_loss": loss,
            "found": [round(float(x), 4) for x in shares.mean(0)],
            "needle": shares.tolist(),
        }


def reached(now: Mapping[str, Any], first: Mapping[str, Any], stage: Midtrain) -> bool:
    """Whether needles are found at all lengths, and short texts, if any, are known as before."""
    if min(now["found"]) < stage.found:
        return False
    return now["short_loss"] is None or now["short_loss"] - first["short_loss"] <= stage.recovered


POD = Midtrain(
    out="",
    checkpoint="",
    needle=needle.TEXT,
    needles=0.02,
    found=1.0,
    run=loop.Settings(
        steps=2000, checkpoint_every=250, checkpoint_minutes=20.0, evaluate_every=250
    ),
    place=leaves.Place(dtype="bfloat16", remat="full"),
    optimization=leaves.Optimization(learning_rate=2e-5, schedule="constant", warmup=100),
    files=leaves.Files(too_long="split", workers=4),
)
PRESETS = {
    # 512 Ki tokens in every batch; each shard of a sequence is whole chunks.
    "scout-v5p-64": dataclasses.replace(
        POD,
        batch=64,
        lengths=(8192, 32_768, 131_072, 262_144),
        meshes=(
            "fsdp=4,expert=16",
            "expert=16,context=4",
            "expert=4,context=16",
            "expert=2,context=32",
        ),
    ),
}

if __name__ == "__main__":
    sys.exit(recipe.main(Midtrain(), run, PRESETS, __doc__))
