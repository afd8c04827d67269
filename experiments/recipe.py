"""What the recipes share: leaves of the command line, where a model lies, what is left at the end.

A recipe is a frozen dataclass of leaves, some values of it by name (`--preset`), and one function
that reads from top to bottom. Exit status: 0 done, 1 failed, 2 bad usage, 143 told to stop (what
was done is saved, `--resume` goes on).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tyro
from etils import epath
from flax import nnx
from rich.console import Console

from l4jax import checkpoints, distributed, lora, paths, presets, quantization, sharding, weights
from l4jax.checkpoints import peft
from l4jax.config import Execution, Remat, TextConfig
from l4jax.data import companions, conversations, pipeline, sources, store, templates, tokenizing
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.llama4 import Llama
from l4jax.planning import meshes
from l4jax.training import checkpointing, loop, optimizers, schedules, tracking
from l4jax.training.trainer import Training, batch_sharding

CONSOLE = Console(stderr=True)
STOPPED = 128 + signal.SIGTERM
MOST_SEGMENTS = 32
"""In a row, where a recipe must know them apart."""
R = TypeVar("R", bound="Recipe")


# --- Leaves --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how the model computes."""

    mesh: str | None = None
    """Sizes of mesh axes, such as fsdp=4,expert=16; by default one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations; parameters are float32 unless the recipe says."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping."""

    def __post_init__(self) -> None:
        if self.mesh is not None:
            meshes.parse(self.mesh)

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Inside, models are made and trained there."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return sharding.use(sharding.make_mesh(**meshes.parse(self.mesh)))

    @property
    def execution(self) -> Execution:
        """For the model."""
        return Execution(dtype=self.dtype, remat=self.remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """How parameters change."""

    optimizer: optimizers.Name = "adamw"
    learning_rate: float = 6e-3
    """The highest one."""
    schedule: schedules.Kind = "cosine"
    warmup: int = 10
    """Steps to get there."""
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that the optimizer's state is kept in."""
    average: float = 0.0
    """Decay of an exponential average of the parameters, which becomes the model; 0 for none."""
    accumulate: int = 1
    """Pieces that a batch is cut into, to save memory."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 1e3:
            raise ValueError(f"learning_rate {self.learning_rate} must be above 0 and below 1000")
        if self.accumulate < 1:
            raise ValueError(f"accumulate {self.accumulate} must be at least 1")

    def make(self, steps: int) -> tuple[Any, Any]:
        """Learning rate by step, and the optimizer."""
        schedule = schedules.schedule(
            self.schedule, self.learning_rate, steps=steps, warmup=self.warmup
        )
        optimizer = optimizers.make(
            self.optimizer,
            schedule,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            moments=self.moments,
            average=self.average,
        )
        return schedule, optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Examples to train on."""

    data: tuple[str, ...] = ()
    """Files, folders or patterns, here or at gs:// and s3://; by default what the recipe brings."""
    weights: tuple[float, ...] | None = None
    """How often each of --data comes, by examples; by default each example once in an epoch."""
    eval_data: tuple[str, ...] = ()
    """Files that are only measured on."""
    on_error: sources.OnError = "raise"
    """What a malformed record does: it ends the run, or is counted and skipped."""
    too_long: tokenizing.TooLong = "drop"
    """What becomes of an example longer than a row: it is left out and counted, cut in pieces
    (documents), or ends the run."""
    workers: int = 0
    """Processes that tokenize, and threads that read ahead."""

    def __post_init__(self) -> None:
        if (self.eval_data or self.weights) and not self.data:
            raise ValueError("eval_data and weights belong to data of your own: give --data too")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"weights {self.weights}: give one for each of {len(self.data)} --data"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is trained of a checkpoint: all of it, or low-rank adapters beside it."""

    rank: int = 0
    """Rank of adapters (LoRA); 0 trains the whole model."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    adapt: tuple[str, ...] = ("*.attention.*",)
    """Which weights have adapters, by patterns on their names."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Keep the base in few bits (QLoRA)."""
    group: int = 128
    """Inputs that share a scale in int4."""
    frozen: tuple[str, ...] = ()
    """Parameters that stay as they are when the whole model is trained, by patterns."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.rank and self.frozen:
            raise ValueError(
                f"rank {self.rank} must not be negative, and without adapters for --frozen"
            )
        if self.group < 1:
            raise ValueError(f"group {self.group} must be at least 1")
        if self.quantize and not self.rank:
            raise ValueError(f"quantize {self.quantize} trains adapters: give them a --rank")

    def apply(self, model: Llama, seed: int) -> tuple[Llama, Callable[[str], bool] | None]:
        """The model to train, and which of its parameters to train; None for all."""
        if not self.rank:
            if not self.frozen:
                return model, None
            known = paths.names(nnx.to_pure_dict(nnx.state(model)))
            fixed = paths.chosen(self.frozen, known)
            return model, lambda name: not fixed(name)
        if self.quantize:
            model = quantization.quantize(model, weights.EVERY, self.quantize, group=self.group)
        key = jax.random.key(seed)
        model = lora.apply(model, self.adapt, rank=self.rank, alpha=self.alpha, key=key)
        return model, lora.trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has."""

    out: str
    """Folder or address of all that the run leaves."""
    resume: bool = False
    """Go on after the last checkpoint in --out, if there is one."""
    seed: int = 0
    """Of everything random."""
    batch: int = 8
    """Rows in an update."""
    length: int = 256
    """Tokens of a row."""
    run: loop.Settings = loop.Settings(steps=300, checkpoint_every=100, evaluate_every=100)
    place: Place = Place()
    optimization: Optimization = Optimization()
    files: Files = Files()

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 2:
            raise ValueError(f"batch {self.batch} must be at least 1, length {self.length} 2")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to {2**32 - 1}")
        self.optimization.make(self.run.steps)  # refuses what does not go together
        if self.batch % self.optimization.accumulate:
            raise ValueError(
                f"accumulate {self.optimization.accumulate} does not divide batch {self.batch}"
            )

    @property
    def folder(self) -> epath.Path:
        """`out` as a path."""
        return epath.Path(self.out)


def main(
    recipe: R, run: Callable[[R], loop.Result], values: Mapping[str, R], about: str | None
) -> int:
    """Reads the command line, runs the recipe, and says what went wrong in one line.

    Args:
        recipe: its default values.
        run: does it.
        values: by the names that --preset takes.
        about: the recipe's docstring.
    """
    named = {"laptop": recipe, **values}
    name, arguments = _preset(sys.argv[1:])
    if name not in named:
        print(f"--preset {name!r} is unknown; choose from {', '.join(named)}", file=sys.stderr)
        return 2
    names = f"--preset {{{','.join(named)}}} sets the leaves' defaults."
    try:
        chosen = tyro.cli(
            type(recipe),
            default=named[name],
            args=arguments,
            description=f"{about}\n\n{names}",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except ValueError as error:
        print(f"{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not chosen.out:
        print(f"--preset {name} needs --out, a folder or address", file=sys.stderr)
        return 2
    # What goes wrong in writing is an event of the run, told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        distributed.initialize()
        with chosen.place.use():
            result = run(chosen)
    except (OSError, ValueError, loop.Diverged) as error:
        if jax.process_count() > 1:
            raise  # ends the other processes too
        print(f"{type(recipe).__name__.lower()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return STOPPED if result.ended == "stopped" else 0


def _preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --preset, and the other arguments."""
    name, rest, waiting = "laptop", [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--preset":
            name = waiting.pop(0) if waiting else ""
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    return name, rest


# --- Pods ----------------------------------------------------------------------------------------
class Pod(NamedTuple):
    """A slice, and how training lies on it; `l4jax plan` shows that it compiles and fits."""

    topology: str
    mesh: str
    batch: int


PODS = {
    "scout-v5p-64": Pod("v5p:4x4x4", "fsdp=4,expert=16", 64),
    "maverick-v5p-128": Pod("v5p:4x4x8", "expert=128", 128),
}


def on_pod(settings: R, name: str, **leaves: Any) -> R:
    """A recipe's values for a pod."""
    pod = PODS[name]
    place = dataclasses.replace(settings.place, mesh=pod.mesh)
    return dataclasses.replace(settings, place=place, batch=pod.batch, **leaves)


# --- Beginning -----------------------------------------------------------------------------------
def begin(recipe: Recipe) -> None:
    """Makes the folder and says in `config.json` what the run is."""
    folder, start = recipe.folder, getattr(recipe, "checkpoint", None)
    if start is not None:
        check_there(start)
    if (folder / "checkpoints").exists() and not recipe.resume:
        raise ValueError(f"{folder}: holds a run; add --resume to go on, or choose another --out")
    text = json.dumps(dataclasses.asdict(recipe), indent=1)
    if (folder / "checkpoints").exists() and (folder / "config.json").exists():
        # Refused before anything is changed.
        then = json.loads((folder / "config.json").read_text())
        changed = list(checkpointing.differences(then, json.loads(text), free=loop.FREE))
        if changed:
            raise ValueError(f"{folder}: holds another run: {'; '.join(changed)}")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpointing.write(folder / "config.json", text + "\n")


def new_model(config: TextConfig, recipe: Recipe) -> Llama:
    """A model to train from scratch, made in its place."""
    return sharding.create(
        lambda: Llama(config, execution=recipe.place.execution, rngs=nnx.Rngs(recipe.seed))
    )


def load_model(path: str, recipe: Recipe, *, dtype: Any = "float32") -> Llama:
    """A checkpoint's model, with parameters to train."""
    check_there(path)
    return checkpoints.load(path, dtype=dtype, execution=recipe.place.execution)


def check_there(path: str, leaf: str = "--checkpoint") -> None:
    """Whether there is something at a checkpoint's path."""
    if not path or not epath.Path(path).exists():
        raise FileNotFoundError(
            f"{path or leaf}: no such checkpoint; give one with {leaf}, or make the default one: "
            "experiments.pretrain comes before sft, and sft before dpo"
        )


def check_whole(recipe: Recipe) -> None:
    """Whether examples stay whole, as conversations must."""
    if recipe.files.too_long == "split":
        raise ValueError("too_long split is for documents; use drop or raise")


def check_vocabulary(tokenizer: Tokenizer, config: TextConfig) -> None:
    """Whether the model knows all of the tokenizer's ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they do "
            "not belong together"
        )


def check_length(recipe: Recipe, config: TextConfig) -> None:
    """Whether the model is meant for rows that long."""
    if recipe.length > config.max_context:
        raise ValueError(
            f"length {recipe.length} exceeds the model's longest context of {config.max_context}"
        )


# --- Data ----------------------------------------------------------------------------------------
def stores(paths: Sequence[str], encode: Any, recipe: Recipe, name: str) -> list[store.Store]:
    """Tokenized files, in folders under `out` that a resumed run finds again."""
    # Documents to be cut are stored whole: packing cuts them where rows end.
    cut = recipe.files.too_long == "split" and isinstance(encode, conversations.Documents)
    if jax.process_count() > 1 and "://" not in recipe.out:
        # Every host makes the same store, in a place of its own.
        name = f"{name}-{jax.process_index()}"
    found = []
    for number, path in enumerate(paths):
        folder = _cache(recipe) / f"{name}-{number}"
        try:
            source = sources.Source(path)
        except FileNotFoundError:
            if not recipe.resume or not (folder / "meta.json").exists():
                raise
            say(f"{path}: is gone; going on with its tokens in {folder}")
            found.append(store.Store(folder))
            continue
        made = tokenizing.tokenize(
            source,
            encode,
            folder,
            max_length=None if cut else recipe.length,
            too_long=recipe.files.too_long,
            on_error=recipe.files.on_error,
            workers=recipe.files.workers,
            console=CONSOLE,
        )
        report = sources.Report(**json.loads((made.folder / "report.json").read_text()))
        say(f"{path}: {report.summary()}, {made.meta['tokens']:,} tokens")
        for reason in report.reasons[:3]:
            say(f"  {reason}")
        found.append(made)
    return found


def _cache(recipe: Recipe) -> epath.Path:
    if "://" in recipe.out:  # a store is read by memory maps
        return epath.Path(os.path.expanduser("~/.cache/l4jax/data")) / recipe.folder.name
    return recipe.folder / "data"


def training_batches(
    mixture: Mixture,
    recipe: Recipe,
    *,
    packing: Any,
    segments: int | None = None,
    sizes: Any = None,
) -> pipeline.Batches:
    """Batches without end; of several processes each makes its own rows."""
    return pipeline.batches(
        mixture,
        length=recipe.length,
        batch_size=sizes or recipe.batch,
        seed=recipe.seed,
        packing=packing,
        segments=segments,
        workers=recipe.files.workers,
        rows=_own_rows(recipe.length),
    )


def held_out_batches(
    mixture: Mixture, recipe: Recipe, *, packing: Any, segments: int | None = None, most: int = 16
) -> list[pipeline.Batch]:
    """The first `most` batches of one epoch, in their order."""
    batches = pipeline.batches(
        Mixture(mixture.stores, epochs=1),
        length=recipe.length,
        batch_size=recipe.batch,
        seed=None,
        packing=packing,
        segments=segments,
        rows=_own_rows(recipe.length),
    )
    return [batch for _, batch in zip(range(most), batches, strict=False)]


def fitting(examples: Any, recipe: Recipe) -> Any:
    """A store's examples that are no longer than a row."""
    numbers = np.flatnonzero(examples.lengths <= recipe.length)
    if not len(numbers):
        raise ValueError(f"no example is as short as --length {recipe.length}")
    if len(numbers) < len(examples):
        say(f"{len(examples) - len(numbers):,} examples are longer than a row and left out")
    return store.Subset(examples, numbers)


def one_epoch(
    store: Any, recipe: Recipe, *, segments: int | None = None
) -> Iterable[pipeline.Batch]:
    """All examples of a store once, in their order, with `example`."""
    return pipeline.batches(
        Mixture([store], epochs=1),
        length=recipe.length,
        batch_size=recipe.batch,
        seed=None,
        packing="best_fit",
        segments=segments or min(recipe.length, MOST_SEGMENTS),
        rows=_own_rows(recipe.length),
    )


def _own_rows(length: int) -> Callable[[int], Sequence[int]] | None:
    if jax.process_count() == 1:
        return None
    return lambda size: distributed.local_rows(batch_sharding(size, length), size)


# --- End -----------------------------------------------------------------------------------------
def finish(
    recipe: Recipe,
    training: Training,
    tokenizer: Tokenizer,
    model: Llama | None = None,
    *,
    export: bool = False,
) -> None:
    """Draws the run's curves and saves the model with its tokenizer in `out/model`.

    Args:
        recipe: of the run.
        training: what it trained; of a model with adapters these are merged, and saved beside it.
        tokenizer: goes with the model.
        model: if it is another than `training.model`, such as a part of it.
        export: whether to write Hugging Face's files too, in `out/export`.
    """
    folder = recipe.folder
    if jax.process_index() == 0:
        curves(folder)
    if "://" in recipe.out:
        # Models are written by renaming a folder, which a cloud store cannot do.
        say(f"Curves, metrics and checkpoints: {recipe.out}")
        return
    model = training.model if model is None else model
    if recipe.optimization.average:
        average = optimizers.average_of(training.state.optimizer)
        _, frozen = training.update.parts(training.state.params)
        model = training.update.model(training.update.joined(average, frozen))
    if not all(bool(jnp.isfinite(x).all()) for x in floats(model)):
        raise ValueError(
            "the model has numbers that are not finite and is not saved: lower --learning-rate"
        )
    if weights.standing(model, lora.LowRank):
        save_adapters(model, folder / "adapter")
        model = lora.merge(model)
    origin = getattr(recipe, "checkpoint", None)
    save_model(model, tokenizer, folder / "model", origin=origin)
    if export:
        save_model(model, tokenizer, folder / "export", to="hf", origin=origin)
    say(f"Model, curves and metrics: {recipe.out}")


def floats(model: Llama) -> list[jax.Array]:
    """The floating-point arrays of a model."""
    arrays = jax.tree.leaves(nnx.state(model))
    return [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]


def save_model(
    model: Llama,
    tokenizer: Tokenizer,
    folder: epath.Path,
    *,
    to: Literal["orbax", "hf"] = "orbax",
    origin: str | None = None,
) -> None:
    """Writes a model for `checkpoints.load` and `l4jax generate`, in place of an earlier one.

    Args:
        model: what to save.
        tokenizer: goes with it.
        folder: of the model.
        to: the format.
        origin: the checkpoint that training began with; its licence and settings are copied.
    """
    if folder.exists() and jax.process_index() == 0:
        folder.rmtree()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    checkpoints.save(model, folder, to=to, extra=ids if to == "hf" else None)
    if jax.process_index() > 0:
        return
    tokenizer.save(folder)
    if to == "hf" and tokenizer.family and tokenizer.stop_ids:
        text = templates.chat_template(tokenizer.family)
        checkpointing.write(folder / "chat_template.jinja", text)
        settings = companions.generation_config(
            bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
        )
        checkpointing.write(folder / "generation_config.json", json.dumps(settings, indent=2))
    if origin and epath.Path(origin).is_dir():
        for name, file in checkpoints.carried(pathlib.Path(origin)).items():
            if not (folder / name).exists():
                (folder / name).write_bytes(file.read_bytes())


def save_adapters(model: Llama, folder: epath.Path) -> None:
    """Writes adapters as PEFT reads them, where its format can hold them."""
    if folder.exists() and jax.process_index() == 0:
        folder.rmtree()
    try:
        peft.save(model, folder)
    except ValueError as error:
        say(f"no adapter for PEFT: {error}")


def curves(folder: epath.Path) -> None:
    """`curves.png`: what `metrics.jsonl` says by step, a panel for each kind of number."""
    lines = tracking.read(folder / "metrics.jsonl")
    panels = {
        name: [key for key in keys if any(key in line for line in lines)]
        for name, keys in {
            "loss (nats)": ("loss", "eval_loss", "nll", "eval_nll", "eval_short_loss"),
            "share": ("accuracy", "eval_accuracy", "eval_needle"),
            "reward": ("margin", "eval_margin", "chosen_reward", "rejected_reward"),
            "gradient norm": ("grad_norm",),
            "learning rate": ("learning_rate",),
        }.items()
    }
    panels = {name: keys for name, keys in panels.items() if keys}
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (name, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            style = {"marker": "o", "markersize": 4} if key.startswith("eval_") else {"alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=key, **style)
        axes.set(xlabel="step", ylabel=name)
        axes.legend(fontsize="small")
    with (folder / "curves.png").open("wb") as file:
        figure.savefig(file, dpi=120, format="png")


def say(text: str) -> None:
    """Prints a line for people, once however many processes there are."""
    if jax.process_index() == 0:
        CONSOLE.print(text, markup=False, highlight=False)


def told(text: str) -> contextlib.AbstractContextManager[Any]:
    """Shows what takes a while."""
    return CONSOLE.status(text)


def preset(name: str) -> TextConfig:
    """The configuration of a preset.

    Raises:
        ValueError: there is none of this name.
    """
    return presets.get(name).make()
