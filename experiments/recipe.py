"""What the recipes share: how they begin, what they train on, the run itself, what it leaves.

A recipe is a frozen dataclass of `leaves`, some values of it by name (`--preset`), and one function
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
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tyro
from etils import epath
from flax import nnx
from rich.console import Console

from experiments import leaves
from experiments.leaves import Recipe
from l4jax import checkpoints, distributed, lora, presets, sharding, weights
from l4jax.checkpoints import peft
from l4jax.config import TextConfig
from l4jax.data import (
    companions,
    conversations,
    corpus,
    pipeline,
    sources,
    store,
    templates,
    tokenizing,
)
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.llama4 import Llama
from l4jax.training import checkpointing, hooks, loop, optimizers, tracking
from l4jax.training.objectives import Objective
from l4jax.training.trainer import Training, batch_sharding

CONSOLE = Console(stderr=True)
STOPPED = 128 + signal.SIGTERM
MOST_SEGMENTS = 32
"""In a row, where a recipe must know them apart."""
R = TypeVar("R", bound=leaves.Recipe)


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
    except (ImportError, OSError, ValueError, loop.Diverged) as error:
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


def mixtures(
    recipe: Recipe, encode: Any, embedded: Callable[[], Iterable[Any]], about: str
) -> tuple[Mixture, Mixture | None]:
    """What to train on, and what is only measured on: files, or what the recipe brings.

    Args:
        recipe: names the files.
        encode: makes examples of records.
        embedded: the records of both sides, where no files are named.
        about: says that these are being made.
    """
    files = recipe.files
    if files.data:
        train = stores(files.data, encode, recipe, "train")
        rest = stores(files.eval_data, encode, recipe, "held-out")
        return Mixture(train, files.weights), Mixture(rest) if rest else None
    with told(about):
        sides = [tokenizing.encoded(side, encode) for side in embedded()]
    if not isinstance(encode, conversations.Documents):  # which packing cuts
        sides = [fitting(side, recipe) for side in sides]
    return Mixture(sides[:1]), Mixture(sides[1:])


def library() -> list[list[dict[str, str]]]:
    """The standard library's texts as records, to train on and held out."""
    return [[{"text": text} for text in side] for side in corpus.standard_library()]


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


# --- The run -------------------------------------------------------------------------------------
def train(
    recipe: Recipe,
    model: Llama,
    objective: Objective,
    batches: Any,
    *,
    trainable: Callable[[str], bool] | None = None,
    every: Sequence[hooks.Function] = (),
    kept: Sequence[pipeline.Batch] = (),
    measure: Objective | None = None,
) -> tuple[Training, loop.Result]:
    """Trains to the end, as the leaves say.

    Args:
        recipe: how.
        model: what to train; its parameters are taken over.
        objective: what is minimised.
        batches: see `loop.fit`.
        trainable: see `trainer.Update`.
        every: what to call whenever the run is evaluated.
        kept: held-out batches that are measured then, if there are any.
        measure: by what; the objective by default.
    """
    schedule, optimizer = recipe.optimization.make(recipe.run.steps)
    accumulate = recipe.optimization.accumulate
    training = Training(model, objective, optimizer, accumulate=accumulate, trainable=trainable)
    functions = [*every, *([hooks.evaluate(measure or objective, kept)] if kept else [])]
    result = loop.fit(
        training,
        batches,
        recipe.folder,
        settings=recipe.run,
        schedule=schedule,
        hooks=[hooks.every(recipe.run.evaluate_every, function) for function in functions],
        resume=recipe.resume,
        console=CONSOLE,
    )
    return training, result


# --- End -----------------------------------------------------------------------------------------
def finish(
    recipe: Recipe, training: Training, tokenizer: Tokenizer, *, export: bool = False
) -> None:
    """Draws the run's curves and saves the model with its tokenizer in `out/model`.

    Args:
        recipe: of the run.
        training: what it trained; of a model with adapters these are merged, and saved beside it.
        tokenizer: goes with the model.
        export: whether to write Hugging Face's files too, in `out/export`.
    """
    folder = recipe.folder
    if jax.process_index() == 0:
        curves(folder)
    if "://" in recipe.out:
        # Models are written by renaming a folder, which a cloud store cannot do.
        say(f"Curves, metrics and checkpoints: {recipe.out}")
        return
    model = training.model
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
